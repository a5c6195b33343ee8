"""Where a model runs, and how it is handed minibatches there."""

import torch

from cohortvi.inference.sparse import Counts, sparse_counts
from cohortvi.store import batches


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here. Errors: ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, but this process sees no GPU; set auto or cpu, or run where there is one")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def output_for(device: torch.device) -> str:
    """Return the output of loaders (store/loader.py) that a model on this device takes fastest."""
    return "csr" if device.type == "cpu" else "dense"


def on_device(x: batches.Counts, device: torch.device) -> Counts:
    """Return counts of a loader with this output (`output_for`) as models take them, on their device."""
    return sparse_counts(*x) if isinstance(x, batches.Csr) else x.to(device)
