"""Which cells of a store an epoch draws, and how often: those of a query once, or by weights.

The store is shuffled, so that a window of it is a random sample; within a window cells are drawn by systematic sampling
(Madow 1949): one that should come 2.4 times comes 2 or 3 times. So the composition of an epoch is the expected one but
for less than one draw a window, without physical grouping by class.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from cohortvi.store.plan import cut
from cohortvi.store.sharded import ShardedCounts

READ_CELLS = 65_536  # cells of which columns are held at a time


class Sampling:
    """The weights of a store's cells, in a pass over the columns of obs that they depend on.

    where: a query of pandas over columns of obs; cells that do not fulfil it are never drawn. balance: a categorical
    column; each of its values is drawn equally often, the cells of one equally likely. weights: a column of numbers; a
    cell is drawn in proportion to its own. An epoch has as many draws as there are cells that fulfil `where`.
    """

    def __init__(
        self,
        store: ShardedCounts,
        *,
        where: str | None = None,
        balance: str | None = None,
        weights: str | None = None,
    ):
        """Errors: ValueError for a column that there is not, a query that cannot be answered, or no cell left."""
        if balance is not None and weights is not None:
            raise ValueError(f"balance {balance!r} and weights {weights!r}: expected one of them at most")
        if balance is not None and balance not in store.categories:
            raise ValueError(f"balance: {balance!r} is no categorical column; they are {', '.join(store.categories)}")
        if weights is not None and (weights not in store.columns or weights in store.categories):
            numbers = ", ".join(name for name in store.columns if name not in store.categories)
            raise ValueError(f"weights: {weights!r} is no column of numbers; they are {numbers}")
        self.store, self.balance, self.column = store, balance, weights
        self.kept = None if where is None else [self._answers(shard, where) for shard in range(len(store.sizes))]
        self.n_draws = store.n_obs if self.kept is None else sum(int(kept.sum()) for kept in self.kept)
        if not self.n_draws:
            raise ValueError(f"where: no cell fulfils {where!r}; expected at least one of {store.n_obs}")
        self.by_class = None if balance is None else self._class_weights(balance)

    def weights(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return the weights of rows start:stop of a shard, float64; 0: never drawn. ValueError for one below 0."""
        kept = np.ones(stop - start) if self.kept is None else self.kept[shard][start:stop].astype(np.float64)
        if self.by_class is not None:
            return kept * self.by_class[self.store.column(shard, self.balance, start, stop)]
        if self.column is None:
            return kept
        values = self.store.column(shard, self.column, start, stop)
        if values.min(initial=0) < 0:
            path = self.store.stores[shard].path
            raise ValueError(f"{path}: column {self.column!r} holds {values.min()}; expected weights from 0 on")
        return kept * values

    def block_weights(self, block: int) -> np.ndarray:
        """Return the sum of the weights of each block of so many cells, in the order of `cut`."""
        sums = [self._sums(shard, block) for shard in range(len(self.store.sizes))]
        weights = np.concatenate([np.empty(0), *sums])
        if not weights.any():
            raise ValueError(f"weights: column {self.column!r} is 0 for all cells; expected weights above 0")
        return weights

    def _sums(self, shard: int, block: int) -> np.ndarray:
        starts = cut([self.store.sizes[shard]], block)[:, 1]
        sums = np.zeros(len(starts))
        for start, stop in _steps(self.store.sizes[shard], max(1, READ_CELLS // block) * block):
            inside = starts[(starts >= start) & (starts < stop)]
            sums[inside // block] = np.add.reduceat(self.weights(shard, start, stop), inside - start)
        return sums

    def _class_weights(self, balance: str) -> np.ndarray:
        counts = np.zeros(len(self.store.categories[balance]))
        for shard, size in enumerate(self.store.sizes):
            for start, stop in _steps(size, READ_CELLS):
                codes = self.store.column(shard, balance, start, stop)
                kept = None if self.kept is None else self.kept[shard][start:stop]
                counts += np.bincount(codes, weights=kept, minlength=len(counts))
        there = counts > 0
        return np.where(there, self.n_draws / there.sum() / np.where(there, counts, 1), 0)

    def _answers(self, shard: int, where: str) -> np.ndarray:
        """Return which cells of a shard fulfil a query, bool."""
        kept = np.zeros(self.store.sizes[shard], bool)
        names = [name for name in self.store.columns if name in where]
        for start, stop in _steps(len(kept), READ_CELLS):
            frame = pd.DataFrame({name: self.store.values(shard, name, start, stop) for name in names})
            try:
                answer = frame.eval(where, engine="python")
            except (ValueError, TypeError, SyntaxError, NameError, KeyError, AttributeError) as error:
                found = f"{where!r} cannot be answered ({error}); the columns are {', '.join(self.store.columns)}"
                raise ValueError(f"where: {found}") from error
            if not isinstance(answer, pd.Series) or answer.dtype != bool:
                raise ValueError(f"where: {where!r} is no condition; expected one over columns of obs: donor == '7'")
            kept[start:stop] = answer
        return kept


def _steps(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)
