"""What peers found, which takes hours: made once by each version of theirs, and kept with the code, in peers.json."""

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cohortvi.files import read_json, write_json

KEPT = Path(__file__).parent / "peers.json"


def once(key: str, package: str, make: Callable[[], dict[str, float]], kept: Path = KEPT) -> dict[str, float]:
    """Return what `make` found for this key with the installed version of a package, now or before."""
    made_by = f"{package} {version(package)}"
    found = _read(kept).get(key, {})
    if found.get("made_by") != made_by:
        found = make() | {"made_by": made_by}
        with alone(kept):
            write_json(_read(kept) | {key: found}, kept)
    return {name: value for name, value in found.items() if name != "made_by"}


@contextmanager
def alone(kept: Path) -> Iterator[None]:
    """Let no other process of this machine write these results meanwhile."""
    with (Path(tempfile.gettempdir()) / f"cohortvi-{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(kept: Path) -> dict[str, dict]:
    return read_json(kept) if kept.exists() else {}
