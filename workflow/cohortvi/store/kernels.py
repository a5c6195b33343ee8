"""Loops over compact CSR rows, compiled, without the GIL.

They trust their input: whoever reads counts from disk passes them through `first_bad_row` once; the other loops rely
on its verdict and check no bounds. Row pointers are int64 and begin at 0; ids and counts come in any unsigned type.
"""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def first_bad_row(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_vars: int) -> int:
    """Return the first row whose ids do not rise strictly below `n_vars` or that holds a zero; -1 if there is none."""
    for row in range(len(indptr) - 1):
        last = -1
        for i in range(indptr[row], indptr[row + 1]):
            gene = np.int64(indices[i])
            if gene <= last or gene >= n_vars or data[i] == 0:
                return row
            last = gene
    return -1


@numba.njit(nogil=True, cache=True)
def fill_dense(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, rows: np.ndarray, x_ng: np.ndarray) -> None:
    """Write row rows[k] of the CSR arrays into x_ng[k], zeros included, whatever stood there."""
    for k in range(len(rows)):
        x_ng[k, :] = 0
        for i in range(indptr[rows[k]], indptr[rows[k] + 1]):
            x_ng[k, indices[i]] = data[i]


@numba.njit(nogil=True, cache=True)
def take_rows(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return CSR arrays whose row k is row rows[k] of the given ones."""
    ends = np.zeros(len(rows) + 1, np.int64)
    for k in range(len(rows)):
        ends[k + 1] = ends[k] + indptr[rows[k] + 1] - indptr[rows[k]]
    to_indices, to_data = np.empty(ends[-1], indices.dtype), np.empty(ends[-1], data.dtype)
    for k in range(len(rows)):
        begin = indptr[rows[k]]
        for i in range(ends[k + 1] - ends[k]):
            to_indices[ends[k] + i] = indices[begin + i]
            to_data[ends[k] + i] = data[begin + i]
    return ends, to_indices, to_data


@numba.njit(nogil=True, cache=True)
def map_genes(
    csr: tuple[np.ndarray, np.ndarray, np.ndarray], place: np.ndarray, to_indices: np.ndarray, to_data: np.ndarray
) -> np.ndarray:
    """Write the CSR arrays with gene i as gene place[i], sorted, without those of place -1; return their indptr.

    `to_indices` and `to_data` are as long as the given ones; what lies beyond the last row's end is not written.
    """
    indptr, indices, data = csr
    ends = np.zeros(len(indptr), np.int64)
    for row in range(len(indptr) - 1):
        begin = to = ends[row]
        is_sorted = True
        for i in range(indptr[row], indptr[row + 1]):
            gene = place[indices[i]]
            if gene >= 0:
                is_sorted &= to == begin or gene > to_indices[to - 1]
                to_indices[to], to_data[to] = gene, data[i]
                to += 1
        if not is_sorted:
            order = np.argsort(to_indices[begin:to])
            to_indices[begin:to] = to_indices[begin:to][order]
            to_data[begin:to] = to_data[begin:to][order]
        ends[row + 1] = to
    return ends
