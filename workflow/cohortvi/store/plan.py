"""The order of an epoch: which blocks of which shard are read together, and which of their rows make each minibatch.

Pure arithmetic, no input or output. From (sizes, batch size, seed, epoch) follow, for any number of ranks:
- shards are cut into blocks; blocks are permuted and dealt into windows; the rows of a window are permuted; minibatches
  are cut from that sequence, so every cell comes once an epoch;
- shards of several generations (samples that came later) are mixed in proportion: the blocks of each are dealt evenly
  over the epoch, whatever share of the cells it has;
- with weights a window yields its share of the draws: each of its cells as often as its weight asks, but for one draw
  at most; cells of weight 1 among others of weight 0 come once;
- step k of all ranks together is always the same cells; rank r takes its slice of them, and all ranks take equally many
  steps;
- any step can be computed without those before it: memory is that of a window and of the list of blocks.
The sequence depends on the batch size, since larger minibatches want larger windows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1_024  # cells read together; they lie in random order already (store/shards.py)
WINDOW_BLOCKS = 32  # fewest blocks mixed; with 8 a cell meets its minibatch mates nine times too often again
WINDOW_BATCHES = 32  # fewest minibatches that a window yields


class Piece(NamedTuple):
    """A part of a minibatch: the cells start <= i < stop of a window's order."""

    window: int
    start: int
    stop: int


def cut(sizes: Sequence[int], block: int = BLOCK) -> np.ndarray:
    """Return the blocks of shards of these sizes, (n, 3): shard, first row, end; a shard's last block may be short."""
    blocks = [
        np.column_stack([np.full(len(starts), shard), starts, np.minimum(starts + block, size)])
        for shard, size in enumerate(sizes)
        for starts in [np.arange(0, size, block)]
    ]
    return np.concatenate([np.empty((0, 3), np.int64), *blocks])


class Epoch:
    """One epoch's order. `order`, `blocks_of` and `pieces` are all that a reader needs to serve any step."""

    def __init__(  # noqa: PLR0913 (all but the first are given by name)
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        drop_last: bool = False,
        generations: Sequence[int] | None = None,
        weights: np.ndarray | None = None,
        n_draws: int | None = None,
        block: int = BLOCK,
        window_blocks: int | None = None,
    ):
        """`sizes`: cells per shard; `batch_size`: of all ranks together; `shuffle` False: the order of the store.
        `drop_last`: leave out the cells that do not fill a minibatch.

        `generations`: of the shards; None: all of one. `weights`: the sum of the cells' weights in each block of `cut`;
        None: every cell once. `n_draws`: cells of an epoch, the sum of the weights unless given.
        `window_blocks`: fewest blocks that a window's draws would fill, unless the store has fewer. Errors: ValueError
        for sizes below 1 and weights that are none.
        """
        if batch_size < 1 or block < 1:
            raise ValueError(f"batch_size {batch_size}, block {block}: found a size below 1; expected at least 1")
        self.batch_size, self.seed, self.epoch, self.shuffle = batch_size, seed, epoch, shuffle
        blocks = cut(sizes, block)
        weights = blocks[:, 2] - blocks[:, 1] if weights is None else weights
        if len(weights) != len(blocks) or not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{len(weights)} weights for {len(blocks)} blocks: expected one each, finite, from 0 on")
        order = self._stream(0).permutation(len(blocks)) if shuffle else np.arange(len(blocks))
        order = order[weights[order] > 0]
        if shuffle and generations is not None and len(set(generations)) > 1:
            order = order[self._evenly(np.asarray(generations)[blocks[order, 0]])]
        self.blocks, ends = blocks[order], np.concatenate([[0], np.cumsum(weights[order])])
        self.n_obs = int(ends[-1]) if n_draws is None else n_draws * bool(len(order))
        fewest = window_blocks or max(WINDOW_BLOCKS, -(-WINDOW_BATCHES * batch_size // block))
        # Even windows: one that is cut short would mix the last cells of the epoch worse than the others.
        n_blocks = len(order) if weights.sum() == sum(sizes) == self.n_obs else self.n_obs // block
        self.n_windows = min(max(1, n_blocks // fewest), max(1, len(order)))
        self.first_blocks = np.arange(self.n_windows + 1) * len(order) // self.n_windows
        shares = ends[self.first_blocks] * (self.n_obs / ends[-1] if self.n_obs else 0)
        self.window_ends = np.round(shares).astype(np.int64)
        self._window_ends = self.window_ends.tolist()
        self.drop_last = drop_last
        self.n_steps = self.n_obs // batch_size if drop_last else -(-self.n_obs // batch_size)

    def _stream(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])

    def _evenly(self, groups: np.ndarray) -> np.ndarray:
        """Return an order that deals the members of each group evenly, one to each of as many equal stretches."""
        places, random = np.empty(len(groups)), self._stream(0).random(len(groups))
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            places[members] = (np.arange(len(members)) + random[members]) / len(members)
        return np.argsort(places, kind="stable")

    def blocks_of(self, window: int) -> np.ndarray:
        """Return the blocks of a window, (n, 3), in the order in which their rows are numbered."""
        return self.blocks[self.first_blocks[window] : self.first_blocks[window + 1]]

    def order(self, window: int, weights: np.ndarray | None = None) -> np.ndarray:
        """Return the window's rows, numbered through its blocks, in the order in which they are served; int64.

        `weights`: of these rows, if the plan has weights.
        """
        size, stream = self._window_ends[window + 1] - self._window_ends[window], self._stream(1 + window)
        rows = np.arange(size)
        if weights is not None:
            # Systematic sampling: equal steps through the summed weights, from a random start.
            ends = np.cumsum(weights, dtype=np.float64)
            marks = (np.arange(size) + stream.random()) * (ends[-1] / size if size else 0)
            rows = np.minimum(np.searchsorted(ends, marks, side="right"), len(weights) - 1)
        return stream.permutation(rows) if self.shuffle else rows

    def bounds(self, step: int) -> tuple[int, int]:
        """Return the part of the epoch's sequence that makes the minibatch of a step, for all ranks together.

        All hold `batch_size` cells but, without `drop_last`, the last two, which share what is left: none is too small
        for a variance over it, unless the store is.
        """
        return self._begin(step), self._begin(step + 1)

    def _begin(self, step: int) -> int:
        if 0 < step == self.n_steps - 1 and not self.drop_last:
            return self.n_obs - (self.n_obs - (step - 1) * self.batch_size) // 2
        return min(step * self.batch_size, self.n_obs)

    def pieces(self, step: int, rank: int = 0, world: int = 1) -> list[Piece]:
        """Return a rank's slice of a step's minibatch, as parts of one window after the other.

        Slices of a step differ by one cell at most; with fewer cells than ranks some are empty.
        """
        first, end = self.bounds(step)
        start, stop = (first + (end - first) * part // world for part in (rank, rank + 1))
        ends, pieces = self._window_ends, []
        window = bisect_right(ends, start) - 1
        while start < stop:
            part = min(stop, ends[window + 1])
            if start < part:
                pieces.append(Piece(window, start - ends[window], part - ends[window]))
            window, start = window + 1, part
        return pieces
