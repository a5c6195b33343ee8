"""The encoder's first layer on sparse counts, compiled. n cells, g genes, h units."""

import math

import numba
import numpy as np

LOOPS = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
LOG1P = np.log1p(np.arange(64)).astype(np.float32)  # of the counts that most are

Array = np.ndarray


@numba.njit(**LOOPS)
def log1p_and_library(indptr: Array, counts: Array, values: Array, library: Array) -> None:
    """Write log(1 + count) of every entry, and the sum of each cell's counts."""
    for n in numba.prange(len(library)):
        total = 0.0
        for j in range(indptr[n], indptr[n + 1]):
            x = counts[j]
            values[j] = LOG1P[int(x)] if x < len(LOG1P) else math.log1p(x)
            total += x
        library[n] = total


@numba.njit(**LOOPS)
def spmm(indptr: Array, ids: Array, values: Array, weight: Array, bias: Array, out: Array) -> None:
    """out (n, h) = sparse (n, g) times weight (g, h), plus bias (h,)."""
    for n in numba.prange(len(out)):
        row, j, end = out[n], indptr[n], indptr[n + 1]
        row[:] = bias
        while j + 3 < end:  # four genes at a time: the row is written a quarter as often
            v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
            w0, w1, w2, w3 = weight[ids[j]], weight[ids[j + 1]], weight[ids[j + 2]], weight[ids[j + 3]]
            for h in range(len(row)):
                row[h] += (v0 * w0[h] + v1 * w1[h]) + (v2 * w2[h] + v3 * w3[h])
            j += 4
        for rest in range(j, end):
            value, of_gene = values[rest], weight[ids[rest]]
            for h in range(len(row)):
                row[h] += value * of_gene[h]


@numba.njit(**LOOPS)
def spmm_backward(indptr: Array, ids: Array, values: Array, upstream: Array, dweight: Array, parts: int) -> None:
    """Add the transposed sparse matrix times upstream (n, h) to dweight (g, h); a part of the genes is one thread's."""
    n_genes = len(dweight)
    for part in numba.prange(parts):
        low, high = n_genes * part // parts, n_genes * (part + 1) // parts
        for n in range(len(upstream)):
            row = upstream[n]
            j = indptr[n] + np.searchsorted(ids[indptr[n] : indptr[n + 1]], low)
            while j < indptr[n + 1] and ids[j] < high:
                value, of_gene = values[j], dweight[ids[j]]
                for h in range(len(row)):
                    of_gene[h] += value * row[h]
                j += 1
