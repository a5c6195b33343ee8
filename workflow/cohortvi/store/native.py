"""Chunks decoded in compiled code that holds no lock: crc32c, Blosc, Zstandard and running sums, one call for a range.

The C functions are those of the libraries that numcodecs and google-crc32c bring along. Where these do not show them
`AVAILABLE` is False, and chunks are decoded one by one through Python (store/arrays.py).
"""

import ctypes
import threading
from importlib import import_module
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numcodecs import blosc

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # offset of a chunk that holds zeros alone and is not stored
OK, BAD_CRC, BAD_BLOSC = range(3)

# A Blosc chunk: version, version of the format, flags, bytes a value; then, as four bytes each, the least first, its
# size decoded, that of its blocks, and as it lies. What `block_header` writes has one block, not split by bytes:
HEADER = 16
BLOCK = HEADER + 8  # where a single block begins: after its place and its length
SHUFFLED, WHOLE, ZSTD = 0x01, 0x10, 0x80  # flags


def _show() -> ctypes.CDLL | None:
    """Make the C functions known to compiled code; return the library of the codecs, None if one is not there."""
    try:
        checksum = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__).crc32c_value
        library = ctypes.CDLL(blosc.__file__)
        shown = {"blosc_decompress_ctx": library.blosc_decompress_ctx, "crc32c_value": checksum}
        shown["zstd_decompress"] = library.ZSTD_decompressDCtx
        library.ZSTD_createDCtx.restype = library.ZSTD_createCCtx.restype = ctypes.c_void_p
        library.ZSTD_compress2.restype = library.ZSTD_compressBound.restype = ctypes.c_size_t
        library.ZSTD_CCtx_setParameter.restype = ctypes.c_size_t
    except (ImportError, AttributeError, OSError):
        return None
    for name, function in shown.items():
        llvmlite.binding.add_symbol(f"cohortvi_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return library


LIBRARY = _show()
AVAILABLE = LIBRARY is not None
_crc32c = types.ExternalFunction("cohortvi_crc32c_value", types.uint32(types.voidptr, types.uint64))
# source, target, bytes of the target, threads -> bytes written, negative for an error
_decompress = types.ExternalFunction(
    "cohortvi_blosc_decompress_ctx", types.int32(types.voidptr, types.voidptr, types.uint64, types.int32)
)
# context, target, its bytes, source, its bytes -> bytes written, a huge number for an error
_unpack = types.ExternalFunction(
    "cohortvi_zstd_decompress",
    types.uint64(types.uint64, types.voidptr, types.uint64, types.voidptr, types.uint64),
)


class Scratch(threading.local):
    """What a thread decodes with: zstd's context, and memory, since fresh pages cost more than the decoding."""

    def __init__(self) -> None:
        self.context = LIBRARY.ZSTD_createDCtx() if LIBRARY else 0
        self.raw, self.planes = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def __del__(self) -> None:
        if self.context:
            LIBRARY.ZSTD_freeDCtx(ctypes.c_void_p(self.context))

    def bytes(self, size: int) -> np.ndarray:
        """Return room for what is read; the thread's next call returns the same."""
        if len(self.raw) < size:
            self.raw = np.empty(size + size // 4, np.uint8)
        return self.raw[:size]

    def chunk(self, size: int) -> np.ndarray:
        """Return room for the bytes of a decoded chunk."""
        if len(self.planes) < size:
            self.planes = np.empty(size, np.uint8)
        return self.planes[:size]


@intrinsic
def _address(typingctx: Any, array: Any, index: Any) -> tuple:
    """Return the address of array[index]."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.bitcast(builder.gep(data, [arguments[1]]), context.get_value_type(types.voidptr))

    return types.voidptr(array, types.uint64), generate


@numba.njit(nogil=True, cache=True)
def _number(raw: np.ndarray, at: int) -> int:
    """Return the unsigned number of four bytes, the least first."""
    number = np.uint32(0)
    for k in range(np.uint64(4)):
        number |= np.uint32(raw[at + k]) << np.uint32(8 * k)
    return number


@numba.njit(nogil=True, cache=True)
def _is_ours(raw: np.ndarray, offset: int, length: int, itemsize: int, size: int) -> bool:
    """Say whether a Blosc chunk is one zstd frame, as `block_header` announces it."""
    flags = ZSTD | WHOLE | (SHUFFLED if itemsize > 1 else 0)
    if length < BLOCK or raw[offset + np.uint64(2)] != flags or raw[offset + np.uint64(3)] != itemsize:
        return False
    if _number(raw, offset + np.uint64(8)) != size or _number(raw, offset + np.uint64(HEADER)) != HEADER + 4:
        return False
    return _number(raw, offset + np.uint64(HEADER + 4)) == length - np.uint64(BLOCK)


@numba.njit(nogil=True, cache=True)
def _join_planes(planes: np.ndarray, first: int, out: np.ndarray, delta: bool) -> None:
    """Write values from number `first` on, whose bytes lie in planes, into `out`; `delta`: they are differences."""
    size = np.uint64(len(planes) // out.itemsize)
    start, total = np.uint64(first), np.uint64(0)
    for i in range(start if delta else np.uint64(0)):
        for b in range(np.uint64(out.itemsize)):
            total += np.uint64(planes[b * size + i]) << np.uint64(8) * b
    for k in range(np.uint64(len(out))):
        value = np.uint64(0)
        for b in range(np.uint64(out.itemsize)):
            value |= np.uint64(planes[b * size + start + k]) << np.uint64(8) * b
        total = value + (total if delta else np.uint64(0))
        out[k] = total


@numba.njit(nogil=True, cache=True)
def decode_chunks(  # noqa: PLR0913 (called once, from ArrayReader)
    raw: np.ndarray,
    places: np.ndarray,
    skip: int,
    out: np.ndarray,
    room: np.ndarray,
    context: int,
    checked: bool,
    delta: bool,
) -> tuple[int, int]:
    """Decode consecutive chunks, and write their values from number `skip` on into `out`, until it is full.

    raw: bytes of the chunks; places: where each begins in it, and its length, (n, 2) uint64; out: unsigned values;
    room: bytes of a decoded chunk; context: zstd's, of this thread. checked: chunks end with their crc32c; delta: they
    hold differences. Returns the chunk that failed, and BAD_CRC or BAD_BLOSC; or OK.
    """
    target_bytes = np.uint64(len(room))
    size = len(room) // out.itemsize
    for chunk in range(len(places)):
        first = max(0, skip - chunk * size)
        begin = chunk * size + first - skip
        part = out[begin : begin + min(size - first, len(out) - begin)]
        if places[chunk, 0] == ABSENT:
            part[:] = 0
            continue
        offset, length = places[chunk, 0], places[chunk, 1]
        if checked:
            length -= np.uint64(CRC_BYTES)
            if _crc32c(_address(raw, offset), length) != _number(raw, offset + length):
                return chunk, BAD_CRC
        if length < HEADER or _number(raw, offset + np.uint64(4)) != target_bytes:
            return chunk, BAD_BLOSC
        if _number(raw, offset + np.uint64(12)) != length:
            return chunk, BAD_BLOSC
        if _is_ours(raw, offset, length, out.itemsize, target_bytes):
            begin_block, block = offset + np.uint64(BLOCK), length - np.uint64(BLOCK)
            planes = room
            if block == target_bytes:  # not compressed
                planes = raw[np.int64(begin_block) : np.int64(begin_block + block)]
            elif _unpack(context, _address(room, np.uint64(0)), target_bytes, _address(raw, begin_block), block) != (
                target_bytes
            ):
                return chunk, BAD_BLOSC
            _join_planes(planes, first, part, delta)
            continue
        written = _decompress(_address(raw, offset), _address(room, np.uint64(0)), target_bytes, 1)
        if written != np.int64(target_bytes):
            return chunk, BAD_BLOSC
        values = room.view(out.dtype)
        if delta:
            for i in range(1, size):
                values[i] += values[i - 1]
        part[:] = values[first : first + len(part)]
    return 0, OK
