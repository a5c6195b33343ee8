"""The history of a training for TensorBoard, as event files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cohortvi.files import remove


class Events:
    """Writes the history into a folder, row by row."""

    def __init__(self, folder: Path | None, rows: Iterable[dict[str, Any]]):
        """`folder`: what it held is replaced by `rows`, the history so far; None writes nothing."""
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom asked for

            remove(folder)
            self.writer = SummaryWriter(str(folder))
            for row in rows:
                self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Add the values of an epoch that it has, each a scalar of its name, at the epoch's last step."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "step") and value is not None:
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
