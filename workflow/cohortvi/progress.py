"""What a user sees of long work while it goes on."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cohortvi.log import logger


class Progress:
    """How far the work is, as a context: a line of the log at most every `seconds`, and a live bar in a terminal."""

    def __init__(self, total_cells: int, seconds: float = 10.0):
        self.total, self.seconds = total_cells, seconds
        self.began = self.last = time.monotonic()
        self.bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, done_cells: int, text: str) -> None:
        """Show `text` with the rate: on the bar; in the log too if the last line is old enough or all is done."""
        now = time.monotonic()
        rate = done_cells / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=done_cells, description=f"{text}  {rate:,.0f} cells/s")
        if now - self.last >= self.seconds or done_cells >= self.total:
            self.last = now
            left = (self.total - done_cells) / max(rate, 1e-9)
            logger.info("%s  %s cells/s  eta %.1f min", text, f"{rate:,.0f}", left / 60)
