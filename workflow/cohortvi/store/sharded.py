"""A cohort's stores as one table of cells, of which nothing but metadata is held in memory."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cohortvi.store.counts import CountsReader
from cohortvi.store.layout import id_type
from cohortvi.store.opening import open_all


class ShardedCounts:
    """Stores, one after the other: row i of store s has the number sum(sizes[:s]) + i.

    Columns of obs are those that all stores have; the categories of one are joined. Rows come over the stores' own
    genes, over a list of genes, or over those that `join` makes.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path | CountsReader],
        *,
        genes: Sequence[str] | None = None,
        join: str | None = None,
    ):
        """`paths`: manifests, stores or collections, on disk or behind URLs (store/opening.py), or opened stores.

        `genes`: names, in the order wanted; those that a store does not have count 0 there. `join`: inner (genes that
        all stores have, in the first one's order) or outer (genes that any has). Errors: ValueError if a store is not
        as its manifest says, if the stores' genes differ and neither is given, or no store has any of `genes`.
        """
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not paths:
            raise ValueError("no store was given; expected the manifest of at least one")
        if join not in (None, "inner", "outer") or (join and genes is not None):
            raise ValueError(f"join: found {join!r}; expected inner or outer, or a list of genes instead of it")
        self.stores = [store for path in paths for store in _opened(path, genes)]
        differ = [store for store in self.stores if store.manifest["genes"] != self.stores[0].manifest["genes"]]
        if differ and join:
            genes = _joined_genes([store.var_names for store in self.stores], join)
            self.stores = [store for path in paths for store in _opened(path, genes)]
        elif differ and genes is None:
            found = f"{differ[0].path}: its genes are not those of {self.stores[0].path}"
            raise ValueError(f"{found}; expected the same. Give `genes`, or `join` inner or outer")
        if genes is not None and not any((store.place >= 0).any() for store in self.stores):
            raise ValueError(f"{self.stores[0].path}: none of the {len(genes)} genes asked for is in any store")
        self.is_mapped = any(store.is_mapped for store in self.stores)
        self.is_remote = any(store.is_remote for store in self.stores)
        self.sizes = [store.n_obs for store in self.stores]
        self.generations = [store.manifest.get("generation", 0) for store in self.stores]
        self.first_rows = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.n_obs, self.n_vars = int(self.first_rows[-1]), self.stores[0].n_vars
        self.n_entries = sum(store.manifest["nnz"] for store in self.stores)  # of all genes that they have
        self.var_names = self.stores[0].var_names
        self.id_type = np.dtype(id_type(self.n_vars))
        self.count_type = np.result_type(*(store.count_type for store in self.stores))
        self._join_columns([store for store in self.stores if store.n_obs] or self.stores)
        self.process = os.getpid()

    def _join_columns(self, filled: list[CountsReader]) -> None:
        kinds = [store.manifest["columns"] for store in filled]
        shared = [name for name in kinds[0] if all(name in kind for kind in kinds)]
        self.columns, self.categories, self.codes = [], {}, {}
        for name in shared:
            found = [store.categories(name) for store in filled]
            if all(kind[name] == kinds[0][name] for kind in kinds):
                categories = found[0]
            elif all(values is not None for values in found):
                categories = sorted({value for values in found for value in values})
                index = pd.Index(categories)
                self.codes |= {(store, name): index.get_indexer(own) for store, own in zip(filled, found, strict=True)}
            elif any(values is not None for values in found):
                continue  # text here, numbers there
            else:
                categories = None
            self.columns.append(name)
            if categories is not None:
                self.categories[name] = categories

    def column(self, shard: int, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows start:stop of a column in a store: int64 codes of the joined categories, or float32.

        Errors: ValueError if a value is missing.
        """
        store = self.stores[shard]
        values, codes = store.column(name, start, stop), self.codes.get((store, name))
        return values if codes is None else codes[values]

    def values(self, shard: int, name: str, start: int, stop: int) -> np.ndarray | pd.Categorical:
        """Return rows start:stop of a column as they are meant: text or numbers, missing ones included."""
        store = self.stores[shard]
        values = store.raw_column(name, start, stop)
        return pd.Categorical.from_codes(values, store.categories(name)) if name in self.categories else values

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child: the threads that read did not come along, and it would hang."""
        if os.getpid() != self.process:
            raise RuntimeError(
                f"{self.stores[0].path}: opened in process {self.process}, iterated in its fork {os.getpid()}; "
                "expected one process. Open the stores in the child, or start it by spawn; loaders need no workers."
            )


def _opened(path: str | Path | CountsReader, genes: Sequence[str] | None) -> Iterable[CountsReader]:
    return [path] if isinstance(path, CountsReader) else open_all(path, genes)


def _joined_genes(names: list[pd.Index], join: str) -> pd.Index:
    if join == "outer":
        return pd.Index(list(dict.fromkeys(name for part in names for name in part)), dtype=object)
    shared = set(names[0]).intersection(*names[1:])
    return names[0][names[0].isin(shared)]
