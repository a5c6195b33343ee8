"""counts/{sample}.zarr: the counts of one sample's kept cells, in the order of its file.

A store is read through its manifest, the JSON file beside it: `CountsReader` opens stores of this layout, shards
included, and refuses one that its manifest does not describe or whose rows cannot be what was written.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from cohortvi.files import digest
from cohortvi.store.arrays import ArrayReader, arrays_of
from cohortvi.store.kernels import map_genes, rise, sort_rows
from cohortvi.store.layout import MAX_COUNT, PLAIN, Rows, id_type, quiet, repair, table_digest, write_store, write_x

REWRITE = "write it again with the program that made it"  # stores of others


def write_counts(
    blocks: Iterable[sp.csr_matrix], obs: pd.DataFrame, var: pd.DataFrame, path: str | Path, *, sample: str
) -> dict[str, Any]:
    """Write a sample's blocks of rows (n, g), in order, as the store `path`, and return its manifest.

    Blocks: whole numbers, sorted by gene, without zeros. obs: a row per cell with `row`, the cell's row in the raw
    store; text becomes categorical. No cell at all is a valid store. Errors: ValueError if blocks, obs and var do not
    fit together, or a value is no count.
    """
    if len(obs) and "row" not in obs:
        raise ValueError(f"{path}: obs has no column 'row'; expected each cell's row in the raw store")
    rows = (_as_rows(block, len(var), path) for block in blocks)
    return write_store(rows, obs, var, path, {"samples": {sample: len(obs)}})


def _as_rows(block: sp.csr_matrix, n_vars: int, path: str | Path, largest: int = MAX_COUNT) -> Rows:
    data = block.data
    if block.shape[1] != n_vars:
        raise ValueError(f"{path}: a block has {block.shape[1]} genes; expected the {n_vars} of var")
    if data.dtype.kind not in "ui" or (len(data) and not 0 <= data.min() <= data.max() <= largest):
        raise ValueError(f"{path}: a block of type {data.dtype} holds values that are no counts up to {largest}")
    return Rows(block.indptr.astype(np.int64), block.indices.astype(np.uint32), data.astype(np.uint32))


def write_anndata(adata: ad.AnnData, path: str | Path) -> None:
    """Write an AnnData as zarr v3, sharded, metadata consolidated: stray files in the folder do not disturb readers."""
    with quiet(), ad.settings.override(auto_shard_zarr_v3=True):
        root = zarr.open_group(path, mode="w", zarr_format=3)
        ad.io.write_elem(root, "/", adata)
        zarr.consolidate_metadata(path)


def write_stream(blocks: Iterable[sp.csr_matrix], frame: ad.AnnData, path: str | Path, dtype: type) -> None:
    """Write `frame`, an AnnData without X, with the blocks of rows (n, g), in order, as its X of type `dtype`.

    X is CSR of plain types and codecs: any reader of AnnData opens it. Memory: a block, and a chunk of each array.
    Errors: ValueError if blocks and frame do not fit together, or a value is no count up to the largest of `dtype`.
    """
    largest = min(np.iinfo(dtype).max, MAX_COUNT)
    rows = (_as_rows(block, frame.n_vars, path, largest) for block in blocks)
    with quiet(), ad.settings.override(auto_shard_zarr_v3=True):
        root = zarr.open_group(path, mode="w", zarr_format=3)
        ad.io.write_elem(root, "/", frame)
        write_x(rows, root, Path(path), frame.shape, PLAIN, np.dtype(dtype).name)
        zarr.consolidate_metadata(path)


class CountsReader:
    """A store of counts, read by ranges of rows; opening reads metadata and the last row's end alone.

    With `genes`, rows come over these in their order, and those that the store does not have count 0.
    """

    def __init__(
        self, path: str | Path, root: zarr.Group, manifest: dict[str, Any], genes: Sequence[str] | None = None
    ):
        """`root`: the group that lies at `path`; store/opening.py opens it and has its manifest."""
        self.path, self.root, self.manifest = path, root, manifest
        self.n_obs, self.n_vars = manifest["n_obs"], manifest["n_vars"]
        self.indptr, self.indices, self.data = (
            ArrayReader(self.root[f"X/{name}"]) for name in ("indptr", "indices", "data")
        )
        self.id_type, self.count_type = np.dtype(id_type(self.n_vars)), _count_type(self.data.dtype)
        self.column_readers: dict[str, ArrayReader] = {}
        self.is_mapped, self.genes = False, None
        self._check_shape()
        if genes is not None:
            self.genes = pd.Index(genes, dtype=object)
            for names, what in ((self.genes, "the genes asked for"), (self.var.index, "its genes")):
                if not names.is_unique:
                    twice = names[names.duplicated()][0]
                    raise ValueError(f"{path}: {what} name {twice!r} twice; expected unique names, to join by")
            self.place = self.genes.get_indexer(self.var.index).astype(np.int32)
            self.n_vars, self.is_mapped = len(genes), not np.array_equal(self.place, np.arange(len(genes)))

    @property
    def is_own(self) -> bool:
        """Whether this program wrote the store, so that what passes its checksums is sound."""
        return bool(self.manifest["obs"])

    @property
    def is_remote(self) -> bool:
        """Whether the store lies behind a URL."""
        return self.data.folder is None

    def _check_shape(self) -> None:
        with self._reading("the last row's end"):
            (last,) = self.indptr.read(self.indptr.size - 1, self.indptr.size).tolist()
            sizes = (self.indptr.size - 1, last, self.indices.size, self.data.size)
        expected = (self.n_obs, *[self.manifest["nnz"]] * 3)
        if sizes != expected:
            found = f"rows, end of the last row, ids and counts number {sizes}"
            raise ValueError(f"{self.path}: {found}; expected {expected}; {repair(self.path)}")

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        # Of a damaged chunk, zarr and its codecs raise any of these.
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            found = f"{what} cannot be read ({'; '.join([str(error), *getattr(error, '__notes__', [])])})"
            advice = repair(self.path) if self.is_own else REWRITE
            raise ValueError(f"{self.path}: {found}; the store is damaged: {advice}") from error

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The table of the cells, all columns; ValueError if it is not that of the manifest."""
        return self._table("obs")

    @cached_property
    def var(self) -> pd.DataFrame:
        """The table of the store's own genes; ValueError if it is not that of the manifest."""
        return self._table("var")

    def _table(self, name: str) -> pd.DataFrame:
        written = self.manifest[name]  # "" for stores of others
        with self._reading(name):
            for array in arrays_of(self.root[name]) if written else ():
                array.check_files()  # of one that is lost or cut, zarr would make zeros and empty strings
            table = ad.io.read_elem(self.root[name])
            if written and table_digest(table) != written:
                raise ValueError("it is not the table that was written")
        return table

    @property
    def var_names(self) -> pd.Index:
        """The names of the genes that rows come over."""
        return self.var.index if self.genes is None else self.genes

    def categories(self, column: str) -> list[str] | None:
        """Return the categories of a categorical column of obs; None if it is not categorical."""
        element = self.root[f"obs/{column}"]
        if not isinstance(element, zarr.Group):
            return None
        with self._reading(f"column {column!r}"):
            found = [str(value) for value in element["categories"][:]]
            if digest(found) != self.manifest["columns"][column]:
                raise ValueError("its categories are not those that were written")
        return found

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows start:stop of a column of obs: codes int64 if it is categorical, otherwise float32.

        Errors: ValueError if a value is missing.
        """
        values = self.raw_column(name, start, stop)
        is_categorical = isinstance(self.root[f"obs/{name}"], zarr.Group)
        if (values.min(initial=0) < 0) if is_categorical else not np.isfinite(values).all():
            raise ValueError(f"{self.path}: column {name!r} has no value for some cells; expected one for every cell")
        return values.astype(np.int64 if is_categorical else np.float32)

    def raw_column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows start:stop of a column of obs as they lie: codes, -1 where one is missing, or numbers."""
        with self._reading(f"column {name!r}"):
            return self._column_reader(name).read(start, stop)

    def _column_reader(self, name: str) -> ArrayReader:
        if name not in self.column_readers:
            element = self.root[f"obs/{name}"]
            self.column_readers[name] = ArrayReader(element["codes"] if isinstance(element, zarr.Group) else element)
        return self.column_readers[name]

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Return where rows start:stop begin and end among the store's entries, int64 (stop - start + 1,)."""
        with self._reading(f"cells {start} to {stop}"):
            ends = self.indptr.read(start, stop + 1).astype(np.int64, copy=False)
            if not rise(ends, self.manifest["nnz"]):
                raise ValueError("row ends do not rise")
        return ends

    def read_into(self, start: int, ends: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Write ids and counts of the rows from `start` on, whose `ends` are given, into arrays of their size.

        Errors: ValueError if they cannot be what was written.
        """
        entries = (int(ends[0]), int(ends[-1]))
        with self._reading(f"cells {start} to {start + len(ends) - 1}"):
            for reader, out, largest in ((self.indices, indices, self.manifest["n_vars"] - 1), (self.data, data, None)):
                if out.dtype == reader.dtype and reader.checked and self.is_own:
                    reader.read(*entries, out)
                else:
                    out[:] = _in_range(reader.read(*entries), out.dtype, largest)
            if not self.is_own and (twice := sort_rows(ends, indices, data)) >= 0:
                raise ValueError(f"cell {start + twice} has a gene twice")

    def is_native(self, id_type: np.dtype, count_type: np.dtype) -> bool:
        """Whether compiled code can do as `ends` and, into arrays of these types, as `read_into` does."""
        is_same = (self.indices.dtype, self.data.dtype, self.indptr.dtype) == (id_type, count_type, np.int64)
        return is_same and self.is_own and all(array.is_native for array in (self.indptr, self.indices, self.data))

    def read(self, start: int, stop: int) -> Rows:
        """Return rows start:stop in compact types; ValueError if they cannot be what was written."""
        ends = self.ends(start, stop)
        size = int(ends[-1] - ends[0])
        rows = Rows(ends - ends[0], np.empty(size, self.id_type), np.empty(size, self.count_type))
        self.read_into(start, ends, rows.indices, rows.data)
        return self._over_genes(rows) if self.is_mapped else rows

    def _over_genes(self, rows: Rows) -> Rows:
        indices, data = np.empty(len(rows.indices), id_type(self.n_vars)), np.empty_like(rows.data)
        ends = map_genes(tuple(rows), self.place, indices, data)
        return Rows(ends, indices[: ends[-1]], data[: ends[-1]])

    def chunks(self, size: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (first row, counts of up to `size` rows as uint32 CSR with int32 ids), in order."""
        for start in range(0, self.n_obs, size):
            indptr, indices, data = self.read(start, min(start + size, self.n_obs))
            arrays = (data.astype(np.uint32), indices.astype(np.int32), indptr)
            yield start, sp.csr_matrix(arrays, shape=(len(indptr) - 1, self.n_vars))


def _count_type(dtype: np.dtype) -> np.dtype:
    """Return the type that counts come in: their own if it is unsigned."""
    return {"u": dtype, "f": np.dtype(np.float32)}.get(dtype.kind, np.dtype(np.uint32))


def _in_range(values: np.ndarray, dtype: np.dtype, largest: int | None) -> np.ndarray:
    """Return values that other programs wrote; ValueError if the type cannot hold them or one is too large."""
    if dtype.kind == "u" and len(values):
        bound = np.iinfo(dtype).max if largest is None else largest
        if values.min() < 0 or values.max() > bound:
            raise ValueError(f"values from {values.min()} to {values.max()}, where 0 to {bound} should be")
    return values
