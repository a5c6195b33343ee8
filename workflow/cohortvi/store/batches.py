"""How a minibatch lies in memory: dense or sparse, as float32 or in the stores' own small types, recycled."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.store.kernels import fill_dense, gather, row_ends
from cohortvi.store.layout import Rows

OUTPUTS = ("dense", "counts", "csr", "csr_counts")

Parts = list[tuple[Rows, np.ndarray]]  # rows of windows, and which of them minibatches hold, in order


class Csr(NamedTuple):
    """Sparse counts (n, g): indptr (n + 1,) int64, indices ascending in each row, data; `n_vars` is g."""

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_vars: int


Counts = torch.Tensor | Csr


class Batches:
    """Lays minibatches of one kind out in memory that is used again; fresh memory costs more than filling it."""

    def __init__(self, output: str, n_vars: int, id_type: np.dtype, count_type: np.dtype):
        """Errors: ValueError for an output that there is not."""
        if output not in OUTPUTS:
            raise ValueError(f"output: found {output!r}; expected one of {', '.join(OUTPUTS)}")
        if output in ("counts", "csr_counts") and count_type.kind != "u":
            raise ValueError(f"output {output!r}: the store holds {count_type}; expected dense or csr")
        self.output, self.n_vars = output, n_vars
        small = output in ("counts", "csr_counts")
        self.count_type = np.dtype(count_type if small else np.float32)
        self.id_type = np.dtype(id_type if small else np.int32)
        self.is_dense = output in ("dense", "counts")
        self.free: list[dict[str, torch.Tensor]] = []

    def bytes_of(self, n_entries: float) -> int:
        """Return the bytes of a cell with so many entries, at least 1."""
        if self.is_dense:
            return max(1, self.n_vars * self.count_type.itemsize)
        return max(1, round(n_entries * (self.id_type.itemsize + self.count_type.itemsize)))

    def take(self) -> dict[str, torch.Tensor]:
        """Return memory for a group of minibatches; give it back by `release` when they are no longer looked at."""
        return self.free.pop() if self.free else {}

    def release(self, memory: dict[str, torch.Tensor]) -> None:
        """Take memory back, to be written over."""
        self.free.append(memory)

    def lay_out(self, parts: Parts, sizes: Sequence[int], memory: dict[str, torch.Tensor]) -> list[Counts]:
        """Return the counts of minibatches of these sizes, in `memory`: the rows of `parts`, in order."""
        return self._dense(parts, sizes, memory) if self.is_dense else self._sparse(parts, sizes, memory)

    def _dense(self, parts: Parts, sizes: Sequence[int], memory: dict[str, torch.Tensor]) -> list[Counts]:
        x_ng = _room(memory, "x", sum(sizes) * self.n_vars, self.count_type).view(-1, self.n_vars)
        filled, array = 0, x_ng.numpy()
        for rows, places in parts:
            fill_dense(*rows, places, array[filled : filled + len(places)])
            filled += len(places)
        return list(x_ng.split(sizes))

    def _sparse(self, parts: Parts, sizes: Sequence[int], memory: dict[str, torch.Tensor]) -> list[Counts]:
        ends, filled = np.zeros(sum(sizes) + 1, np.int64), 0
        for rows, places in parts:
            row_ends(rows.indptr, places, ends[filled:])
            filled += len(places)
        indices = _room(memory, "indices", int(ends[-1]), self.id_type)
        data = _room(memory, "data", int(ends[-1]), self.count_type)
        to_indices, to_data, filled = indices.numpy(), data.numpy(), 0
        for rows, places in parts:
            gather(*rows, places, ends[filled:], to_indices, to_data)
            filled += len(places)
        bounds = np.cumsum([0, *sizes]).tolist()
        lengths = np.diff(ends[bounds]).tolist()
        indptrs = [torch.from_numpy(ends[begin : end + 1] - ends[begin]) for begin, end in pairwise(bounds)]
        arrays = zip(indptrs, indices.split(lengths), data.split(lengths), strict=True)
        return [Csr(*of_batch, self.n_vars) for of_batch in arrays]

    def copied(self, counts: Counts) -> Counts:
        """Return counts in memory of their own."""
        if isinstance(counts, Csr):
            return counts._replace(indices=counts.indices.clone(), data=counts.data.clone())
        return counts.clone()


def _room(memory: dict[str, Any], name: str, size: int, dtype: np.dtype) -> torch.Tensor:
    """Return the first `size` values of a tensor of the memory, made larger if need be; pinned where there is a GPU."""
    if name not in memory or len(memory[name]) < size:
        room = torch.from_numpy(np.empty(size + size // 32, dtype))  # by numpy: in huge pages
        memory[name] = room.pin_memory() if torch.cuda.is_available() else room
    return memory[name][:size]
