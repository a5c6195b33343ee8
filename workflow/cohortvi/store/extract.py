"""One sample's kept cells and the selected genes, on their way from the raw store into counts/{sample}.zarr."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cohortvi.cohort.readers import Raw, iter_counts


def cell_table(cells: pd.DataFrame, sample: str, columns: dict[str, str | float]) -> pd.DataFrame:
    """Return the obs of a sample's kept cells: the QC table's columns, sample, batch and covariates.

    `cells`: the QC table; `columns`: values that all cells of the sample have. Index: sample_barcode.
    """
    kept = cells[cells["reason"] == ""].drop(columns=["reason", "predicted_doublet"])
    kept.index = pd.Index([f"{sample}_{barcode}" for barcode in kept.index], dtype=object)
    return kept.assign(sample=sample, **columns)


def selected_counts(raw: Raw, keep: np.ndarray, genes: pd.Index) -> Iterator[sp.csr_matrix]:
    """Yield the counts of the cells `keep` (sorted positions) over `genes`, in that order; absent genes count 0."""
    place = pd.Index(genes).get_indexer(raw.var.index)
    for _, block in iter_counts(raw, keep):
        columns = place[block.indices]
        taken = columns >= 0
        indptr = np.concatenate([[0], np.cumsum(taken)])[block.indptr]
        matrix = sp.csr_matrix((block.data[taken], columns[taken], indptr), shape=(block.shape[0], len(genes)))
        matrix.sort_indices()
        yield matrix
