"""Matrices on disk, read as ranges of rows (cells) in CSR without ever being held whole.

A matrix opens its file for each block and closes it again, so that it can be read by any thread and leaves nothing
open. What a reader returns has sorted indices, each once, in the file's own numbers, within the matrix's shape.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import h5py
import numpy as np
import scipy.sparse as sp
import zarr

from cohortvi.cohort.places import InputError, Place

DENSE_BYTES = 1 << 26  # of a dense matrix held at a time, unless its chunks are larger
GAP = 128  # rows that are read and thrown away rather than begin another read

Node = h5py.Group | h5py.Dataset | zarr.Group | zarr.Array
Root = Callable[[], AbstractContextManager[h5py.File | zarr.Group]]
Reader = Callable[[int, int], sp.csr_matrix]


class Matrix(Protocol):
    """n cells x g features, read by `with matrix.open() as read: block = read(start, stop)`."""

    shape: tuple[int, int]
    dtype: np.dtype

    def open(self) -> AbstractContextManager[Reader]:
        """Open the file; what is yielded reads rows from start to before stop."""

    def peek(self) -> np.ndarray:
        """Return the first few stored values."""


def read_rows(matrix: Matrix, rows: np.ndarray, features: np.ndarray | None, most: int) -> sp.csr_matrix:
    """Return the given rows (ascending), with the given features (ascending; None: all).

    At most `most` rows of the file are held beside those asked for.
    """
    blocks = []
    with matrix.open() as read:
        for i, j in spans(rows, most):
            block = read(rows[i], rows[j - 1] + 1)
            blocks.append(block if block.shape[0] == j - i else block[rows[i:j] - rows[i]])
    block = blocks[0] if len(blocks) == 1 else sp.vstack(blocks, format="csr")
    return block if features is None else block[:, features]


def spans(rows: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cut ascending rows into runs of positions that span at most `most` rows and skip gaps of more than GAP."""
    i = 0
    while i < len(rows):
        j = int(np.searchsorted(rows, rows[i] + most))
        gaps = np.flatnonzero(np.diff(rows[i:j]) > GAP)
        j = i + int(gaps[0]) + 1 if len(gaps) else j
        yield i, j
        i = j


def value_type(place: Place, dtype: np.dtype) -> np.dtype:
    """Return the type in which scipy can hold a file's values, every one exactly; InputError if they are no numbers."""
    if np.dtype(dtype).kind not in "biuf":
        raise place.fault(f"holds values of type {dtype}", "expected numbers: set `layer` to a matrix of raw counts")
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype).newbyteorder("=")


@dataclass(frozen=True)
class Compressed:
    """Rows stored one after another, as data, indices and indptr of a group: CSR, or CSC of the transpose."""

    place: Place
    root: Root
    node: str
    shape: tuple[int, int]
    dtype: np.dtype

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the file for reading rows."""
        with self.root() as root:
            yield partial(self._read, root[self.node])

    def peek(self) -> np.ndarray:
        """Return the first few stored values."""
        with self.root() as root:
            return np.asarray(root[self.node]["data"][:1000])

    def _read(self, node: Node, start: int, stop: int) -> sp.csr_matrix:
        ends = np.asarray(node["indptr"][start : stop + 1]).astype(np.int64)
        data = np.asarray(node["data"][ends[0] : ends[-1]]).astype(self.dtype, copy=False)
        indices = np.asarray(node["indices"][ends[0] : ends[-1]])
        if (np.diff(ends) < 0).any() or not len(data) == len(indices) == ends[-1] - ends[0]:
            raise _damaged(self.place, f"rows {start} to {stop} whose row pointer does not fit their values")
        check_within(self.place, indices, self.shape[1], "gene")
        block = sp.csr_matrix((data, indices.astype(np.int32), ends - ends[0]), (stop - start, self.shape[1]))
        block.sum_duplicates()
        return block


@dataclass(frozen=True)
class Dense:
    """A dense array; `transposed` if it lies as genes x cells."""

    place: Place
    root: Root
    node: str
    shape: tuple[int, int]
    dtype: np.dtype
    transposed: bool = False

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the file for reading rows."""
        with self.root() as root:
            yield partial(self._read, root[self.node])

    def peek(self) -> np.ndarray:
        """Return the values of the first few cells."""
        with self.open() as read:
            return read(0, min(4, self.shape[0])).data

    def _read(self, node: Node, start: int, stop: int) -> sp.csr_matrix:
        step = self._step(node)
        edges = [start, *range((start // step + 1) * step, stop, step), stop]
        return sp.vstack([self._part(node, a, b) for a, b in pairwise(edges)], format="csr")

    def _step(self, node: Node) -> int:
        # Whole chunks at a time, so that none is decoded twice.
        chunk = node.chunks[1 if self.transposed else 0] if node.chunks else 1
        rows = DENSE_BYTES // max(1, self.shape[1] * self.dtype.itemsize)
        return max(rows // chunk, 1) * chunk

    def _part(self, node: Node, start: int, stop: int) -> sp.csr_matrix:
        part = node[:, start:stop].T if self.transposed else node[start:stop]
        return sp.csr_matrix(np.asarray(part, dtype=self.dtype))


def check_compressed(place: Place, group: Node, n_major: int) -> None:
    """Raise InputError unless data, indices and indptr fit each other and the number of rows (CSR) or columns (CSC)."""
    data, indices, indptr = (group[name] for name in ("data", "indices", "indptr"))
    last = int(indptr[-1:][0]) if indptr.shape[0] else -1
    if indptr.shape[0] != n_major + 1 or not last == data.shape[0] == indices.shape[0]:
        raise _damaged(
            place,
            f"{data.shape[0]} values, {indices.shape[0]} indices and a pointer of length {indptr.shape[0]} "
            f"to {last} for {n_major} rows or columns",
        )
    for name, array in (("data", data), ("indices", indices)):
        # zarr reads a chunk that is not there as zeros, and so would an interrupted copy be read as no counts.
        if place.is_local and isinstance(array, zarr.Array) and array.nchunks_initialized < array.nchunks:
            found = f"{array.nchunks_initialized} of the {array.nchunks} chunks of {group.name.strip('/')}/{name}"
            raise _damaged(place, found)


def check_within(place: Place, indices: np.ndarray, n: int, what: str) -> None:
    """Raise InputError unless all indices lie from 0 to before n."""
    if len(indices) and (indices.min() < 0 or indices.max() >= n):
        worst = indices.min() if indices.min() < 0 else indices.max()
        raise _damaged(place, f"an entry for {what} {worst} (counted from 0) of {n}")


def _damaged(place: Place, found: str) -> InputError:
    return place.fault(f"is damaged: it holds {found}", "expected a whole file: copy or write it anew")
