"""Matrices that are not stored by cells, laid out anew in a temporary file so that rows can be read from them.

Memory is bounded by PIECE while entries are streamed, and by the entries of one band of rows while rows are read.
"""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import IO

import numpy as np
import scipy.sparse as sp

from cohortvi.cohort.matrices import Reader, Root, check_within
from cohortvi.cohort.places import Place

PIECE = 1 << 20  # entries streamed at a time

Entries = Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]


@dataclass(eq=False)
class Banded:
    """A matrix stored by genes or in no order, laid out anew by bands of rows when it is first read.

    `entries` streams (rows, columns, values), twice: once to count each band's, once to put them in their places of an
    unnamed temporary file, which vanishes with this object, or with the process however it ends. Entries of the same
    row and column add up.
    """

    place: Place
    shape: tuple[int, int]
    dtype: np.dtype
    band: int
    entries: Callable[[], Entries]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _layout: tuple[IO, np.ndarray] | None = None

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the laid-out file for reading rows; the first call lays it out."""
        with self._lock:
            self._layout = self._layout or self._lay_out()
        read_band = lru_cache(maxsize=1)(partial(self._read_band, *self._layout))

        def read(start: int, stop: int) -> sp.csr_matrix:
            bands = range(start // self.band, -(-stop // self.band))
            parts = [read_band(n)[max(start - n * self.band, 0) : stop - n * self.band] for n in bands]
            return sp.vstack(parts, format="csr")

        yield read

    def peek(self) -> np.ndarray:
        """Return the first values streamed."""
        with closing(self.entries()) as entries:
            return next(entries, (None, None, np.empty(0, self.dtype)))[2]

    @property
    def _record(self) -> np.dtype:
        return np.dtype([("row", np.int32), ("column", np.int32), ("value", self.dtype)])

    def _lay_out(self) -> tuple[IO, np.ndarray]:
        n_bands = -(-self.shape[0] // self.band)
        counts = np.zeros(n_bands, np.int64)
        with closing(self.entries()) as entries:
            for rows, columns, _ in entries:
                check_within(self.place, rows, self.shape[0], "cell")
                check_within(self.place, columns, self.shape[1], "gene")
                counts += np.bincount(rows // self.band, minlength=n_bands)
        ends = np.concatenate([[0], np.cumsum(counts)])
        self._check_room(int(ends[-1]) * self._record.itemsize)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as this object is)
        weakref.finalize(self, file.close)
        self._fill(file, ends)
        return file, ends

    def _check_room(self, n_bytes: int) -> None:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            raise OSError(
                f"{self.place.sample.path}: sample {self.place.sample.name!r} is not stored by cells and needs "
                f"{n_bytes:,} bytes to be laid out anew, but {folder} has {free:,} left; "
                "set TMPDIR to a folder with room, or write the matrix as CSR"
            )

    def _fill(self, file: IO, ends: np.ndarray) -> None:
        places = ends[:-1].copy()
        with closing(self.entries()) as entries:
            for rows, columns, values in entries:
                bands = rows // self.band
                order = np.argsort(bands, kind="stable")
                records = np.empty(len(rows), self._record)
                records["row"], records["column"], records["value"] = rows[order], columns[order], values[order]
                stops = np.cumsum(np.bincount(bands, minlength=len(places)))
                for n in np.unique(bands):
                    part = records[stops[n - 1] if n else 0 : stops[n]]
                    file.seek(places[n] * self._record.itemsize)
                    file.write(part.tobytes())
                    places[n] += len(part)
        file.flush()

    def _read_band(self, file: IO, ends: np.ndarray, n: int) -> sp.csr_matrix:
        start = n * self.band
        shape = (min(self.band, self.shape[0] - start), self.shape[1])
        if ends[n] == ends[n + 1]:
            return sp.csr_matrix(shape, dtype=self.dtype)
        offset, length = ends[n] * self._record.itemsize, ends[n + 1] - ends[n]
        records = np.memmap(file, self._record, mode="r", offset=int(offset), shape=int(length))
        block = sp.csr_matrix((records["value"], (records["row"] - start, records["column"])), shape)
        block.sum_duplicates()
        return block


def transposed_entries(root: Root, node: str) -> Entries:
    """Stream the entries of a CSC matrix: (rows, columns, values)."""
    with root() as group:
        ends = np.asarray(group[node]["indptr"][:]).astype(np.int64)
        chunk = (group[node]["data"].chunks or (1,))[0]
        step = -(-PIECE // chunk) * chunk  # whole chunks, so that none is decoded twice
        for start in range(0, int(ends[-1]), step):
            part = slice(start, min(start + step, int(ends[-1])))
            per_column = np.diff(np.clip(ends, part.start, part.stop))
            columns = np.repeat(np.arange(len(per_column), dtype=np.int32), per_column)
            rows = np.asarray(group[node]["indices"][part]).astype(np.int64)
            yield rows, columns, np.asarray(group[node]["data"][part])
