"""AnnData files: h5ad, and zarr in formats v2 and v3; frames and columns are read by anndata itself.

Layers are X, layers/NAME and raw, which has genes of its own. Matrices may lie as CSR, CSC or dense. Rows are read by
slices of the arrays, as those of 10x files are, rather than by anndata's lazy readers, which open no h5ad behind a URL.
"""

from collections.abc import Sequence
from functools import partial

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from cohortvi.cohort.bands import Banded, transposed_entries
from cohortvi.cohort.contents import Contents, as_text, check_shape, pick_layer
from cohortvi.cohort.matrices import Compressed, Dense, Matrix, Root, check_compressed, value_type
from cohortvi.cohort.places import Place

Group = h5py.Group | zarr.Group
SPARSE = ("csr_matrix", "csc_matrix")
COLUMNS = ("", "array", "string", "string-array", "categorical", "nullable-integer", "nullable-boolean",
           "nullable-string-array")  # fmt: skip


def describe(place: Place, obs_columns: Sequence[str], chunk_cells: int) -> Contents:
    """Return what an AnnData file holds, with those of `obs_columns` that it has."""
    root = place.hdf5 if place.format == "h5ad" else place.zarr
    with root() as store:
        obs, var = _frame(place, store, "obs"), _frame(place, store, "var")
        layers = _layers(store)
        layer = pick_layer(place, layers)
        if layer == "raw":
            var = _frame(place, store, "raw/var")
        matrix = _matrix(place, root, store, "raw/X" if layer == "raw" else layer, chunk_cells)
        there = _column_names(obs)
        contents = Contents(
            obs_names=_index(obs),
            obs={name: as_text(_column(obs, name)) for name in obs_columns if name in there},
            obs_columns=there,
            var=pd.DataFrame({name: _column(var, name) for name in _column_names(var)}, index=_index(var)),
            layers=layers,
            matrix=matrix,
        )
    check_shape(place, matrix, len(contents.obs_names), len(contents.var))
    return contents


def _frame(place: Place, store: Group, name: str) -> Group:
    if name not in store or "_index" not in store[name].attrs:
        raise place.fault(
            f"has no data frame {name!r} of AnnData 0.7 or later; it holds {', '.join(store) or 'nothing'}",
            "expected an AnnData file: write it anew with a current anndata, or correct `format` in the sheet",
        )
    return store[name]


def _index(frame: Group) -> np.ndarray:
    return as_text(_column(frame, frame.attrs["_index"]))


def _column_names(frame: Group) -> tuple[str, ...]:
    names = (str(name) for name in frame.attrs["column-order"])
    return tuple(name for name in names if frame[name].attrs.get("encoding-type", "") in COLUMNS)


def _column(frame: Group, name: str) -> np.ndarray | pd.api.extensions.ExtensionArray:
    node = frame[name]
    if "encoding-type" in node.attrs:
        return read_elem(node)
    if "categories" in node.attrs:  # as anndata 0.7 wrote a categorical: codes that refer to their categories
        return pd.Categorical.from_codes(node[:], as_text(frame[node.attrs["categories"]][:]))
    return node[:]


def _layers(store: Group) -> tuple[str, ...]:
    names = ["X", *(f"layers/{name}" for name in store.get("layers", ()))]
    there = [name for name in names if name in store and _is_matrix(store[name])]
    return (*there, "raw") if "raw/X" in store and _is_matrix(store["raw/X"]) else tuple(there)


def _is_matrix(node: Group | h5py.Dataset | zarr.Array) -> bool:
    # An absent X is written as an array without shape.
    return node.attrs.get("encoding-type") in SPARSE or len(getattr(node, "shape", None) or ()) == 2


def _matrix(place: Place, root: Root, store: Group, name: str, band: int) -> Matrix:
    node = store[name]
    encoding = node.attrs.get("encoding-type")
    if encoding not in SPARSE:
        return Dense(place, root, name, node.shape, value_type(place, node.dtype))
    shape = tuple(int(n) for n in node.attrs["shape"])
    check_compressed(place, node, shape[0] if encoding == "csr_matrix" else shape[1])
    dtype = value_type(place, node["data"].dtype)
    if encoding == "csr_matrix":
        return Compressed(place, root, name, shape, dtype)
    return Banded(place, shape, dtype, band, partial(transposed_entries, root, name))
