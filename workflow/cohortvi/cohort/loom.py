"""Loom files: a dense matrix of genes x cells, with layers of the same shape and attributes of rows and columns."""

from collections.abc import Sequence

import h5py
import numpy as np
import pandas as pd

from cohortvi.cohort.contents import Contents, as_text, check_shape, pick_layer
from cohortvi.cohort.matrices import Dense, value_type
from cohortvi.cohort.places import Place

# As loompy and velocyto name them, and as scanpy and anndata write them.
CELLS = ("CellID", "obs_names")
GENES = ("Gene", "var_names")


def describe(place: Place, obs_columns: Sequence[str], chunk_cells: int) -> Contents:
    """Return what a loom file holds, with those of `obs_columns` that it has."""
    with place.hdf5() as file:
        _check(place, file)
        layers = ("X", *(f"layers/{name}" for name in file.get("layers", ())))
        layer = pick_layer(place, layers)
        node = "matrix" if layer == "X" else layer
        cells, genes = file["col_attrs"], file["row_attrs"]
        n_vars, n_obs = file[node].shape
        matrix = Dense(place, place.hdf5, node, (n_obs, n_vars), value_type(place, file[node].dtype), transposed=True)
        there = _columns(cells)
        contents = Contents(
            obs_names=_names(place, cells, CELLS),
            obs={name: as_text(cells[name][:]) for name in obs_columns if name in there},
            obs_columns=there,
            var=pd.DataFrame({n: as_text(genes[n][:]) for n in _columns(genes)}, index=_names(place, genes, GENES)),
            layers=layers,
            matrix=matrix,
        )
    check_shape(place, matrix, len(contents.obs_names), len(contents.var))
    return contents


def _check(place: Place, file: h5py.File) -> None:
    missing = [name for name in ("matrix", "row_attrs", "col_attrs") if name not in file]
    if missing:
        raise place.fault(
            f"is no loom file: it has no {', '.join(missing)}; it holds {', '.join(file) or 'nothing'}",
            "expected matrix, row_attrs and col_attrs: correct `path` or `format` in the sheet",
        )


def _columns(attributes: h5py.Group) -> tuple[str, ...]:
    return tuple(name for name in attributes if getattr(attributes[name], "ndim", 0) == 1)


def _names(place: Place, attributes: h5py.Group, names: Sequence[str]) -> np.ndarray:
    for name in names:
        if name in attributes:
            return as_text(attributes[name][:])
    raise place.fault(
        f"has no {' or '.join(names)} in {attributes.name.strip('/')}; it has {', '.join(attributes) or 'nothing'}",
        "expected the names of cells and genes there: add them to the file",
    )
