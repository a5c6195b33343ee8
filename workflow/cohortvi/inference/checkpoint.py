"""Training state and models on disk: safetensors for tensors, JSON for the rest, nothing that unpickles.

A checkpoint is step-XXXXXXXX.safetensors with step-XXXXXXXX.json, which is written last and names the digest of
both. A pair that disagrees, or lacks a half, is none: who opens the folder removes it, so that it takes no whole one's
place, and the one before it is the newest. The last two are kept. One process at a time holds the folder
(flock); the lock falls with the process, however that ends.
"""

import fcntl
import hashlib
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cohortvi.files import digest, read_json, remove, replacing, write_json
from cohortvi.inference.vae import VAE
from cohortvi.log import logger

KEPT = 2
EPOCH_SECONDS = 5.0  # epochs shorter than this do not each write a checkpoint

Tensors = dict[str, Tensor]


def run_folder(prefix: str | Path, *what: Any) -> Path:
    """Return the folder of a run's checkpoints, PREFIX-DIGEST over all that decides the run (JSON-able)."""
    return Path(f"{prefix}-{digest(*what)}")


def forget_other_runs(folder: Path, prefix: str | Path) -> None:
    """Remove the folders that runs of other settings, shards or code left under the same prefix."""
    for other in folder.parent.glob(f"{Path(prefix).name}-*"):
        if other != folder:
            remove(other)


class Checkpoints:
    """The checkpoints of one training run in one folder, as a context that holds the folder's lock."""

    def __init__(self, folder: Path, minutes: float, *, is_owner: bool = True):
        """`is_owner`: this process writes, and holds the lock; the others of a run read what it writes."""
        self.folder, self.is_owner = Path(folder), is_owner
        self.seconds = 60 * minutes

    def __enter__(self) -> "Checkpoints":
        if not self.is_owner:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise ValueError(
                f"{self.folder}: another process is training into this folder; expected one at a time. "
                "Wait for it or end it, then start again."
            ) from None
        self._tidy()
        self.written = time.monotonic()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_owner:
            self.lock.close()

    def due(self, *, epoch_end: bool) -> bool:
        """Whether the last checkpoint is older than the clock allows; at the end of an epoch, than a few seconds."""
        age = time.monotonic() - self.written
        return age >= (min(self.seconds, EPOCH_SECONDS) if epoch_end else self.seconds)

    def save(self, step: int, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, whole or not at all, and remove all but the last two."""
        path = self.folder / f"step-{step:08d}.safetensors"
        _save_tensors(tensors, path)
        write_json({"digest": _digest(path, facts), "facts": facts}, path.with_suffix(".json"))
        for old in sorted(self.folder.glob("step-*.json"))[:-KEPT]:
            remove(old)
            remove(old.with_suffix(".safetensors"))
        self.written = time.monotonic()

    def newest(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Return tensors and facts of the newest checkpoint, None without any. Who opened the folder has checked it."""
        paths = sorted(self.folder.glob("step-*.json"))
        return (load_file(paths[-1].with_suffix(".safetensors")), read_json(paths[-1])["facts"]) if paths else None

    def _tidy(self) -> None:
        """Remove what is no checkpoint: half-written files, and pairs that are damaged or lack a half."""
        for path in self.folder.glob("*.partial"):
            remove(path)
        for path in {path.with_suffix(".json") for path in self.folder.glob("step-*")}:
            if not _is_whole(path):
                logger.info("checkpoint %s is damaged or half-written; it is removed", path.stem)
                remove(path)
                remove(path.with_suffix(".safetensors"))


class Signals:
    """Within this context SIGTERM and SIGUSR1 are noted, not obeyed: the training loop looks between two steps."""

    def __init__(self) -> None:
        self.terminated = False
        self.asked = False

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.terminated = self.terminated or number == signal.SIGTERM


def save_model(vae: VAE, facts: dict[str, Any], path: str | Path, facts_path: str | Path) -> None:
    """Write the weights as safetensors and what is known of the model as JSON."""
    _save_tensors({name: value.cpu() for name, value in vae.state_dict().items()}, Path(path))
    write_json(facts, facts_path)


def load_model(path: str | Path) -> tuple[VAE, dict[str, Any]]:
    """Return the model of `path` (its facts lie beside it as .json), on the CPU and in evaluation mode."""
    facts = read_json(Path(path).with_suffix(".json"))
    with torch.device("meta"):  # shapes alone: nothing is drawn for weights that are replaced at once
        vae = VAE(**facts["vae"])
    vae.load_state_dict(load_file(path), assign=True)
    return vae.eval(), facts


def _save_tensors(tensors: Tensors, path: Path) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(save({name: value.contiguous() for name, value in tensors.items()}))
        os.fsync(file.fileno())  # the JSON beside it must not reach the disk first


def _is_whole(path: Path) -> bool:
    """Whether the checkpoint of this JSON file is as it was written."""
    try:
        found = read_json(path)
        return found["digest"] == _digest(path.with_suffix(".safetensors"), found["facts"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no JSON, or another one
        return False


def _digest(path: Path, facts: dict[str, Any]) -> str:
    with path.open("rb") as file:
        return digest(hashlib.file_digest(file, "sha256").hexdigest(), facts)
