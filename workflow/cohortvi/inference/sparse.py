"""Counts of a minibatch: dense, as the sparse rows that the compiled loops take, or as the kernels of a GPU do."""

import threading
from typing import NamedTuple

import numba
import torch
from torch import Tensor

from cohortvi.inference import first_layer


class SparseCounts(NamedTuple):
    """Counts (n, g) as CSR on a CPU, with what is made of them once; `sparse_counts` makes one."""

    indptr: Tensor  # (n + 1,) int64
    indices: Tensor  # int32, ascending in a row
    data: Tensor  # float32
    n_genes: int
    log1p: Tensor  # of data
    library_n: Tensor  # sum of each row


class DeviceCounts(NamedTuple):
    """Counts (n, g) on a GPU, with what is made of them once; gpu.py makes one."""

    counts_ng: Tensor  # in the store's type, such as uint8
    log1p_ng: Tensor  # in the type of the products with the largest matrices: float32 or bfloat16
    library_n: Tensor  # float32, sum of each row


Counts = Tensor | SparseCounts | DeviceCounts

_shared = threading.local()  # numba's number of threads, which each thread has its own of, as last set


def sparse_counts(indptr: Tensor, indices: Tensor, data: Tensor, n_genes: int) -> SparseCounts:
    """Return the counts of a CSR matrix; types as in SparseCounts."""
    log1p, library_n = torch.empty_like(data), torch.empty(len(indptr) - 1)
    share_threads()
    first_layer.log1p_and_library(indptr.numpy(), data.numpy(), log1p.numpy(), library_n.numpy())
    return SparseCounts(indptr, indices, data, n_genes, log1p, library_n)


def take_rows(x: Counts, rows: Tensor | slice) -> Counts:
    """Return some cells' counts, in the order of `rows`; those of a slice start:stop lie where x has them.

    Those of a GPU are dense.
    """
    if isinstance(x, DeviceCounts):
        x = dense(x, torch.float32)
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(rows, slice):
        indptr = x.indptr[rows.start : rows.stop + 1]
        at, indptr = slice(int(indptr[0]), int(indptr[-1])), indptr - indptr[0]
    else:
        sizes = x.indptr.diff()[rows]
        indptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        at = torch.arange(int(indptr[-1])) + torch.repeat_interleave(x.indptr[rows] - indptr[:-1], sizes)
    return SparseCounts(indptr, x.indices[at], x.data[at], x.n_genes, x.log1p[at], x.library_n[rows])


def dense(x: Counts, dtype: torch.dtype) -> Tensor:
    """Return counts as (n, g), those that were not dense in this type."""
    if isinstance(x, DeviceCounts):
        return x.counts_ng.to(dtype)
    if isinstance(x, Tensor):
        return x
    n_obs = len(x.indptr) - 1
    rows = torch.repeat_interleave(torch.arange(n_obs), x.indptr.diff())
    return x.data.new_zeros(n_obs, x.n_genes, dtype=dtype).index_put((rows, x.indices.long()), x.data.to(dtype))


def is_fused(x: Counts, weight: Tensor) -> bool:
    """Whether compiled code takes these counts to weights in single precision: sparse ones on a CPU, or a GPU's."""
    is_sparse = isinstance(x, SparseCounts) and weight.device.type == "cpu"
    return weight.dtype == torch.float32 and (is_sparse or isinstance(x, DeviceCounts))


def share_threads() -> int:
    """Let the compiled loops run on as many threads as torch does; return how many these are."""
    threads = torch.get_num_threads()
    if getattr(_shared, "threads", None) != threads:
        _shared.threads, _shared.compiled = threads, min(threads, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(_shared.compiled)
        # The first call starts numba's threads, and tells OpenMP, which is torch's too, that there are so many.
        torch.set_num_threads(threads)
    return _shared.compiled
