"""One-dimensional zarr v3 arrays, read by ranges without zarr-python in the loop.

A range costs one read per file and one call that checks and decodes its chunks, during which other threads run. Arrays
of another layout, such as other programs write, are read through zarr-python: slower, the same values.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numcodecs
import numpy as np
import zarr
from numcodecs import blosc
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, Endian, ShardingCodec, VLenUTF8Codec, ZstdCodec
from zarr.codecs.numcodecs import Delta
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from cohortvi.store import native
from cohortvi.store.codec import crc
from cohortvi.store.libraries import Context
from cohortvi.store.native import (
    ABSENT,
    BAD_BLOSC,
    BAD_CRC,
    BAD_READ,
    CRC_BYTES,
    JOB,
    NOT_DONE,
    OK,
    decode_chunks,
    read_chunks,
    span,
)

PLACE_BYTES = 16  # of a chunk in the index of its file
_CONTEXT = Context()


class _Layout(NamedTuple):
    """What is needed to decode an array by hand; of text, to check it."""

    chunk: int  # values a chunk
    shard: int  # values a file
    codec: str  # blosc, zstd, "" for values as they are, or text, which zarr decodes
    delta: bool
    checked: bool  # every chunk ends with its crc32c


def _layout(array: zarr.Array) -> _Layout | None:
    """Return the layout of an array that can be decoded, or checked, by hand; None for all others."""
    codecs = getattr(array.metadata, "codecs", ())
    if array.ndim != 1 or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    sharding = codecs[0]
    index = [type(codec) for codec in sharding.index_codecs]
    if index != [BytesCodec, Crc32cCodec] or sharding.index_location.value != "end" or array.fill_value not in (0, ""):
        return None
    sizes, inner = (sharding.chunk_shape[0], array.metadata.chunk_grid.chunk_shape[0]), list(sharding.codecs)
    if isinstance(inner[0], VLenUTF8Codec):
        return _Layout(*sizes, "text", delta=False, checked=isinstance(inner[-1], Crc32cCodec))
    delta = isinstance(inner[0], Delta) and np.dtype(inner[0].codec_config["dtype"]) == array.dtype
    inner = inner[delta:]
    if not inner or not isinstance(inner[0], BytesCodec) or array.dtype.kind not in "iufb":
        return None
    if inner.pop(0).endian not in (None, Endian.little):
        return None
    checked = bool(inner) and isinstance(inner[-1], Crc32cCodec)
    inner = inner[: len(inner) - checked]
    names = {BloscCodec: "blosc", ZstdCodec: "zstd"}
    if len(inner) > 1 or (inner and type(inner[0]) not in names):
        return None
    codec = names[type(inner[0])] if inner else ""
    return _Layout(*sizes, codec, delta, checked)


class ArrayReader:
    """A one-dimensional array of numbers, read by ranges from any thread."""

    def __init__(self, array: zarr.Array):
        self.array, self.size, self.dtype = array, array.shape[0], array.dtype
        self.layout = _layout(array)
        local = isinstance(array.store, LocalStore)
        self.folder = Path(array.store.root) / array.path if local else None
        # By `setdefault`, since other threads may do the same: compiled code is given the addresses of what lies here.
        self.indexes: dict[int, np.ndarray] = {}
        self.paths: dict[int, np.ndarray] = {}

    @property
    def checked(self) -> bool:
        """Whether damage of any chunk is told by a checksum."""
        return self.layout is not None and self.layout.checked

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return values start:stop, in `out` if it is given (stop - start values of the array's own type).

        Errors: ValueError, RuntimeError or OSError, as file system and codec give them, for what cannot be read.
        """
        if out is None:
            out = np.empty(stop - start, self.dtype)
        if self.layout is None or self.layout.codec == "text":
            out[:] = self.array[start:stop]
            return out
        for file in range(start // self.layout.shard, -(-stop // self.layout.shard)):
            first = file * self.layout.shard
            low, high = max(start, first), min(stop, first + self.layout.shard)
            self._read_file(file, low - first, high - first, out[low - start : high - start])
        return out

    @property
    def is_native(self) -> bool:
        """Whether compiled code can read and check files of the array by itself."""
        is_blosc = self.checked and self.layout.codec == "blosc"
        return native.AVAILABLE and self.folder is not None and is_blosc and self.dtype.kind in "iu"

    def jobs(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Return jobs (n,), native.JOB, that read values starts[k]:stops[k] to place out[k], if the array `is_native`.

        Of one that lies in several files the size is -1: it is to be read in another way. Errors: as of `read`.
        """
        jobs, layout = np.zeros(len(starts), JOB), self.layout
        files, low = np.divmod(starts, layout.shard)
        high = stops - files * layout.shard
        first = low // layout.chunk
        for file in np.unique(files[stops > starts]).tolist():
            of_file = (files == file) & (stops > starts)
            jobs["path"][of_file] = _address(self._path(file))
            jobs["places"][of_file] = _address(self._index(file)) + first[of_file] * PLACE_BYTES
        n_chunks = np.where(stops > starts, -(-high // layout.chunk) - first, 0)
        jobs["n_chunks"], jobs["skip"], jobs["failure"] = n_chunks, low - first * layout.chunk, NOT_DONE
        jobs["out"], jobs["size"] = out, np.where(high > layout.shard, -1, high - low)
        jobs["chunk_bytes"], jobs["delta"] = layout.chunk * self.dtype.itemsize, layout.delta
        return jobs

    @property
    def files(self) -> list[str]:
        """The names of the files in which the array lies, from the root of its store."""
        size = (self.array.shards or self.array.chunks)[0]
        return [f"{self.array.path}/c/{file}" for file in range(-(-self.size // size))]

    def check_files(self) -> None:
        """Read the index of each file of an array that is `checked`; errors as of `read`."""
        for file in range(len(self.files) * self.checked):
            self._index(file)

    def stored(self, file: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Yield of each chunk of a file its number, its bytes, and whether these are what its crc32c was made of.

        For an array that is `checked`; errors as of `read`.
        """
        for chunk, (offset, length) in enumerate(self._index(file).tolist()):
            if offset != ABSENT:
                raw = self._bytes(file, offset, offset + length)
                data, checksum = raw[:-CRC_BYTES], raw[-CRC_BYTES:].tobytes()
                yield chunk, data, crc(data) == checksum

    def _read_file(self, file: int, start: int, stop: int, out: np.ndarray) -> None:
        """Decode values start:stop, counted from the file's first, in one read from its first to its last chunk."""
        size = self.layout.chunk
        try:
            index = self._index(file)
        except FileNotFoundError:
            if self.layout.checked:
                raise
            out[:] = 0  # zarr stores no file for zeros alone; what this program writes has all its files
            return
        first, last = start // size, -(-stop // size)
        places, skip = index[first:last], start - first * size
        chunk, failure = self._decode(file, places, skip, out)
        if failure:
            wrong = "differs from its crc32c" if failure == BAD_CRC else f"cannot be decoded to {size} values"
            raise ValueError(f"{self.array.path}/c/{file}: chunk {first + chunk} {wrong}")

    def _decode(self, file: int, places: np.ndarray, skip: int, out: np.ndarray) -> tuple[int, int]:
        layout, itemsize = self.layout, self.dtype.itemsize
        target = (places, skip, out.view(f"u{itemsize}"), layout.chunk * itemsize)
        is_native = layout.codec == "blosc" and native.AVAILABLE
        if is_native and self.folder is not None:
            chunk, failure = read_chunks(
                _address(self._path(file)), *target, _CONTEXT.address, layout.checked, layout.delta
            )
            if failure != BAD_READ:
                return chunk, failure
        begin, end = span(places)
        raw = self._bytes(file, begin, end) if end else np.empty(0, np.uint8)
        if is_native:
            return decode_chunks(raw, begin, *target, _CONTEXT.address, layout.checked, layout.delta)
        return self._decode_chunks(raw, begin, places, skip, out)

    def _decode_chunks(
        self, raw: np.ndarray, begin: int, places: np.ndarray, skip: int, out: np.ndarray
    ) -> tuple[int, int]:
        """Do as `decode_chunks` does, for any codec, chunk by chunk through Python."""
        size = self.layout.chunk
        for chunk, (offset, length) in enumerate(places.tolist()):
            first = max(0, skip - chunk * size)
            filled = chunk * size + first - skip
            data = raw[offset - begin : offset - begin + length] if offset != ABSENT else None
            if data is not None and self.layout.checked:
                data, stored = data[:-CRC_BYTES], data[-CRC_BYTES:].tobytes()
                if crc(data) != stored:
                    return chunk, BAD_CRC
            decoded = np.zeros(size, self.dtype) if data is None else self._decoded(data)
            if len(decoded) != size:
                return chunk, BAD_BLOSC
            if self.layout.delta:
                decoded = np.cumsum(decoded, dtype=self.dtype)
            n = min(size - first, len(out) - filled)
            out[filled : filled + n] = decoded[first : first + n]
        return 0, OK

    def _decoded(self, data: np.ndarray) -> np.ndarray:
        codecs = {"blosc": blosc.decompress, "zstd": numcodecs.Zstd().decode, "": bytes}
        return np.frombuffer(codecs[self.layout.codec](data), self.dtype)

    def _index(self, file: int) -> np.ndarray:
        """Return offset and length in bytes of each chunk of a file, (n, 2) uint64."""
        if file not in self.indexes:
            n_chunks = self.layout.shard // self.layout.chunk
            raw = self._bytes(file, -(PLACE_BYTES * n_chunks + CRC_BYTES), None)
            if crc(raw[:-CRC_BYTES]) != raw[-CRC_BYTES:].tobytes():
                raise ValueError(f"{self.array.path}/c/{file}: the index of its chunks differs from its crc32c")
            self.indexes.setdefault(file, raw[:-CRC_BYTES].copy().view("<u8").reshape(n_chunks, 2))
        return self.indexes[file]

    def _path(self, file: int) -> np.ndarray:
        """Return the name of a file, as C wants it."""
        if file not in self.paths:
            name = os.fsencode(self.folder / "c" / str(file)) + b"\0"
            self.paths.setdefault(file, np.frombuffer(name, np.uint8))
        return self.paths[file]

    def _bytes(self, file: int, start: int, stop: int | None) -> np.ndarray:
        """Return bytes start:stop of a file; with a negative start and no stop, its last bytes."""
        name = f"{self.array.path}/c/{file}"
        if self.folder is None:
            request = RangeByteRequest(start, stop) if stop is not None else SuffixByteRequest(-start)
            got = sync(self.array.store.get(name, default_buffer_prototype(), request))
            if got is None:
                raise FileNotFoundError(f"{name}: no such file")
            raw = np.frombuffer(got.to_bytes(), np.uint8)
        else:
            raw = _pread(self.folder / "c" / str(file), start, stop)
        wanted = -start if stop is None else stop - start
        if len(raw) != wanted:
            raise ValueError(f"{name}: {len(raw)} bytes could be read from byte {start} on, where {wanted} should be")
        return raw


def do_jobs(jobs: np.ndarray, claimed: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Do the jobs that no other thread takes; as `native.do_jobs`, in this thread."""
    native.do_jobs(jobs, claimed, _CONTEXT.address, first, second)


def arrays_of(group: zarr.Group) -> list[ArrayReader]:
    """Return all arrays of a group and of those within it."""
    return [ArrayReader(found) for _, found in group.members(max_depth=None) if isinstance(found, zarr.Array)]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _pread(path: Path, start: int, stop: int | None) -> np.ndarray:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if stop is None:
            start, stop = max(os.fstat(descriptor).st_size + start, 0), os.fstat(descriptor).st_size
        raw, filled = np.empty(stop - start, np.uint8), 0
        while filled < len(raw):
            got = os.preadv(descriptor, [raw[filled:]], start + filled)
            if not got:
                break
            filled += got
        return raw[:filled]
    finally:
        os.close(descriptor)
