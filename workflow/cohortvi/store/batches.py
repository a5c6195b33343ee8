"""How a minibatch lies in memory: dense or sparse, as float32 or in the stores' own small types, recycled."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.store.kernels import fill_dense, gather
from cohortvi.store.layout import Rows

OUTPUTS = ("dense", "counts", "csr", "csr_counts")

Parts = list[tuple[Rows, np.ndarray]]  # rows of windows, and which of them a minibatch holds, in order


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
        self.output, self.n_vars = output, n_vars
        small = output in ("counts", "csr_counts")
        self.count_type = np.dtype(count_type if small else np.float32)
        self.id_type = np.dtype(id_type if small else np.int32)
        self.is_dense = output in ("dense", "counts")
        self.free: list[dict[str, torch.Tensor]] = []

    def take(self) -> dict[str, torch.Tensor]:
        """Return memory for a group of minibatches; give it back by `release` when they are no longer looked at."""
        return self.free.pop() if self.free else {}

    def release(self, memory: dict[str, torch.Tensor]) -> None:
        """Take memory back, to be written over."""
        self.free.append(memory)

    def lay_out(self, group: list[Parts], memory: dict[str, torch.Tensor]) -> list[Counts]:
        """Return the counts of each minibatch of a group, in `memory`."""
        sizes = [sum(len(places) for _, places in parts) for parts in group]
        ends = np.cumsum([0, *sizes])
        spans = [slice(begin, end) for begin, end in pairwise(ends.tolist())]
        return self._dense(group, spans, memory) if self.is_dense else self._sparse(group, spans, memory)

    def _dense(self, group: list[Parts], spans: list[slice], memory: dict[str, torch.Tensor]) -> list[Counts]:
        x_ng = _room(memory, "x", spans[-1].stop * self.n_vars, self.count_type).view(-1, self.n_vars)
        filled, array = 0, x_ng.numpy()
        for parts in group:
            for rows, places in parts:
                fill_dense(*rows, places, array[filled : filled + len(places)])
                filled += len(places)
        return [x_ng[span] for span in spans]

    def _sparse(self, group: list[Parts], spans: list[slice], memory: dict[str, torch.Tensor]) -> list[Counts]:
        lengths = [rows.indptr[places + 1] - rows.indptr[places] for parts in group for rows, places in parts]
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
        indices = _room(memory, "indices", int(ends[-1]), self.id_type)
        data = _room(memory, "data", int(ends[-1]), self.count_type)
        filled = 0
        for parts in group:
            for rows, places in parts:
                gather(*rows, places, ends[filled:], indices.numpy(), data.numpy())
                filled += len(places)
        made = []
        for span in spans:
            first, last = int(ends[span.start]), int(ends[span.stop])
            indptr = torch.from_numpy(ends[span.start : span.stop + 1] - first)
            made.append(Csr(indptr, indices[first:last], data[first:last], self.n_vars))
        return made

    def copied(self, counts: Counts) -> Counts:
        """Return counts in memory of their own."""
        if isinstance(counts, Csr):
            return counts._replace(indices=counts.indices.clone(), data=counts.data.clone())
        return counts.clone()


def _room(memory: dict[str, Any], name: str, size: int, dtype: np.dtype) -> torch.Tensor:
    """Return the first `size` values of a tensor of the memory, made larger if need be; pinned where there is a GPU."""
    if name not in memory or len(memory[name]) < size:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        memory[name] = torch.empty(size + size // 16, dtype=kind, pin_memory=torch.cuda.is_available())
    return memory[name][:size]
