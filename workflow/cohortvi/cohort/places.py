"""Where the counts of a sample lie, on disk or behind a URL, and what is said if they cannot be read.

Every fault of an input is an InputError whose message names path, sample, what was found, what was expected and what
to do. Nothing here knows what a format holds.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import h5py
import zarr
from fsspec.implementations.local import LocalFileSystem

from cohortvi.cohort.sheet import Sample

SUFFIXES = {".h5ad": "h5ad", ".zarr": "zarr", ".h5": "10x_h5", ".loom": "loom"}
MEMBERS = {"zarr.json": "zarr", ".zgroup": "zarr", "matrix.mtx": "10x_mtx", "matrix.mtx.gz": "10x_mtx"}
FORMATS = ("h5ad", "zarr", "10x_h5", "10x_mtx", "loom")

# What h5py, zarr and its codecs, gzip, anndata and pandas raise on truncated, damaged and other files.
UNREADABLE = (OSError, EOFError, LookupError, RuntimeError, ValueError, zlib.error)


class InputError(ValueError):
    """A fault of the user's input, said in full."""


def fault(sample: Sample, found: str, advice: str) -> InputError:
    """Return the error that says what was `found` in a sample's file, and what was expected and is to be done."""
    return InputError(f"{sample.path}: sample {sample.name!r} {found}; {advice}")


@dataclass(frozen=True)
class Place:
    """A sample's file or folder: a path in a file system, and the format it is read as."""

    sample: Sample
    fs: fsspec.AbstractFileSystem
    path: str
    format: str

    def fault(self, found: str, advice: str) -> InputError:
        """Return the error that says what was `found` here, and what to do."""
        return fault(self.sample, found, advice)

    @property
    def is_local(self) -> bool:
        """Whether the path lies on this machine's own file systems."""
        return isinstance(self.fs, LocalFileSystem)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever a library raises on an unreadable file into an InputError."""
        try:
            yield
        except InputError:
            raise
        except UNREADABLE as error:
            raise self.fault(
                f"cannot be read as {self.format} ({type(error).__name__}: {error})",
                "expected a whole file of that format: copy or write it anew, or correct `format` in the sheet",
            ) from error

    @contextmanager
    def hdf5(self) -> Iterator[h5py.File]:
        """Open the HDF5 file for reading."""
        with self.reading():
            if self.is_local:
                with h5py.File(self.path, "r") as file:
                    yield file
            else:
                with self.fs.open(self.path, "rb") as stream, h5py.File(stream, "r") as file:
                    yield file

    @contextmanager
    def zarr(self) -> Iterator[zarr.Group]:
        """Open the zarr group (v2 or v3) for reading."""
        with self.reading():
            if self.is_local:
                yield zarr.open_group(self.path, mode="r")
            else:
                store = zarr.storage.FsspecStore.from_url(self.sample.path.rstrip("/"), read_only=True)
                yield zarr.open_group(store, mode="r")


def locate(sample: Sample) -> Place:
    """Find the file of a sample and its format: that of the sheet, else guessed from name and members.

    Errors: InputError for a URL that cannot be opened, a missing file, an unknown format.
    """
    if sample.format is not None and sample.format not in FORMATS:
        advice = f"expected one of {', '.join(FORMATS)}: correct `format` in the sheet, or leave it empty to be guessed"
        raise fault(sample, f"has format {sample.format!r}", advice)
    try:
        fs, path = fsspec.url_to_fs(sample.path)
        path = path.rstrip("/")
        members = [name for name in MEMBERS if fs.exists(f"{path}/{name}")]
        exists = bool(members) or fs.exists(path)
    except (ImportError, ValueError, OSError) as error:
        raise fault(
            sample,
            f"has a path that cannot be opened ({error})",
            "expected a path, or a URL whose fsspec driver is installed: install it, or correct `path` in the sheet",
        ) from error
    if not exists:
        raise fault(sample, "does not exist", "expected a file or folder: correct `path` in the sheet")
    place = Place(sample, fs, path, sample.format or _guess(path, members))
    if not place.format:
        raise place.fault(
            "has an unknown format",
            "expected .h5ad, .zarr, .h5 (10x), .loom, or a folder with zarr.json, .zgroup or matrix.mtx[.gz]: "
            f"set `format` in the sheet to one of {', '.join(FORMATS)}",
        )
    return place


def _guess(path: str, members: list[str]) -> str:
    by_name = (format for suffix, format in SUFFIXES.items() if path.lower().endswith(suffix))
    by_member = (MEMBERS[name] for name in members)
    return next(by_member, "") or next(by_name, "")
