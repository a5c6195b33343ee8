"""One-dimensional zarr v3 arrays, written as a stream: few large files of checked chunks, for any reader of zarr v3."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from cohortvi.files import remove
from cohortvi.store.codec import Codec, crc, decode, encode
from cohortvi.store.native import ABSENT, CRC_BYTES

FILE_CHUNKS = 8_192  # chunks a file: a few hundred MB, so that a cohort has hundreds of files


class ArrayWriter:
    """An array of unknown length, written chunk by chunk; `close` makes it a member of its group.

    A context, whose end closes the file that is being written, whatever went wrong.
    """

    def __init__(self, group: zarr.Group, folder: Path, name: str, dtype: str, codec: Codec, *, grows: bool = False):
        """`folder`: where the group lies; `grows`: unsigned values lie in the smallest type, from `dtype` on."""
        self.group, self.name, self.codec, self.grows = group, name, codec, grows
        self.dtype = np.dtype(dtype)
        self.buffer, self.filled, self.size = np.empty(codec.chunk, np.uint32 if grows else dtype), 0, 0
        self.folder, self.chunks = folder / name, _ChunkFiles(folder / f"{name}.chunks")

    @property
    def digest(self) -> str:
        """The digest of the array, known when it is closed."""
        return self.chunks.sha.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.chunks.end()

    def append(self, values: np.ndarray) -> None:
        """Add values to the end."""
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
            filters=self.codec.filters(self.dtype),
            compressors=[self.codec.compressor(self.dtype), Crc32cCodec()],
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
        narrow.end()
        narrow.folder = folder.rename(folder.with_suffix(".narrow"))
        self.chunks = _ChunkFiles(folder)
        for data in narrow:
            self.chunks.add(encode(decode(data, self.dtype, self.codec).astype(dtype), self.codec))
        remove(narrow.folder)
        self.dtype = dtype


class _ChunkFiles:
    """The files of an array that is being written: encoded chunks, each with its crc32c, and an index at the end."""

    def __init__(self, folder: Path):
        self.folder, self.lengths, self.sha = folder, [], hashlib.sha256()
        self.file: BinaryIO | None = None
        folder.mkdir()

    def end(self) -> None:
        """Close the file that is being written, if there is one."""
        if self.file:
            self.file.close()

    def add(self, data: bytes) -> None:
        number, place = divmod(len(self.lengths), FILE_CHUNKS)
        if place == 0:
            if self.file:
                self._end_file(FILE_CHUNKS)
            self.file = (self.folder / str(number)).open("xb")
        self.sha.update(data)
        self.lengths.append(self.file.write(data + crc(data)))

    def close(self) -> int:
        """Write the last index; return the number of chunks that each file has room for."""
        room = FILE_CHUNKS if len(self.lengths) > FILE_CHUNKS else max(len(self.lengths), 1)
        if self.file:
            self._end_file(room)
        return room

    def _end_file(self, room: int) -> None:
        first = (len(self.lengths) - 1) // FILE_CHUNKS * FILE_CHUNKS
        lengths = np.array(self.lengths[first:], np.uint64)
        index = np.full((room, 2), ABSENT, "<u8")
        index[: len(lengths), 0] = np.cumsum(lengths) - lengths
        index[: len(lengths), 1] = lengths
        self.file.write(index.tobytes() + crc(index.tobytes()))
        self.end()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the encoded chunks."""
        for file in range(-(-len(self.lengths) // FILE_CHUNKS)):
            with (self.folder / str(file)).open("rb") as data:
                for length in self.lengths[file * FILE_CHUNKS : (file + 1) * FILE_CHUNKS]:
                    yield data.read(length)[:-CRC_BYTES]
