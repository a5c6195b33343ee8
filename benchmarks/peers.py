"""What peers found, which takes hours: made once by each version of theirs, and kept with the code, in peers.json."""

import fcntl
import tempfile
from collections.abc import Callable
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
        with (Path(tempfile.gettempdir()) / "cohortvi-peers.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(_read(kept) | {key: found}, kept)
    return {name: value for name, value in found.items() if name != "made_by"}


def _read(kept: Path) -> dict[str, dict]:
    return read_json(kept) if kept.exists() else {}
