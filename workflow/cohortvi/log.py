"""One log format for every rule: one line an event, to the rule's log file and to standard error."""

import logging
import resource
import sys
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("cohortvi")


def start(path: str | Path, *, mode: str = "w", errors_only: bool = False) -> logging.Logger:
    """Send the log, and whatever ends the script, to `path` and to standard error; return the logger.

    `mode`: w begins the file anew, a adds to it. `errors_only`: of processes beside the one that tells of the work.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logger.setLevel(logging.ERROR if errors_only else logging.INFO)
    logger.handlers.clear()
    for handler in (logging.FileHandler(path, mode=mode), _Stderr()):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    sys.excepthook = _log_exception
    return logger


def peak_memory_mb() -> float:
    """Return the most memory that this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)  # bytes there, kilobytes here


def _log_exception(kind, value, traceback) -> None:
    # A ValueError is written for the user and says all; anything else is ours to debug and needs the traceback.
    if issubclass(kind, ValueError) and str(value):
        logger.error("error: %s", value)
        logger.debug("traceback", exc_info=(kind, value, traceback))
    else:
        logger.error("error: %s", value, exc_info=(kind, value, traceback))


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a bar that is shown puts lines above itself by replacing it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr
