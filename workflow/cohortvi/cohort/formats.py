"""Each format's own reader behind one function."""

from collections.abc import Sequence

from cohortvi.cohort import anndata_store, loom, tenx
from cohortvi.cohort.contents import Contents
from cohortvi.cohort.places import locate
from cohortvi.cohort.sheet import Sample

DESCRIBE = {
    "h5ad": anndata_store.describe,
    "zarr": anndata_store.describe,
    "10x_h5": tenx.describe_h5,
    "10x_mtx": tenx.describe_mtx,
    "loom": loom.describe,
}


def describe(sample: Sample, obs_columns: Sequence[str], chunk_cells: int) -> Contents:
    """Return what the file of a sample holds, with those of `obs_columns` that it has.

    `chunk_cells`: the rows that a matrix stored by columns is laid out by. Errors: InputError.
    """
    place = locate(sample)
    with place.reading():
        return DESCRIBE[place.format](place, obs_columns, chunk_cells)
