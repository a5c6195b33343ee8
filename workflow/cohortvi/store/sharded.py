"""A cohort's shards as one table of cells, of which nothing but metadata is held in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cohortvi.store.counts import CountsReader


class ShardedCounts:
    """Stores of the same genes, one after the other: row i of shard s has the number sum(sizes[:s]) + i."""

    def __init__(self, manifests: Sequence[str | Path]):
        """Errors: ValueError if a store is not as its manifest says, or the stores' genes differ."""
        if not manifests:
            raise ValueError("no store was given; expected the manifest of at least one")
        self.stores = [CountsReader(manifest) for manifest in manifests]
        for store in self.stores:
            if store.manifest["genes"] != self.stores[0].manifest["genes"]:
                raise ValueError(f"{store.path}: its genes are not those of {self.stores[0].path}; expected the same")
        self.sizes = [store.n_obs for store in self.stores]
        self.first_rows = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.n_obs, self.n_vars = int(self.first_rows[-1]), self.stores[0].n_vars
        self.var_names = self.stores[0].var_names
        self.id_type = np.result_type(*(store.indices.dtype for store in self.stores))
        self.count_type = np.result_type(*(store.data.dtype for store in self.stores))
        filled = [store for store in self.stores if store.n_obs] or self.stores
        kinds = [store.manifest["columns"] for store in filled]
        self.columns = [name for name in kinds[0] if all(kind.get(name) == kinds[0][name] for kind in kinds)]
        found = {name: filled[0].categories(name) for name in self.columns}
        self.categories = {name: categories for name, categories in found.items() if categories is not None}
        self.process = os.getpid()

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child: the threads that read did not come along, and it would hang."""
        if os.getpid() != self.process:
            raise RuntimeError(
                f"{self.stores[0].path}: opened in process {self.process}, iterated in its fork {os.getpid()}; "
                "expected one process. Open the stores in the child, or start it by spawn; loaders need no workers."
            )
