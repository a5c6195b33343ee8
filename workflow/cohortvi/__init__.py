"""cohortvi: amortized variational inference for single-cell cohorts that fit in no memory."""

from importlib import import_module
from typing import Any

# What notebooks use. Imported when asked for: whoever plans a workflow need not wait for torch.
_HOMES = {"Loader": "cohortvi.store.loader", "ShardedCounts": "cohortvi.store.sharded"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cohortvi' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
