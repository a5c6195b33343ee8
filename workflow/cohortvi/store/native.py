"""Chunks decoded in compiled code that holds no lock: crc32c, Blosc, Zstandard and running sums, one call for a range,
or one a thread for a list of ranges.

Where the C functions (store/libraries.py) are not shown `AVAILABLE` is False, and chunks are decoded one by one through
Python (store/arrays.py). All loops stand in this file: numba would not notice that those of others have changed.
"""

import numba
import numpy as np
from numba.core import types

from cohortvi.store.intrinsics import LANES, address, claim, pointer, sum_lanes
from cohortvi.store.libraries import LIBRARY

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # offset of a chunk that holds zeros alone and is not stored
OK, BAD_CRC, BAD_BLOSC, BAD_READ, NOT_DONE = range(5)
NOTHING, VALUES, PLANES = range(3)

# A Blosc chunk: version, version of the format, flags, bytes a value; then, as four bytes each, the least first, its
# size decoded, that of its blocks, and as it lies. What store/codec.py writes has one block, not split by bytes:
HEADER = 16
BLOCK = HEADER + 8  # where a single block begins: after its place and its length
SHUFFLED, WHOLE, ZSTD = 0x01, 0x10, 0x80  # flags

# A range of values to be read from one file of checked chunks into the first or second of two arrays (`array` 0 or 1),
# from place `out` on; `block`: what it belongs to. `path` and `places`: addresses of what `read_chunks` takes, which
# ArrayReader keeps; `failure`: NOT_DONE to begin with.
JOB = np.dtype(
    [
        ("block", np.int64),
        ("array", np.int64),
        ("path", np.uint64),
        ("places", np.uint64),
        ("n_chunks", np.int64),
        ("skip", np.int64),
        ("out", np.int64),
        ("size", np.int64),
        ("chunk_bytes", np.int64),
        ("delta", np.bool_),
        ("failure", np.int64),
    ],
    align=True,
)

AVAILABLE = LIBRARY is not None
_crc32c = types.ExternalFunction("cohortvi_crc32c_value", types.uint32(types.voidptr, types.uint64))
# source, target, bytes of the target, threads -> bytes written, negative for an error
_blosc_decompress = types.ExternalFunction(
    "cohortvi_blosc_decompress_ctx", types.int32(types.voidptr, types.voidptr, types.uint64, types.int32)
)
# context, target, its bytes, source, its bytes -> bytes written, a huge number for an error
_zstd_decompress = types.ExternalFunction(
    "cohortvi_zstd_decompress",
    types.uint64(types.uint64, types.voidptr, types.uint64, types.voidptr, types.uint64),
)
_open = types.ExternalFunction("cohortvi_open", types.int32(types.voidptr, types.int32))
_pread = types.ExternalFunction("cohortvi_pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64))
_close = types.ExternalFunction("cohortvi_close", types.int32(types.int32))


@numba.njit(nogil=True, cache=True)
def _number(raw: np.ndarray, at: int) -> int:
    """Return the unsigned number of four bytes, the least first."""
    number = np.uint32(0)
    for k in range(np.uint64(4)):
        number |= np.uint32(raw[at + k]) << np.uint32(8 * k)
    return number


@numba.njit(nogil=True, cache=True)
def _is_ours(raw: np.ndarray, offset: int, length: int, itemsize: int, size: int) -> bool:
    """Say whether a Blosc chunk is one block of zstd frames, as store/codec.py writes it."""
    flags = ZSTD | WHOLE | (SHUFFLED if itemsize > 1 else 0)
    if length < BLOCK or raw[offset + np.uint64(2)] != flags or raw[offset + np.uint64(3)] != itemsize:
        return False
    if _number(raw, offset + np.uint64(8)) != size or _number(raw, offset + np.uint64(HEADER)) != HEADER + 4:
        return False
    return _number(raw, offset + np.uint64(HEADER + 4)) == length - np.uint64(BLOCK)


@numba.njit(nogil=True, cache=True)
def _unpack(raw: np.ndarray, offset: int, length: int, room: np.ndarray, itemsize: int, context: int) -> int:
    """Decode a Blosc chunk into `room`; return what lies there then: its values, or their bytes in planes."""
    size = np.uint64(len(room))
    if length < HEADER or _number(raw, offset + np.uint64(4)) != size:
        return NOTHING
    if _number(raw, offset + np.uint64(12)) != length:
        return NOTHING
    target = address(room, np.uint64(0))
    if not _is_ours(raw, offset, length, itemsize, size):
        return VALUES if _blosc_decompress(address(raw, offset), target, size, 1) == np.int64(size) else NOTHING
    begin, block = offset + np.uint64(BLOCK), length - np.uint64(BLOCK)
    if block == size:  # not compressed
        room[:] = raw[np.int64(begin) : np.int64(begin + block)]
    elif _zstd_decompress(context, target, size, address(raw, begin), block) != size:
        return NOTHING
    return PLANES


@numba.njit(nogil=True, cache=True)
def _join_planes(planes: np.ndarray, first: int, out: np.ndarray) -> None:
    """Write values from number `first` on, whose bytes lie in planes, into `out`."""
    size, start, n = np.uint64(len(planes) // out.itemsize), np.uint64(first), np.uint64(len(out))
    low, kind = planes[start : start + n], out.dtype.type
    if out.itemsize == 2:
        high = planes[size + start : size + start + n]
        for k in range(n):
            out[k] = np.uint16(low[k]) | np.uint16(high[k]) << np.uint16(8)
        return
    out[:] = low
    for b in range(np.uint64(1), np.uint64(out.itemsize)):
        for k in range(n):
            out[k] |= kind(planes[b * size + start + k]) << np.uint64(8) * b


@numba.njit(nogil=True, cache=True)
def _sum_planes(planes: np.ndarray, n: int, itemsize: int) -> int:
    """Return the sum of the first `n` values, which may wrap around."""
    total, size = np.uint64(0), len(planes) // itemsize
    for b in range(itemsize):
        part = np.uint64(0)
        for value in planes[b * size : b * size + n]:
            part += value
        total += part << np.uint64(8 * b)
    return total


@numba.njit(nogil=True, cache=True)
def _sum_pairs(planes: np.ndarray, first: int, out: np.ndarray, total: int) -> None:
    """Write the running sum of two-byte differences from number `first` on, begun at `total`, into `out`."""
    size, start, n = np.uint64(len(planes) // 2), np.uint64(first), np.uint64(len(out))
    last, whole = np.uint16(total), n - n % np.uint64(LANES)
    for k in range(np.uint64(0), whole, np.uint64(LANES)):
        last = sum_lanes(planes, start + k, size + start + k, out, k, last)
    for k in range(whole, n):
        last = np.uint16(last + (np.uint16(planes[start + k]) | np.uint16(planes[size + start + k]) << np.uint16(8)))
        out[k] = last


@numba.njit(nogil=True, cache=True)
def _run_on(values: np.ndarray, total: int) -> None:
    """Replace differences by their running sum, begun at `total`, in the type of `values`, which may wrap around."""
    last = np.uint64(total)
    for k in range(np.uint64(len(values))):
        last += values[k]
        values[k] = last


@numba.njit(nogil=True, cache=True)
def _values_of_planes(planes: np.ndarray, first: int, out: np.ndarray, delta: bool) -> None:
    """Write values from number `first` on into `out`; `delta`: planes hold their differences."""
    if delta and out.itemsize == 2:
        _sum_pairs(planes, first, out, _sum_planes(planes, first, out.itemsize))
        return
    _join_planes(planes, first, out)
    if delta:
        _run_on(out, _sum_planes(planes, first, out.itemsize))


@numba.njit(nogil=True, cache=True)
def span(places: np.ndarray) -> tuple[int, int]:
    """Return where the chunks that are there begin and end in their file; 0, 0 if none is."""
    begin, end = ABSENT, np.uint64(0)
    for chunk in range(len(places)):
        if places[chunk, 0] != ABSENT:
            begin, end = min(begin, places[chunk, 0]), max(end, places[chunk, 0] + places[chunk, 1])
    return (np.int64(begin), np.int64(end)) if end else (0, 0)


@numba.njit(nogil=True, cache=True)
def read_file(path: int, begin: int, raw: np.ndarray) -> bool:
    """Fill `raw` with the bytes of a file from `begin` on; `path`: the address of its name. Return whether it could."""
    descriptor = _open(pointer(np.uint64(path)), 0)  # to be read
    if descriptor < 0:
        return False
    filled, got = 0, 1
    while got > 0 and filled < len(raw):
        got = _pread(descriptor, address(raw, np.uint64(filled)), np.uint64(len(raw) - filled), begin + filled)
        filled += got
    _close(descriptor)
    return filled == len(raw)


@numba.njit(nogil=True, cache=True)
def read_chunks(
    path: int,
    places: np.ndarray,
    skip: int,
    out: np.ndarray,
    chunk_bytes: int,
    context: int,
    checked: bool,
    delta: bool,
) -> tuple[int, int]:
    """Read consecutive chunks out of a file and do with them as `decode_chunks` does; BAD_READ if it is too short.

    path: the address of its name, which ends with a zero.
    """
    begin, end = span(places)
    raw = np.empty(end - begin, np.uint8)
    if end and not read_file(path, begin, raw):
        return 0, BAD_READ
    return decode_chunks(raw, begin, places, skip, out, chunk_bytes, context, checked, delta)


@numba.njit(nogil=True, cache=True)
def decode_chunks(  # noqa: PLR0913 (called once, from ArrayReader)
    raw: np.ndarray,
    begin: int,
    places: np.ndarray,
    skip: int,
    out: np.ndarray,
    chunk_bytes: int,
    context: int,
    checked: bool,
    delta: bool,
) -> tuple[int, int]:
    """Decode consecutive chunks, and write their values from number `skip` on into `out`, until it is full.

    raw: bytes of a file from `begin` on; places: where each chunk begins in the file, and its length, (n, 2) uint64;
    out: unsigned values; chunk_bytes: of a decoded chunk; context: zstd's, of this thread. checked: chunks end with
    their crc32c; delta: they hold differences. Returns the chunk that failed, and BAD_CRC or BAD_BLOSC; or OK.
    """
    room, size = np.empty(chunk_bytes, np.uint8), chunk_bytes // out.itemsize
    for chunk in range(len(places)):
        first = max(0, skip - chunk * size)
        filled = chunk * size + first - skip
        part = out[filled : filled + min(size - first, len(out) - filled)]
        if places[chunk, 0] == ABSENT:
            part[:] = 0
            continue
        offset, length = places[chunk, 0] - np.uint64(begin), places[chunk, 1]
        if checked:
            length -= np.uint64(CRC_BYTES)
            if _crc32c(address(raw, offset), length) != _number(raw, offset + length):
                return chunk, BAD_CRC
        found = _unpack(raw, offset, length, room, out.itemsize, context)
        if found == NOTHING:
            return chunk, BAD_BLOSC
        if found == PLANES:
            _values_of_planes(room, first, part, delta)
        else:
            values = room.view(out.dtype)
            if delta:
                _run_on(values, 0)
            part[:] = values[first : first + len(part)]
    return 0, OK


@numba.njit(nogil=True, cache=True)
def do_jobs(jobs: np.ndarray, claimed: np.ndarray, context: int, first: np.ndarray, second: np.ndarray) -> None:
    """Do jobs, of type JOB, those that no other thread has done or is doing, until none is left.

    claimed: the number of jobs that threads have taken, (1,) int64; context: zstd's, of this thread. The arrays differ
    in type, hence two calls.
    """
    k = claim(claimed)
    while k < len(jobs):
        job = jobs[k]
        places = numba.carray(pointer(job.places), (job.n_chunks, 2), np.uint64)
        settings = (job.chunk_bytes, context, True, job.delta)
        if job.array == 0:
            out = first[job.out : job.out + job.size]
            _, job.failure = read_chunks(job.path, places, job.skip, out, *settings)
        else:
            out = second[job.out : job.out + job.size]
            _, job.failure = read_chunks(job.path, places, job.skip, out, *settings)
        k = claim(claimed)
