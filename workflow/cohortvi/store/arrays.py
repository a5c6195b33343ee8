"""One-dimensional zarr v3 arrays, read by ranges and written as a stream, without zarr-python in the loop.

A range costs one read per file and, per chunk, a crc32c check and a call of the codec, during which other threads run.
What is written is an ordinary sharded array of few large files: any zarr v3 reader opens it. Arrays of another layout,
such as other programs write, are read through zarr-python: slower, the same values.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numcodecs
import numpy as np
import zarr
from numcodecs import blosc
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.codecs.numcodecs import Delta
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from cohortvi.files import remove
from cohortvi.store import native
from cohortvi.store.kernels import accumulate
from cohortvi.store.native import ABSENT, BAD_BLOSC, BAD_CRC, CRC_BYTES, OK, decode_chunks

FILE_CHUNKS = 8_192  # chunks a file: a few hundred MB, so that a cohort has hundreds of files
SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class Codec(NamedTuple):
    """How the values of an array lie in chunks of so many: as differences or not, then Blosc."""

    cname: str
    clevel: int
    shuffle: str
    delta: bool = False
    chunk: int = 32_768


class _Layout(NamedTuple):
    """What is needed to decode an array by hand."""

    chunk: int  # values a chunk
    shard: int  # values a file
    codec: str  # blosc, zstd, or "" for values as they are
    delta: bool
    checked: bool  # every chunk ends with its crc32c


def _layout(array: zarr.Array) -> _Layout | None:
    """Return the layout of an array that can be decoded by hand; None for all others."""
    codecs = getattr(array.metadata, "codecs", ())
    if array.ndim != 1 or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return None
    sharding = codecs[0]
    index = [type(codec) for codec in sharding.index_codecs]
    if index != [BytesCodec, Crc32cCodec] or sharding.index_location.value != "end" or array.fill_value != 0:
        return None
    inner = list(sharding.codecs)
    delta = isinstance(inner[0], Delta) and np.dtype(inner[0].codec_config["dtype"]) == array.dtype
    inner = inner[delta:]
    if not inner or not isinstance(inner.pop(0), BytesCodec) or array.dtype.kind not in "iufb":
        return None
    checked = bool(inner) and isinstance(inner[-1], Crc32cCodec)
    inner = inner[: len(inner) - checked]
    names = {BloscCodec: "blosc", ZstdCodec: "zstd"}
    if len(inner) > 1 or (inner and type(inner[0]) not in names):
        return None
    codec = names[type(inner[0])] if inner else ""
    return _Layout(sharding.chunk_shape[0], array.metadata.chunk_grid.chunk_shape[0], codec, delta, checked)


class ArrayReader:
    """A one-dimensional array of numbers, read by ranges from any thread."""

    def __init__(self, array: zarr.Array):
        self.array, self.size, self.dtype = array, array.shape[0], array.dtype
        self.layout = _layout(array)
        local = isinstance(array.store, LocalStore)
        self.folder = Path(array.store.root) / array.path if local else None
        self.indexes: dict[int, np.ndarray] = {}

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
        if self.layout is None:
            out[:] = self.array[start:stop]
            return out
        for file in range(start // self.layout.shard, -(-stop // self.layout.shard)):
            first = file * self.layout.shard
            low, high = max(start, first), min(stop, first + self.layout.shard)
            self._read_file(file, low - first, high - first, out[low - start : high - start])
        return out

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
        places = index[first:last].copy()
        there = places[:, 0] != ABSENT
        begin = int(places[there, 0].min(initial=ABSENT))
        end = int((places[there, 0] + places[there, 1]).max(initial=0))
        raw = self._bytes(file, begin, end) if begin < end else np.empty(0, np.uint8)
        places[there, 0] -= np.uint64(begin)
        skip, layout = start - first * size, self.layout
        if layout.codec == "blosc" and native.AVAILABLE:
            room = np.empty(size, self.dtype)
            chunk, failure = decode_chunks(raw, places, skip, out, room, layout.checked, layout.delta)
        else:
            chunk, failure = self._decode_chunks(raw, places, skip, out)
        if failure:
            wrong = "differs from its crc32c" if failure == BAD_CRC else f"cannot be decoded to {size} values"
            raise ValueError(f"{self.array.path}/c/{file}: chunk {first + chunk} {wrong}")

    def _decode_chunks(self, raw: np.ndarray, places: np.ndarray, skip: int, out: np.ndarray) -> tuple[int, int]:
        """Do as `decode_chunks` does, for any codec, chunk by chunk through Python."""
        size = self.layout.chunk
        for chunk, (offset, length) in enumerate(places.tolist()):
            first = max(0, skip - chunk * size)
            begin = chunk * size + first - skip
            data = raw[offset : offset + length] if offset != ABSENT else None
            if data is not None and self.layout.checked:
                data, stored = data[:-CRC_BYTES], data[-CRC_BYTES:].tobytes()
                if _crc(data) != stored:
                    return chunk, BAD_CRC
            decoded = np.zeros(size, self.dtype) if data is None else self._decoded(data)
            if len(decoded) != size:
                return chunk, BAD_BLOSC
            if self.layout.delta:
                accumulate(decoded)
            n = min(size - first, len(out) - begin)
            out[begin : begin + n] = decoded[first : first + n]
        return 0, OK

    def _decoded(self, data: np.ndarray) -> np.ndarray:
        codecs = {"blosc": blosc.decompress, "zstd": numcodecs.Zstd().decode, "": bytes}
        return np.frombuffer(bytearray(codecs[self.layout.codec](data)), self.dtype)

    def _index(self, file: int) -> np.ndarray:
        """Return offset and length in bytes of each chunk of a file, (n, 2) uint64."""
        if file not in self.indexes:
            n_chunks = self.layout.shard // self.layout.chunk
            raw = self._bytes(file, -(16 * n_chunks + CRC_BYTES), None)
            if _crc(raw[:-CRC_BYTES]) != raw[-CRC_BYTES:].tobytes():
                raise ValueError(f"{self.array.path}/c/{file}: the index of its chunks differs from its crc32c")
            self.indexes[file] = raw[:-CRC_BYTES].copy().view("<u8").reshape(n_chunks, 2)
        return self.indexes[file]

    def _bytes(self, file: int, start: int, stop: int | None) -> np.ndarray:
        """Return bytes start:stop of a file; with a negative start and no stop, its last bytes.

        They lie in memory that this thread's next call writes over.
        """
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


def _pread(path: Path, start: int, stop: int | None) -> np.ndarray:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if stop is None:
            start, stop = max(os.fstat(descriptor).st_size + start, 0), os.fstat(descriptor).st_size
        raw, filled = _scratch(stop - start), 0
        while filled < len(raw):
            got = os.preadv(descriptor, [raw[filled:]], start + filled)
            if not got:
                break
            filled += got
        return raw[:filled]
    finally:
        os.close(descriptor)


class _Recycled(threading.local):
    """Memory for what is read and decoded at once, one piece a thread: fresh pages cost more than the reading."""

    raw = np.empty(0, np.uint8)


_RECYCLED = _Recycled()


def _scratch(size: int) -> np.ndarray:
    if len(_RECYCLED.raw) < size:
        _RECYCLED.raw = np.empty(size + size // 4, np.uint8)
    return _RECYCLED.raw[:size]


class ArrayWriter:
    """An array of unknown length, written chunk by chunk; `close` makes it a member of its group."""

    def __init__(self, group: zarr.Group, folder: Path, name: str, dtype: str, codec: Codec, *, grows: bool = False):
        """`folder`: where the group lies; `grows`: unsigned values lie in the smallest type, from `dtype` on."""
        self.group, self.name, self.codec, self.grows = group, name, codec, grows
        self.dtype = np.dtype(dtype)
        self.buffer, self.filled, self.size = np.empty(codec.chunk, np.uint32 if grows else dtype), 0, 0
        self.folder, self.chunks = folder / name, _ChunkFiles(folder / f"{name}.chunks")
        self.sha = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        """Add values to the end."""
        # Digests are of the values, whatever type and chunks they lie in.
        self.sha.update(np.ascontiguousarray(values, "<i8" if self.dtype.kind == "i" else "<u4"))
        self.size += len(values)
        while len(values):
            taken = min(len(values), self.codec.chunk - self.filled)
            self.buffer[self.filled : self.filled + taken] = values[:taken]
            self.filled, values = self.filled + taken, values[taken:]
            if self.filled == self.codec.chunk:
                self._flush(self.filled)

    def close(self) -> None:
        """Write what is left, and the metadata."""
        chunk = min(max(self.size, 1), self.codec.chunk)
        if self.filled:
            self.buffer[self.filled : chunk] = 0
            self._flush(chunk)
        per_file = self.chunks.close()
        self.group.create_array(
            self.name,
            shape=(self.size,),
            dtype=self.dtype,
            chunks=(chunk,),
            shards=(per_file * chunk,),
            filters=[Delta(dtype=self.dtype.str)] if self.codec.delta else None,
            compressors=[
                BloscCodec(cname=self.codec.cname, clevel=self.codec.clevel, shuffle=self.codec.shuffle),
                Crc32cCodec(),
            ],
            fill_value=0,
        )
        self.chunks.folder.rename(self.folder / "c")

    def _flush(self, size: int) -> None:
        values, self.filled = self.buffer[:size], 0
        if self.grows:
            wider = np.promote_types(self.dtype, np.min_scalar_type(values.max(initial=0)))
            if wider != self.dtype:
                self._widen(wider)
        self.chunks.add(encode(values.astype(self.dtype), self.codec))

    def _widen(self, dtype: np.dtype) -> None:
        """Write the chunks that are there again, as values of a wider type."""
        narrow, folder = self.chunks, self.chunks.folder
        narrow.folder = folder.rename(folder.with_suffix(".narrow"))
        self.chunks = _ChunkFiles(folder)
        for data in narrow:
            self.chunks.add(encode(decode(data, self.dtype, self.codec).astype(dtype), self.codec))
        remove(narrow.folder)
        self.dtype = dtype


class _ChunkFiles:
    """The files of an array that is being written: encoded chunks, each with its crc32c, and an index at the end."""

    def __init__(self, folder: Path):
        self.folder, self.lengths = folder, []
        folder.mkdir()

    def add(self, data: bytes) -> None:
        file = len(self.lengths) // FILE_CHUNKS
        if file and len(self.lengths) % FILE_CHUNKS == 0:
            self._write_index(file - 1, FILE_CHUNKS)
        with (self.folder / str(file)).open("ab") as out:
            self.lengths.append(out.write(data + _crc(data)))

    def close(self) -> int:
        """Write the last index; return the number of chunks that each file has room for."""
        last = max(len(self.lengths) - 1, 0) // FILE_CHUNKS
        room = FILE_CHUNKS if last else max(len(self.lengths), 1)
        if self.lengths:
            self._write_index(last, room)
        return room

    def _write_index(self, file: int, room: int) -> None:
        lengths = np.array(self.lengths[file * FILE_CHUNKS : (file + 1) * FILE_CHUNKS], np.uint64)
        index = np.full((room, 2), ABSENT, "<u8")
        index[: len(lengths), 0] = np.cumsum(lengths) - lengths
        index[: len(lengths), 1] = lengths
        with (self.folder / str(file)).open("ab") as out:
            out.write(index.tobytes() + _crc(index.tobytes()))

    def __iter__(self) -> Iterator[bytes]:
        """Yield the encoded chunks."""
        for file in range(-(-len(self.lengths) // FILE_CHUNKS)):
            with (self.folder / str(file)).open("rb") as data:
                for length in self.lengths[file * FILE_CHUNKS : (file + 1) * FILE_CHUNKS]:
                    yield data.read(length)[:-CRC_BYTES]


def _crc(data: bytes | np.ndarray) -> bytes:
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def encode(values: np.ndarray, codec: Codec) -> bytes:
    """Return the values of a chunk as they lie on disk, without a checksum."""
    if codec.delta:
        values = np.diff(values, prepend=values.dtype.type(0))
    return blosc.compress(values, codec.cname.encode(), codec.clevel, SHUFFLES[codec.shuffle])


def decode(data: bytes, dtype: np.dtype, codec: Codec) -> np.ndarray:
    """Return the values that `encode` took."""
    values: Any = np.frombuffer(blosc.decompress(data), dtype).copy()
    if codec.delta:
        accumulate(values)
    return values
