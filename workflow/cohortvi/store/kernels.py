"""Loops over compact CSR rows, compiled, without the GIL.

They trust their input and check no bounds: what this program writes has passed `first_bad_row`, what others wrote is
looked at when it is read. Row pointers are int64 and begin at 0; ids and counts come in any unsigned type.
"""

import numba
import numpy as np

from cohortvi.store.intrinsics import LINE, claim, prefetch, stream_line

AHEAD = 2  # rows; random rows of a window come out of main memory, and the processor can't foresee them
WIDE = 16_384  # bytes of a dense row from which on batches outgrow the caches, and are written past them


@numba.njit(nogil=True, cache=True)
def _prefetch_row(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, row: int) -> None:
    at = np.uint64(row)
    for i in range(np.uint64(indptr[at]), np.uint64(indptr[at + np.uint64(1)]), np.uint64(LINE // 2)):
        prefetch(indices, i)
        prefetch(data, i)


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
def rise(ends: np.ndarray, last: int) -> bool:
    """Say whether row ends, of one row at least, are in order from 0 to `last`."""
    is_bad = ends[0] < 0 or ends[-1] > last
    for k in range(len(ends) - 1):
        is_bad |= ends[k] > ends[k + 1]
    return not is_bad


@numba.njit(nogil=True, cache=True)
def sort_rows(ends: np.ndarray, indices: np.ndarray, data: np.ndarray) -> int:
    """Sort rows by id, where they are not; return the first one that has an id twice, -1 if there is none.

    `ends`: as `CountsReader.ends` gives them, from any number on.
    """
    for row in range(len(ends) - 1):
        ids, counts = indices[ends[row] - ends[0] : ends[row + 1] - ends[0]], data[ends[row] - ends[0] :]
        is_sorted = True
        for i in range(1, len(ids)):
            is_sorted &= ids[i - 1] < ids[i]
        if not is_sorted:
            order = np.argsort(ids)
            counts[: len(ids)] = counts[: len(ids)][order]
            ids[:] = ids[order]
            for i in range(1, len(ids)):
                if ids[i - 1] == ids[i]:
                    return row
    return -1


# Unsigned numbers below: an index that may be negative costs a comparison and keeps the loop from being vectorised.


@numba.njit(nogil=True, cache=True)
def _write_row(values: np.ndarray, x: np.ndarray, first: int) -> None:
    """Write values to x[first] and on, whole lines past the caches."""
    line, n = np.uint64(LINE // x.itemsize), np.uint64(len(values))
    begin = min((line - (np.uint64(x.ctypes.data // x.itemsize) + first) % line) % line, n)
    end = n - (n - begin) % line
    for i in range(begin):
        x[first + i] = values[i]
    for i in range(begin, end, line):
        stream_line(x, first + i, values, i)
    for i in range(end, n):
        x[first + i] = values[i]


@numba.njit(nogil=True, cache=True)
def _scatter(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, row: int, x: np.ndarray, first: int) -> None:
    """Write the entries of a row to where its genes lie in x, counted from x[first]."""
    at = np.uint64(row)
    for i in range(np.uint64(indptr[at]), np.uint64(indptr[at + np.uint64(1)])):
        x[first + np.uint64(indices[i])] = data[i]


@numba.njit(nogil=True, cache=True)
def _clear(indptr: np.ndarray, indices: np.ndarray, row: int, x: np.ndarray) -> None:
    at = np.uint64(row)
    for i in range(np.uint64(indptr[at]), np.uint64(indptr[at + np.uint64(1)])):
        x[np.uint64(indices[i])] = 0


@numba.njit(nogil=True, cache=True)
def fill_dense(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, rows: np.ndarray, x_ng: np.ndarray) -> None:
    """Write row rows[k] of the CSR arrays into x_ng[k], zeros included, whatever stood there."""
    flat, n_vars = x_ng.reshape(-1), np.uint64(x_ng.shape[1])
    is_wide = x_ng.shape[1] * x_ng.itemsize >= WIDE
    values = np.zeros(x_ng.shape[1] if is_wide else 0, x_ng.dtype)
    for k in range(len(rows)):
        if k + AHEAD < len(rows):
            _prefetch_row(indptr, indices, data, rows[k + AHEAD])
        first = np.uint64(k) * n_vars
        if is_wide:
            _scatter(indptr, indices, data, rows[k], values, np.uint64(0))
            _write_row(values, flat, first)
            _clear(indptr, indices, rows[k], values)
        else:
            flat[np.int64(first) : np.int64(first + n_vars)] = 0
            _scatter(indptr, indices, data, rows[k], flat, first)


@numba.njit(nogil=True, cache=True)
def fill_share(
    csr: tuple[np.ndarray, np.ndarray, np.ndarray], rows: np.ndarray, x_ng: np.ndarray, claimed: np.ndarray, share: int
) -> None:
    """Do as `fill_dense` with so many rows at a time, which no other thread does, until none is left.

    claimed: shares that threads have taken, (1,) int64.
    """
    start = claim(claimed) * share
    while start < len(rows):
        fill_dense(*csr, rows[start : start + share], x_ng[start : start + share])
        start = claim(claimed) * share


@numba.njit(nogil=True, cache=True)
def gather(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    rows: np.ndarray,
    ends: np.ndarray,
    to_indices: np.ndarray,
    to_data: np.ndarray,
) -> None:
    """Write row rows[k] of the CSR arrays to ends[k] and on, in the types of the target."""
    for k in range(len(rows)):
        if k + AHEAD < len(rows):
            _prefetch_row(indptr, indices, data, rows[k + AHEAD])
        row, to = np.uint64(rows[k]), np.uint64(ends[k])
        begin = np.uint64(indptr[row])
        n = np.uint64(indptr[row + np.uint64(1)]) - begin
        for i in range(n):
            to_indices[to + i] = indices[begin + i]
        for i in range(n):
            to_data[to + i] = data[begin + i]


@numba.njit(nogil=True, cache=True)
def gather_share(
    csr: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: np.ndarray,
    to: tuple[np.ndarray, np.ndarray, np.ndarray],
    claimed: np.ndarray,
    share: int,
) -> None:
    """Do as `gather`, to (ends, indices, data), as `fill_share` does."""
    ends, indices, data = to
    start = claim(claimed) * share
    while start < len(rows):
        gather(*csr, rows[start : start + share], ends[start:], indices, data)
        start = claim(claimed) * share


@numba.njit(nogil=True, cache=True)
def row_ends(indptr: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> None:
    """Write where row rows[k] ends among the entries of the rows before it into ends[k + 1], counted from ends[0]."""
    for k in range(len(rows)):
        ends[k + 1] = ends[k] + indptr[rows[k] + 1] - indptr[rows[k]]


@numba.njit(nogil=True, cache=True)
def take_rows(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return CSR arrays whose row k is row rows[k] of the given ones."""
    ends = np.zeros(len(rows) + 1, np.int64)
    row_ends(indptr, rows, ends)
    to_indices, to_data = np.empty(ends[-1], indices.dtype), np.empty(ends[-1], data.dtype)
    gather(indptr, indices, data, rows, ends, to_indices, to_data)
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
