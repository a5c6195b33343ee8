"""The order of an epoch: which blocks of which shard are read together, and which of their rows make each minibatch.

Pure arithmetic, no input or output. From (sizes, batch size, seed, epoch) follow, for any number of ranks:
- shards are cut into blocks; blocks are permuted and dealt into windows; the rows of a window are permuted; minibatches
  are cut from that sequence, so every cell comes once an epoch;
- step k of all ranks together is always the same cells; rank r takes its slice of them, and all ranks take equally many
  steps;
- any step can be computed without those before it: memory is that of a window and of the list of blocks.
The sequence depends on the batch size, since larger minibatches want larger windows.
"""

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

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        block: int = BLOCK,
        window_blocks: int | None = None,
    ):
        """`sizes`: cells per shard; `batch_size`: of all ranks together; `shuffle` False: the order of the store.

        `window_blocks`: fewest blocks of a window, unless the store has fewer. Errors: ValueError for sizes below 1.
        """
        if batch_size < 1 or block < 1:
            raise ValueError(f"batch_size {batch_size}, block {block}: found a size below 1; expected at least 1")
        self.batch_size, self.seed, self.epoch, self.shuffle = batch_size, seed, epoch, shuffle
        blocks = cut(sizes, block)
        self.blocks = blocks[self._stream(0).permutation(len(blocks))] if shuffle else blocks
        fewest = window_blocks or max(WINDOW_BLOCKS, -(-WINDOW_BATCHES * batch_size // block))
        # Even windows: one that is cut short would mix the last cells of the epoch worse than the others.
        self.n_windows = max(1, len(blocks) // fewest)
        self.first_blocks = np.arange(self.n_windows + 1) * len(blocks) // self.n_windows
        ends = np.concatenate([[0], np.cumsum(self.blocks[:, 2] - self.blocks[:, 1])])
        self.window_ends = ends[self.first_blocks]
        self.n_obs = int(ends[-1])
        self.n_steps = -(-self.n_obs // batch_size)

    def _stream(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])

    def blocks_of(self, window: int) -> np.ndarray:
        """Return the blocks of a window, (n, 3), in the order in which their rows are numbered."""
        return self.blocks[self.first_blocks[window] : self.first_blocks[window + 1]]

    def order(self, window: int) -> np.ndarray:
        """Return the window's rows, numbered through its blocks, in the order in which they are served; int64."""
        size = int(self.window_ends[window + 1] - self.window_ends[window])
        return self._stream(1 + window).permutation(size) if self.shuffle else np.arange(size)

    def bounds(self, step: int) -> tuple[int, int]:
        """Return the part of the epoch's sequence that makes the minibatch of a step, for all ranks together.

        All hold `batch_size` cells but the last two, which share what is left: no minibatch is too small for a
        variance over it, unless the store is.
        """
        return self._begin(step), self._begin(step + 1)

    def _begin(self, step: int) -> int:
        if 0 < step == self.n_steps - 1:
            return self.n_obs - (self.n_obs - (step - 1) * self.batch_size) // 2
        return min(step * self.batch_size, self.n_obs)

    def pieces(self, step: int, rank: int = 0, world: int = 1) -> list[Piece]:
        """Return a rank's slice of a step's minibatch, as parts of one window after the other.

        Slices of a step differ by one cell at most; with fewer cells than ranks some are empty.
        """
        first, end = self.bounds(step)
        start, stop = (first + (end - first) * part // world for part in (rank, rank + 1))
        if start == stop:
            return []
        low, high = np.searchsorted(self.window_ends, [start, stop - 1], side="right") - 1
        return [
            Piece(
                int(window),
                int(max(start, self.window_ends[window]) - self.window_ends[window]),
                int(min(stop, self.window_ends[window + 1]) - self.window_ends[window]),
            )
            for window in range(low, high + 1)
        ]
