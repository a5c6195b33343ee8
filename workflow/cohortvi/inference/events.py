"""The history of a training for TensorBoard, as event files."""

from pathlib import Path
from typing import Any


class Events:
    """Writes the history into a folder, row by row; a run that goes on replaces the rows that it takes again."""

    def __init__(self, folder: Path | None, step: int):
        """`folder`: None writes nothing; `step`: where the run stands."""
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom asked for

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Add the values of an epoch, each a scalar of its name, at the epoch's last step."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
