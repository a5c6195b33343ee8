"""Chunks decoded in compiled code that holds no lock: crc32c, Blosc and running sums, one call for a range.

The two C functions are those of the libraries that numcodecs and google-crc32c bring along. Where these do not show
them `AVAILABLE` is False, and chunks are decoded one by one through Python (store/arrays.py).
"""

import ctypes
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


def _show() -> bool:
    """Make the C functions known to compiled code; return whether they are there."""
    try:
        checksum = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__).crc32c_value
        decompress = ctypes.CDLL(blosc.__file__).blosc_decompress_ctx
    except (ImportError, AttributeError, OSError):
        return False
    for name, function in (("cohortvi_crc32c_value", checksum), ("cohortvi_blosc_decompress_ctx", decompress)):
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return True


AVAILABLE = _show()
_crc32c = types.ExternalFunction("cohortvi_crc32c_value", types.uint32(types.voidptr, types.uint64))
# source, target, bytes of the target, threads -> bytes written, negative for an error
_decompress = types.ExternalFunction(
    "cohortvi_blosc_decompress_ctx", types.int32(types.voidptr, types.voidptr, types.uint64, types.int32)
)


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
def decode_chunks(
    raw: np.ndarray, places: np.ndarray, skip: int, out: np.ndarray, room: np.ndarray, checked: bool, delta: bool
) -> tuple[int, int]:
    """Decode consecutive chunks, and write their values from number `skip` on into `out`, until it is full.

    raw: bytes of the chunks; places: where each begins in it, and its length, (n, 2) uint64; room: as many values as a
    chunk has. checked: chunks end with their crc32c; delta: they hold differences. Returns the chunk that failed, and
    BAD_CRC or BAD_BLOSC; or OK.
    """
    size = len(room)
    target_bytes = np.uint64(size * room.itemsize)
    for chunk in range(len(places)):
        first = max(0, skip - chunk * size)
        begin = chunk * size + first - skip
        n = min(size - first, len(out) - begin)
        if places[chunk, 0] == ABSENT:
            out[begin : begin + n] = 0
            continue
        offset, length = places[chunk, 0], places[chunk, 1]
        if checked:
            length -= np.uint64(CRC_BYTES)
            if _crc32c(_address(raw, offset), length) != _number(raw, offset + length):
                return chunk, BAD_CRC
        # A Blosc chunk begins with 16 bytes: from byte 4 on, how many it is decoded and, from byte 12 on, as it lies.
        if length < 16 or _number(raw, offset + np.uint64(4)) != target_bytes:
            return chunk, BAD_BLOSC
        whole = n == size
        target = out[begin : begin + n] if whole else room
        fits = _number(raw, offset + np.uint64(12)) == length
        if (
            not fits
            or _decompress(_address(raw, offset), _address(target, np.uint64(0)), target_bytes, 1)
            != size * room.itemsize
        ):
            return chunk, BAD_BLOSC
        if delta:
            for i in range(1, size):
                target[i] += target[i - 1]
        if not whole:
            out[begin : begin + n] = room[first : first + n]
    return 0, OK
