"""One log format for every rule: one line an event, to the rule's log file and to standard error."""

import logging
import resource
import sys
import time
from pathlib import Path

logger = logging.getLogger("cohortvi")


def start(path: str | Path, *, mode: str = "w", errors_only: bool = False) -> logging.Logger:
    """Send the log, and whatever ends the script, to `path` and to standard error; return the logger.

    `mode`: w begins the file anew, a adds to it. `errors_only`: of processes beside the one that tells of the work.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logger.setLevel(logging.ERROR if errors_only else logging.INFO)
    logger.handlers.clear()
    for handler in (logging.FileHandler(path, mode=mode), logging.StreamHandler(sys.stderr)):
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


class Progress:
    """Lines of progress at most every `seconds`, with cells a second and the time that is left."""

    def __init__(self, total_cells: int, seconds: float = 10.0):
        self.total, self.seconds = total_cells, seconds
        self.began = self.last = time.monotonic()

    def report(self, done_cells: int, text: str) -> None:
        """Log `text` with the rate, if the last line is old enough or all cells are done."""
        now = time.monotonic()
        if now - self.last < self.seconds and done_cells < self.total:
            return
        self.last = now
        rate = done_cells / max(now - self.began, 1e-9)
        left = (self.total - done_cells) / max(rate, 1e-9)
        logger.info("%s  %s cells/s  eta %.1f min", text, f"{rate:,.0f}", left / 60)
