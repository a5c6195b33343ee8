"""Files that are whole or absent: everything is written under a temporary name and renamed when complete.

A path that exists under its own name is complete. `NAME.partial` is what a killed writer left; the next writer of
NAME removes it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (file or folder); rename it to `path` when the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            remove(path)
        partial.replace(path)
    finally:
        remove(partial)


def remove(path: str | Path) -> None:
    """Remove a file or a folder with all it holds; nothing happens if it is not there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(value: Any, path: str | Path) -> None:
    """Write `value` as JSON with sorted keys, so that equal values give equal bytes."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as parquet, index included."""
    with replacing(path) as partial:
        table.to_parquet(partial)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a parquet table."""
    return pd.read_parquet(path)


def write_tables(tables: Iterable[pd.DataFrame], path: str | Path) -> None:
    """Write tables of the same columns, one after the other, as one; no more than one of them is in memory."""
    with replacing(path) as partial, ExitStack() as stack:
        writer = None
        for table in map(pa.Table.from_pandas, tables):
            writer = writer or stack.enter_context(pq.ParquetWriter(partial, table.schema))
            writer.write_table(table)


def read_columns(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of a parquet table without its index, which names every cell."""
    return pq.read_table(path, columns=list(columns)).to_pandas().reset_index(drop=True)


class Tables(Mapping[str, pd.DataFrame]):
    """Parquet tables by the names of their files; each is read whenever it is asked for, none is kept."""

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = {Path(path).stem: Path(path) for path in paths}

    def __getitem__(self, name: str) -> pd.DataFrame:
        return read_table(self.paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def digest(*values: Any) -> str:
    """Return 16 hexadecimal digits of SHA-256 over JSON-able values, strings, bytes and numpy arrays, in order."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            part = np.ascontiguousarray(value)
            sha.update(f"{part.dtype.str}{part.shape}".encode())
            sha.update(part.tobytes())
        elif isinstance(value, bytes):
            sha.update(value)
        else:
            sha.update(json.dumps(value, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]
