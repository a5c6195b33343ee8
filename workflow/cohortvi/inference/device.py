"""Where a model runs, and how it is handed minibatches there."""

from importlib.util import find_spec

import torch

from cohortvi.inference.sparse import Counts, sparse_counts
from cohortvi.store import batches
from cohortvi.store.sharded import ShardedCounts


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here. Errors: ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, but this process sees no GPU; set auto or cpu, or run where there is one")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def output_for(device: torch.device) -> str:
    """Return the output of loaders (store/loader.py) that a trained model on this device is asked about."""
    return "csr" if device.type == "cpu" else "dense"


def on_device(x: batches.Counts, device: torch.device) -> Counts:
    """Return counts of a loader with this output (`output_for`) as models take them, on their device."""
    return sparse_counts(*x) if isinstance(x, batches.Csr) else x.to(device)


def training_output(device: torch.device, store: ShardedCounts) -> str:
    """Return the output of loaders that training on this device takes: the fewest bytes for a GPU to be sent.

    Errors: ValueError for a GPU where Triton is not installed.
    """
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            "device: training on a GPU needs the package triton, which is not installed; expected the one that comes "
            "with torch's builds for GPUs. Install it (pip install triton), or set models.*.device: cpu."
        )
    return "csr_counts" if device.type == "cuda" and store.count_type.kind == "u" else "csr"


def counts_of(x: batches.Csr, precision: str) -> Counts:
    """Return counts of a loader with `training_output`, on their device, as models take them there."""
    if x.data.device.type == "cpu":
        return sparse_counts(*x)
    from cohortvi.inference import gpu  # Triton is where GPUs are

    return gpu.densify(*x, torch.bfloat16 if precision == "bf16" else torch.float32)


def set_precision(device: torch.device, precision: str) -> None:
    """Let a GPU's products be of this `precision`: float32, or with factors rounded to TF32, 10 bits."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
