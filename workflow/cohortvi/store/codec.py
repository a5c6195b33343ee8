"""How the values of a chunk become bytes: differences, Blosc's byte shuffle, zstd; any reader of zarr takes them back.

Blosc's own call of zstd finds short matches in what are random draws from few values, which costs bytes and time. So
the chunk is put together here, of a zstd frame for the lowest byte of all values, which is coded byte by byte, and one
for the higher bytes, where matches are looked for: zeros but for few. docs/store.md has what that gains.
"""

import ctypes
import threading
from typing import Any, NamedTuple

import google_crc32c
import numba
import numpy as np
from numcodecs import blosc
from zarr.codecs import BloscCodec
from zarr.codecs.numcodecs import Delta

from cohortvi.store import native
from cohortvi.store.libraries import LIBRARY, Allocation
from cohortvi.store.native import BLOCK, CRC_BYTES, HEADER, SHUFFLED, WHOLE, ZSTD

LEVEL, STRATEGY, MIN_MATCH, TARGET_LENGTH, LITERALS = 100, 107, 105, 106, 1002  # zstd.h: ZSTD_cParameter
MATCHED = {LEVEL: 1}
# The fastest strategy, leaping over what it does not match; literals in Huffman's code all the same.
UNMATCHED = {LEVEL: 1, STRATEGY: 1, MIN_MATCH: 7, TARGET_LENGTH: 1024, LITERALS: 1}


class Codec(NamedTuple):
    """How the values of an array lie in chunks of so many."""

    delta: bool = False  # as differences, the first of a chunk from 0
    chunk: int = 32_768

    def filters(self, dtype: np.dtype) -> list[Delta] | None:
        """Return zarr's filters of such an array."""
        return [Delta(dtype=dtype.str)] if self.delta else None

    def compressor(self, dtype: np.dtype) -> BloscCodec:
        """Return zarr's codec of such an array."""
        return BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=1, shuffle=_shuffle(dtype), blocksize=0)


def _shuffle(dtype: np.dtype) -> str:
    return "shuffle" if dtype.itemsize > 1 else "noshuffle"


def crc(data: bytes | np.ndarray) -> bytes:
    """Return the checksum that a chunk ends with."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


class _Contexts(threading.local):
    """The zstd contexts of a thread, by whether matches are looked for."""

    def __init__(self) -> None:
        self.of: dict[bool, Allocation] = {}

    def get(self, matches: bool) -> ctypes.c_void_p:
        if matches not in self.of:
            self.of[matches] = Allocation(LIBRARY.ZSTD_createCCtx, LIBRARY.ZSTD_freeCCtx)
            for name, value in (MATCHED if matches else UNMATCHED).items():
                LIBRARY.ZSTD_CCtx_setParameter(ctypes.c_void_p(self.of[matches].address), name, value)
        return ctypes.c_void_p(self.of[matches].address)


_CONTEXTS = _Contexts()


def encode(values: np.ndarray, codec: Codec) -> bytes:
    """Return the values of a chunk as they lie on disk, without a checksum."""
    values = np.ascontiguousarray(values)
    if not native.AVAILABLE:
        values = np.diff(values, prepend=values.dtype.type(0)) if codec.delta else values
        return blosc.compress(values, b"zstd", 1, blosc.SHUFFLE if values.itemsize > 1 else blosc.NOSHUFFLE)
    planes = np.empty(values.nbytes, np.uint8)
    _split_planes(values.view(f"u{values.itemsize}"), planes, codec.delta)
    frames = _frame(planes[: len(values)], matches=False) + _frame(planes[len(values) :], matches=True)
    if len(frames) >= len(planes):  # Blosc takes a block of its full size for one that is not compressed
        frames = planes.tobytes()
    head = np.empty(BLOCK, np.uint8)
    head[:4] = 2, 1, ZSTD | WHOLE | (SHUFFLED if values.itemsize > 1 else 0), values.itemsize
    head[4:].view("<u4")[:] = len(planes), len(planes), BLOCK + len(frames), HEADER + 4, len(frames)
    return head.tobytes() + frames


def _frame(data: np.ndarray, *, matches: bool) -> bytes:
    """Return bytes as a zstd frame; none for none."""
    if not len(data):
        return b""
    size = ctypes.c_size_t(len(data))
    bound = LIBRARY.ZSTD_compressBound(size)
    frame = np.empty(bound, np.uint8)
    target, source = ctypes.c_void_p(frame.ctypes.data), ctypes.c_void_p(data.ctypes.data)
    length = LIBRARY.ZSTD_compress2(_CONTEXTS.get(matches), target, ctypes.c_size_t(bound), source, size)
    if length > bound:
        raise RuntimeError(f"zstd: error {2**64 - length} where {len(data)} bytes were to be compressed")
    return frame[:length].tobytes()


def decode(data: bytes, dtype: np.dtype, codec: Codec) -> np.ndarray:
    """Return the values that `encode` took."""
    values: Any = np.frombuffer(blosc.decompress(data), dtype).copy()
    return np.cumsum(values, dtype=dtype) if codec.delta else values


@numba.njit(nogil=True, cache=True)
def _split_planes(values: np.ndarray, planes: np.ndarray, delta: bool) -> None:
    """Write all first bytes, then all second bytes ... of unsigned values, or of their differences."""
    size = np.uint64(len(values))
    for b in range(np.uint64(values.itemsize)):
        last = np.uint64(0)
        for i in range(size):
            value = np.uint64(values[i])
            planes[b * size + i] = (value - (last if delta else np.uint64(0))) >> np.uint64(8) * b
            last = value
