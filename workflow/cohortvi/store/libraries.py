"""C functions of the libraries that numcodecs and google-crc32c bring along, for compiled code and through ctypes."""

import ctypes
import threading
from importlib import import_module
from typing import Any

import llvmlite.binding
from numcodecs import blosc


def _show() -> ctypes.CDLL | None:
    """Make the C functions known to compiled code; return the library of the codecs, None if one is not there."""
    try:
        checksum = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__).crc32c_value
        library = ctypes.CDLL(blosc.__file__)
        shown = {"blosc_decompress_ctx": library.blosc_decompress_ctx, "crc32c_value": checksum}
        shown["zstd_decompress"] = library.ZSTD_decompressDCtx
        shown |= {name: getattr(ctypes.CDLL(None), name) for name in ("open", "pread", "close")}
        library.ZSTD_createDCtx.restype = library.ZSTD_createCCtx.restype = ctypes.c_void_p
        library.ZSTD_compress2.restype = library.ZSTD_compressBound.restype = ctypes.c_size_t
        library.ZSTD_CCtx_setParameter.restype = ctypes.c_size_t
    except (ImportError, AttributeError, OSError, TypeError):
        return None
    for name, function in shown.items():
        llvmlite.binding.add_symbol(f"cohortvi_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return library


LIBRARY = _show()


class Allocation:
    """What the library has allocated, freed with this object."""

    def __init__(self, create: Any, free: Any):
        self.address, self.free = create(), free

    def __del__(self) -> None:
        self.free(ctypes.c_void_p(self.address))


class Context(threading.local):
    """What zstd decodes with, one for each thread; freed with the thread."""

    def __init__(self) -> None:
        # A thread that ends drops what it holds, but nobody calls __del__ of the threading.local itself.
        self.owned = Allocation(LIBRARY.ZSTD_createDCtx, LIBRARY.ZSTD_freeDCtx) if LIBRARY else None

    @property
    def address(self) -> int:
        """The address of this thread's context; 0 without the library."""
        return self.owned.address if self.owned else 0
