"""The windows of an epoch: the cells that are mixed, decoded by threads into recycled memory, a window ahead.

While a window is served, the blocks of the next one are decoded, and the row ends of the one after it are read, which
tell how much memory it needs.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from cohortvi.store.kernels import take_rows
from cohortvi.store.layout import Rows
from cohortvi.store.plan import Epoch, Piece
from cohortvi.store.sampling import Sampling
from cohortvi.store.sharded import ShardedCounts

TASK_BLOCKS = 2  # read by one task: each has to wait for its turn in Python
LEAD = 0.25  # of a window, read earlier than evenly: threads have work while minibatches are taken


class Memory:
    """Room for the entries of a window, which grows to what the largest one needs."""

    def __init__(self, id_type: np.dtype, count_type: np.dtype):
        self.indices, self.data = np.empty(0, id_type), np.empty(0, count_type)

    def take(self, nnz: int) -> tuple[np.ndarray, np.ndarray]:
        """Return room for so many ids and counts."""
        if len(self.data) < nnz:
            room = nnz + nnz // 32
            self.indices, self.data = np.empty(room, self.indices.dtype), np.empty(room, self.data.dtype)
        return self.indices[:nnz], self.data[:nnz]


class Part(NamedTuple):
    """What was read of a block: rows, unless they lie in the window's memory; columns of obs; numbers in the store."""

    rows: Rows | None
    columns: list[np.ndarray]
    numbers: np.ndarray
    weights: np.ndarray | None


class Source(NamedTuple):
    """Where the cells of windows come from."""

    store: ShardedCounts
    columns: Sequence[str]
    sampling: Sampling | None

    @property
    def is_whole(self) -> bool:
        """Whether blocks are taken as they lie: all cells, all genes."""
        return self.sampling is None and not self.store.is_mapped

    def read(self, shard: int, start: int, stop: int) -> Part:
        """Read the cells of a block that are drawn at all."""
        values = [self.store.column(shard, name, start, stop) for name in self.columns]
        numbers = np.arange(start, stop) + self.store.first_rows[shard]
        if self.is_whole:
            return Part(None, values, numbers, None)
        rows = self.store.stores[shard].read(start, stop)
        if self.sampling is None:
            return Part(rows, values, numbers, None)
        weights = self.sampling.weights(shard, start, stop)
        kept = np.flatnonzero(weights)
        return Part(Rows(*take_rows(*rows, kept)), [part[kept] for part in values], numbers[kept], weights[kept])


class Window:
    """A window of an epoch. When `wait` has returned: `rows`, numbered through the window's blocks; `columns` of obs;
    the cells' `numbers` in the store; `order`, in which they are served."""

    def __init__(self, source: Source, plan: Epoch, index: int, pool: ThreadPoolExecutor):
        self.source, self.plan, self.index, self.pool = source, plan, index, pool
        self.blocks = plan.blocks_of(index).tolist()
        # Requests behind a URL take long, not much: one a task.
        ends_at_once, self.at_once = (1, 1) if source.store.is_remote else (len(self.blocks), TASK_BLOCKS)
        starts = range(0, len(self.blocks), ends_at_once) if source.is_whole else ()
        self.opened = [pool.submit(self._row_ends, self.blocks[start : start + ends_at_once]) for start in starts]
        self.ordered = pool.submit(plan.order, index) if source.sampling is None else None
        self.ends: list[np.ndarray] = []
        self.memory: Memory | None = None
        self.tasks: list[Future[list[Part]]] = []
        self.lock, self.is_ready = Lock(), False

    def _row_ends(self, blocks: list[list[int]]) -> list[np.ndarray]:
        return [self.source.store.stores[shard].ends(start, stop) for shard, start, stop in blocks]

    def read(self, memory: "Memories", share: float = 1.0) -> None:
        """Have at least this share of the blocks read."""
        if self.source.is_whole and self.memory is None:
            self.ends = [ends for part in self.opened for ends in part.result()]
            self.memory = memory.take()
            self.first = np.cumsum([0, *(ends[-1] - ends[0] for ends in self.ends)]).tolist()
            lengths = [np.diff(ends) for ends in self.ends]
            indptr = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
            self.rows = Rows(indptr, *self.memory.take(self.first[-1]))
        while (first := len(self.tasks) * self.at_once) < share * len(self.blocks):
            blocks = range(first, min(first + self.at_once, len(self.blocks)))
            self.tasks.append(self.pool.submit(self._read_blocks, blocks))

    def _read_blocks(self, indices: range) -> list[Part]:
        return [self._read_block(index) for index in indices]

    def _read_block(self, index: int) -> Part:
        shard, start, stop = self.blocks[index]
        if self.memory is not None:
            place = slice(self.first[index], self.first[index + 1])
            into = (self.rows.indices[place], self.rows.data[place])
            self.source.store.stores[shard].read_into(start, self.ends[index], *into)
        return self.source.read(shard, start, stop)

    def wait(self) -> None:
        """Return when all blocks are read; raise what went wrong with one."""
        with self.lock:
            if self.is_ready:
                return
            parts = [part for task in self.tasks for part in task.result()]
            self.columns = [np.concatenate(values) for values in zip(*(part.columns for part in parts), strict=True)]
            self.numbers = np.concatenate([part.numbers for part in parts])
            if self.memory is None:
                self.rows = _joined([part.rows for part in parts])
            if self.ordered:
                self.order = self.ordered.result()
            else:
                self.order = self.plan.order(self.index, np.concatenate([part.weights for part in parts]))
            self.is_ready = True


def _joined(parts: list[Rows]) -> Rows:
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(rows.indptr) for rows in parts)])
    arrays = [np.concatenate([rows.indices for rows in parts]), np.concatenate([rows.data for rows in parts])]
    return Rows(np.cumsum(lengths), *arrays)


class Memories:
    """Memory of windows that are done, for those to come, over all epochs of a loader."""

    def __init__(self, store: ShardedCounts):
        self.types, self.free = (store.id_type, store.count_type), []

    def take(self) -> Memory:
        """Return memory; give it back by `release`."""
        return self.free.pop() if self.free else Memory(*self.types)

    def release(self, memory: Memory) -> None:
        """Take memory back, to be written over."""
        self.free.append(memory)


class Windows:
    """The windows of an epoch, asked for in ascending order."""

    def __init__(self, source: Source, plan: Epoch, pool: ThreadPoolExecutor, memories: Memories):
        """`memories`: what earlier epochs left, and what this one leaves."""
        self.source, self.plan, self.pool, self.memories = source, plan, pool, memories
        self.open: dict[int, Window] = {}

    def get(self, index: int) -> Window:
        """Return a window of which all blocks are read or being read."""
        window = self._opened(index)
        window.read(self.memories)
        self._opened(index + 1)
        return window

    def read_ahead(self, piece: Piece) -> None:
        """Have as much of the next window read as of this one is asked for with `piece`, and a bit.

        So reading comes evenly. Not before the window that came before this one has given its memory back: two are
        enough. Of stores behind URLs all of it is asked for at once, and early, since answers come late.
        """
        is_remote = self.source.store.is_remote
        if min(self.open) < piece.window and not is_remote:
            return
        if (window := self._opened(piece.window + 1)) is not None:
            size = self.plan.window_ends[piece.window + 1] - self.plan.window_ends[piece.window]
            window.read(self.memories, 1.0 if is_remote else min(1.0, piece.stop / size + LEAD))
            if is_remote or piece.stop * 2 > size:
                self._opened(piece.window + 2)

    def release_before(self, index: int) -> None:
        """Take back the memory of all windows before this one."""
        for done in [opened for opened in self.open if opened < index]:
            window = self.open.pop(done)
            # A rank may skip a window that was begun, and whose blocks are still being read: that memory is let go.
            if window.memory is not None and all(task.done() for task in window.tasks):
                self.memories.release(window.memory)

    def _opened(self, index: int) -> Window | None:
        if index >= self.plan.n_windows:
            return None
        if index not in self.open:
            self.open[index] = Window(self.source, self.plan, index, self.pool)
        return self.open[index]
