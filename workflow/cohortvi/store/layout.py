"""The layout that counts/ and shards/ share: an AnnData group in zarr v3, counts as compact CSR, written as a stream.

indices are uint16 (uint32 above 65,535 genes), stored as differences; data the smallest unsigned integer that holds
the largest count; indptr int64. Rows are sorted by gene and hold no zero. The manifest stands in the root's attributes
and, as JSON, beside the store, so that the two can be told to belong together. Metadata is consolidated: stray files
in the folder are never looked at.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec
from zarr.codecs.numcodecs import Delta
from zarr.errors import ZarrUserWarning

from cohortvi.files import digest, remove, replacing
from cohortvi.store.kernels import first_bad_row

CHUNK = 32_768  # elements decoded together
SHARD = 256 * CHUNK  # elements a file
OBS_CHUNK = 8_192  # cells of an obs column decoded together; a column is one file
MAX_COUNT = 2**32 - 1


class Rows(NamedTuple):
    """CSR arrays of consecutive rows: indptr int64 from 0; indices and data unsigned."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


@contextmanager
def quiet() -> Iterator[None]:
    """Silence zarr on what this layout does on purpose: numcodecs.delta and consolidated metadata, in no spec yet."""
    with warnings.catch_warnings():
        for text in ("Numcodecs codecs are not in the Zarr", "Consolidated metadata is currently not part"):
            warnings.filterwarnings("ignore", text, ZarrUserWarning)
        yield


class _Array:
    """An array of unknown length, written a whole shard at a time since a part of a shard cannot be added to it."""

    def __init__(
        self, group: zarr.Group, folder: Path, name: str, dtype: str, *, delta: bool = False, grows: bool = False
    ):
        """`delta`: store differences; `grows`: uint32 values lie in the smallest unsigned type, from `dtype` on."""
        self.group, self.folder, self.name, self.delta, self.grows = group, folder, name, delta, grows
        self.dtype = np.dtype(dtype)
        self.buffer, self.filled = np.empty(SHARD, np.uint32 if grows else dtype), 0
        self.array: zarr.Array | None = None
        self.sha = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        # Digests are of the values, whatever type and chunks they lie in.
        self.sha.update(np.ascontiguousarray(values, "<i8" if self.dtype.kind == "i" else "<u4"))
        while len(values):
            taken = min(len(values), SHARD - self.filled)
            self.buffer[self.filled : self.filled + taken] = values[:taken]
            self.filled, values = self.filled + taken, values[taken:]
            if self.filled == SHARD:
                self._flush()

    def close(self) -> None:
        if self.filled or self.array is None:
            self._flush()

    def _flush(self) -> None:
        values, self.filled = self.buffer[: self.filled], 0
        if self.grows and len(values):
            self._fit(np.promote_types(self.dtype, np.min_scalar_type(values.max())))
        if self.array is None:
            self.array = self._create(self.name, len(values))
        self.array.append(values.astype(self.dtype))

    def _fit(self, dtype: np.dtype) -> None:
        if dtype == self.dtype:
            return
        self.dtype, narrow = dtype, self.array
        if narrow is not None:
            wide = self._create("wide", SHARD)
            for start in range(0, narrow.size, SHARD):
                wide.append(narrow[start : start + SHARD].astype(dtype))
            remove(self.folder / self.name)
            (self.folder / "wide").rename(self.folder / self.name)
            self.array = self.group[self.name]

    def _create(self, name: str, length: int) -> zarr.Array:
        """Create the array; `length` is that of its first piece, all of it if that is less than a shard."""
        chunk = min(max(length, 1), CHUNK)
        return self.group.create_array(
            name,
            shape=(0,),
            dtype=self.dtype,
            chunks=(chunk,),
            shards=(max(-(-length // chunk), 1) * chunk,),
            filters=[Delta(dtype=self.dtype.str)] if self.delta else None,
            compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")],
            fill_value=0,
        )


def write_store(
    blocks: Iterable[Rows], obs: pd.DataFrame, var: pd.DataFrame, path: str | Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write rows, in order, as the store `path`, and return its manifest; `facts` are added to it.

    Memory: a block, and a shard of elements. The store appears under its name when it is whole. Errors: ValueError if
    the blocks and obs differ in number of cells, a name stands twice, or a block is not as the layout wants it.
    """
    path, obs = Path(path), with_categories(obs)
    check_names(obs, var, path)
    with replacing(path) as partial, quiet():
        root = zarr.open_group(partial, mode="w", zarr_format=3)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        manifest = {**write_x(blocks, root, partial, (len(obs), len(var))), **_describe(obs, var), **facts}
        size = max(min(len(obs), OBS_CHUNK), 1)
        whole = max(-(-len(obs) // size), 1) * size
        ad.io.write_elem(root, "obs", obs, dataset_kwargs={"chunks": (size,), "shards": (whole,)})
        with ad.settings.override(auto_shard_zarr_v3=True):
            ad.io.write_elem(root, "var", var)
        root.attrs["manifest"] = manifest
        zarr.consolidate_metadata(partial)
    return manifest


def with_categories(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its columns of text as categoricals, categories sorted."""
    text = [name for name, column in obs.items() if pd.api.types.is_object_dtype(column)]
    text += [name for name, column in obs.items() if isinstance(column.dtype, pd.StringDtype)]
    return obs.astype(dict.fromkeys(text, "category"))


def check_names(obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> None:
    """Raise ValueError if a cell or a gene stands twice."""
    for what, index in (("cell", obs.index), ("gene", var.index)):
        if not index.is_unique:
            raise ValueError(f"{path}: {what} {index[index.duplicated()][0]!r} stands twice; expected unique names")


def id_type(n_vars: int) -> str:
    """Return the type of gene ids."""
    return "uint16" if n_vars <= np.iinfo(np.uint16).max else "uint32"


def write_x(
    blocks: Iterable[Rows], root: zarr.Group, folder: Path, shape: tuple[int, int], dtype: str | None = None
) -> dict[str, Any]:
    """Write rows as X of the group that lies in `folder`; return nnz, dtype and the digest of the content.

    `dtype`: None for the compact types of this layout, otherwise the type of the counts, with int32 ids as they are.
    """
    encoding = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)}
    place = (root.create_group("X", attributes=encoding), folder / "X")
    indices = _Array(*place, "indices", "int32" if dtype else id_type(shape[1]), delta=dtype is None)
    data = _Array(*place, "data", dtype or "uint8", grows=dtype is None)
    indptr = _Array(*place, "indptr", "int64")
    lengths = [np.zeros(1, np.int64)]
    for block in blocks:
        bad = first_bad_row(*block, shape[1])
        if bad >= 0:
            row = sum(map(len, lengths)) - 1 + bad
            found = f"row {row} has a zero, an unsorted gene or one beyond the {shape[1]} of var"
            raise ValueError(f"{folder.with_suffix('')}: {found}; expected rows sorted by gene, without zeros")
        indices.append(block.indices)
        data.append(block.data)
        lengths.append(np.diff(block.indptr))
    ends = np.cumsum(np.concatenate(lengths))
    if len(ends) != shape[0] + 1:
        found = f"{len(ends) - 1} rows of counts for the {shape[0]} cells of obs"
        raise ValueError(f"{folder.with_suffix('')}: {found}; expected as many rows as cells")
    indptr.append(ends)
    for array in (indices, data, indptr):
        array.close()
    content = digest(list(shape), *(array.sha.hexdigest() for array in (indptr, indices, data)))
    return {"nnz": int(ends[-1]), "dtype": data.dtype.name, "content": content}


def _describe(obs: pd.DataFrame, var: pd.DataFrame) -> dict[str, Any]:
    columns = {
        name: digest(column.cat.categories.astype(str).tolist()) if is_categorical(column) else column.dtype.name
        for name, column in obs.items()
    }
    sizes = {"n_obs": len(obs), "n_vars": len(var)}
    return {**sizes, "genes": digest(var.index.tolist()), "obs": _table_digest(obs), "columns": columns}


def _table_digest(table: pd.DataFrame) -> str:
    parts: list[Any] = [table.index.tolist()]
    for name, column in table.items():
        if is_categorical(column):
            parts += [name, column.cat.categories.astype(str).tolist(), column.cat.codes.to_numpy(np.int64)]
        else:
            parts += [name, column.to_numpy()]
    return digest(*parts)


def is_categorical(column: pd.Series) -> bool:
    """Say whether a column is categorical."""
    return isinstance(column.dtype, pd.CategoricalDtype)
