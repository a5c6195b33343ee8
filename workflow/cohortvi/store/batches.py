"""How a minibatch lies in memory: dense or sparse, as float32 or in the stores' own small types, recycled."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.store.kernels import fill_share, gather_share, row_ends
from cohortvi.store.layout import Rows

OUTPUTS = ("dense", "counts", "csr", "csr_counts")

SHARE_BYTES, SPARSE_SHARE_BYTES = 2**22, 2**20  # of minibatches, laid out by a thread at a time


class Csr(NamedTuple):
    """Sparse counts (n, g): indptr (n + 1,) int64, indices ascending in each row, data; `n_vars` is g."""

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_vars: int


Counts = torch.Tensor | Csr


class Batches:
    """Lays minibatches of one kind out in memory that is used again; fresh memory costs more than filling it."""

    def __init__(self, output: str, n_vars: int, id_type: np.dtype, count_type: np.dtype, *, copy: bool):
        """`copy`: each minibatch gets memory of its own. Errors: ValueError for an output that there is not."""
        if output not in OUTPUTS:
            raise ValueError(f"output: found {output!r}; expected one of {', '.join(OUTPUTS)}")
        if output in ("counts", "csr_counts") and count_type.kind != "u":
            raise ValueError(f"output {output!r}: the store holds {count_type}; expected dense or csr")
        self.n_vars, self.copy = n_vars, copy
        small = output in ("counts", "csr_counts")
        self.count_type = np.dtype(count_type if small else np.float32)
        self.id_type = np.dtype(id_type if small else np.int32)
        self.is_dense = output in ("dense", "counts")
        self.memory: dict[str, torch.Tensor] = {}

    def bytes_of(self, n_entries: float) -> int:
        """Return the bytes of a cell with so many entries, at least 1."""
        if self.is_dense:
            return max(1, self.n_vars * self.count_type.itemsize)
        return max(1, round(n_entries * (self.id_type.itemsize + self.count_type.itemsize)))

    def begin(self, size: int, pool: ThreadPoolExecutor, threads: int) -> "_Dense | _Sparse":
        """Return minibatches of so many cells together, to be laid out where the last ones lay.

        Idle ones of the pool's `threads` take a share of many.
        """
        if self.copy:
            self.memory = {}
        return (_Dense if self.is_dense else _Sparse)(self, size, _Helpers(pool, threads))

    def room(self, name: str, size: int, dtype: np.dtype, keep: int = 0) -> torch.Tensor:
        """Return room for so many values, the same as before if it is enough; pinned where there is a GPU.

        `keep`: so many values that lie there stay.
        """
        if name not in self.memory or len(self.memory[name]) < size:
            old, room = self.memory.get(name), torch.from_numpy(np.empty(size + size // 32, dtype))  # in huge pages
            self.memory[name] = room.pin_memory() if torch.cuda.is_available() and not self.copy else room
            if keep:
                self.memory[name][:keep] = old[:keep]
        return self.memory[name][:size]


class _Helpers(NamedTuple):
    """Threads that may have nothing else to do."""

    pool: ThreadPoolExecutor
    threads: int

    def share(self, kernel: Callable, csr: Rows, rows: np.ndarray, to: Any, cells: int) -> None:
        """Have a kernel lay out rows, so many cells at a time, by this thread and those that are idle."""
        given = (tuple(csr), rows, to, np.zeros(1, np.int64), cells)
        helpers = [self.pool.submit(kernel, *given) for _ in range(self.threads if len(rows) >= 2 * cells else 0)]
        kernel(*given)
        for helper in helpers:
            if not helper.cancel():
                helper.result()


class _Dense:
    """Dense minibatches that are being laid out."""

    def __init__(self, batches: Batches, size: int, helpers: _Helpers):
        self.x_ng = batches.room("x", size * batches.n_vars, batches.count_type).view(size, batches.n_vars)
        self.array, self.filled, self.helpers = self.x_ng.numpy(), 0, helpers
        self.cells = max(1, SHARE_BYTES // batches.bytes_of(0))

    def add(self, rows: Rows, places: np.ndarray) -> None:
        """Lay out the rows of a window at these places."""
        x_ng = self.array[self.filled : self.filled + len(places)]
        self.helpers.share(fill_share, rows, places, x_ng, self.cells)
        self.filled += len(places)

    def end(self, ends: list[int]) -> list[torch.Tensor]:
        """Return minibatches that end at these rows."""
        return [self.x_ng[start:stop] for start, stop in pairwise(ends)]


class _Sparse:
    """Sparse minibatches that are being laid out."""

    def __init__(self, batches: Batches, size: int, helpers: _Helpers):
        self.batches, self.helpers, self.ends, self.filled = batches, helpers, np.zeros(size + 1, np.int64), 0
        self.arrays = batches.room("indices", 0, batches.id_type), batches.room("data", 0, batches.count_type)

    def add(self, rows: Rows, places: np.ndarray) -> None:
        """Lay out the rows of a window at these places."""
        ends, b = self.ends[self.filled : self.filled + len(places) + 1], self.batches
        row_ends(rows.indptr, places, ends)
        keep, nnz = int(ends[0]), int(ends[-1])
        # Of a second window: what was laid out of the first stays.
        self.arrays = b.room("indices", nnz, b.id_type, keep), b.room("data", nnz, b.count_type, keep)
        to = (ends, *(array.numpy() for array in self.arrays))
        cells = max(1, SPARSE_SHARE_BYTES // b.bytes_of((nnz - keep) / max(len(places), 1)))
        self.helpers.share(gather_share, rows, places, to, cells)
        self.filled += len(places)

    def end(self, ends: list[int]) -> list[Csr]:
        """Return minibatches that end at these rows."""
        minibatches = []
        for start, stop in pairwise(ends):
            indptr = self.ends[start : stop + 1]
            begin, end = indptr[0], indptr[-1]
            arrays = (array[begin:end] for array in self.arrays)
            minibatches.append(Csr(torch.from_numpy(indptr - begin), *arrays, self.batches.n_vars))
        return minibatches
