"""The windows of an epoch: the cells that are mixed, decoded by threads into recycled memory, a window ahead.

While a window is served, the blocks of the next one are decoded, and the row ends of the one after it are read, which
tell how much memory it needs. So there is memory of two windows, and threads have work as long as one is served.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cohortvi.store.blocks import Blocks
from cohortvi.store.kernels import take_rows
from cohortvi.store.layout import Rows
from cohortvi.store.plan import Epoch
from cohortvi.store.sampling import Sampling
from cohortvi.store.sharded import ShardedCounts


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


class Drawn(NamedTuple):
    """The rows of a block that are drawn: columns of obs, numbers in the store, and weights if there are any."""

    rows: Rows
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

    def read_columns(self, blocks: np.ndarray) -> list[list[np.ndarray]]:
        """Read columns of obs of blocks."""
        return [
            [self.store.column(shard, name, start, stop) for name in self.columns]
            for shard, start, stop in blocks.tolist()
        ]

    def draw(self, shard: int, start: int, stop: int) -> Drawn:
        """Read the rows of a block that are drawn."""
        columns = [self.store.column(shard, name, start, stop) for name in self.columns]
        numbers = np.arange(start, stop) + self.store.first_rows[shard]
        rows = self.store.stores[shard].read(start, stop)
        if self.sampling is None:
            return Drawn(rows, columns, numbers, None)
        weights = self.sampling.weights(shard, start, stop)
        kept = np.flatnonzero(weights)
        return Drawn(Rows(*take_rows(*rows, kept)), [part[kept] for part in columns], numbers[kept], weights[kept])


class Window:
    """A window of an epoch. When `wait` has returned: `rows`, numbered through the window's blocks; `order`, in which
    they are served; in this order, `columns` of obs and the cells' `numbers` in the store."""

    def __init__(self, source: Source, plan: Epoch, index: int, pool: ThreadPoolExecutor):
        self.source, self.plan, self.index, self.pool = source, plan, index, pool
        self.blocks = plan.blocks_of(index)
        self.memory: Memory | None = None
        self.tasks: list[Future] = []
        self.is_begun = self.is_ready = False
        self.columns_read: list[Future[list[list[np.ndarray]]]] = []
        self.reads = Blocks(source.store, self.blocks, pool) if source.is_whole else None
        if self.reads is not None and source.columns:
            parts = np.array_split(self.blocks, len(self.blocks) if source.store.is_remote else 1)
            self.columns_read = [pool.submit(source.read_columns, part) for part in parts]
        self.ordered = pool.submit(plan.order, index) if source.sampling is None else None

    def read(self, memories: "Memories", threads: int) -> None:
        """Have all rows read, by compiled code in so many threads."""
        if self.is_begun:
            return
        self.is_begun = True
        if self.reads is None:
            self.tasks = [self.pool.submit(self.source.draw, *block) for block in self.blocks.tolist()]
        elif self.reads.opened.exception() is None:
            self.memory = memories.take()
            indptr = self.reads.indptr
            self.rows = Rows(indptr, *self.memory.take(int(indptr[-1])))
            self.tasks = self.reads.read(self.rows, threads)

    def wait(self) -> None:
        """Return when all rows are read; raise what went wrong with a block."""
        if self.reads is None:
            drawn = [task.result() for task in self.tasks]
            self.rows = _joined([part.rows for part in drawn])
            columns, numbers = [part.columns for part in drawn], [part.numbers for part in drawn]
        else:
            self.reads.opened.result()
            self.reads.help()  # who waits may as well read
            for task in self.tasks:
                task.result()
            self.reads.check()
            columns = [values for task in self.columns_read for values in task.result()]
            _, starts, stops = self.blocks.T
            shifts = self.source.store.first_rows[self.blocks[:, 0]]
            numbers = [np.arange(start, stop) for start, stop in zip(starts + shifts, stops + shifts, strict=True)]
        if self.ordered:
            self.order = self.ordered.result()
        else:
            self.order = self.plan.order(self.index, np.concatenate([part.weights for part in drawn]))
        self.columns = [np.concatenate(values)[self.order] for values in zip(*columns, strict=True)]
        self.numbers = np.concatenate(numbers)[self.order]
        self.is_ready, self.tasks = True, []

    def stop(self) -> None:
        """Have nothing more read that no thread is reading yet."""
        if self.reads is not None:
            self.reads.stop()

    @property
    def is_idle(self) -> bool:
        """Whether no thread writes to its memory."""
        return all(task.done() for task in self.tasks)


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

    def __init__(self, source: Source, plan: Epoch, pool: ThreadPoolExecutor, memories: Memories, threads: int):
        """`memories`: what earlier epochs left, and what this one leaves; `threads`: of the pool, to decode with."""
        self.source, self.plan, self.pool, self.memories, self.threads = source, plan, pool, memories, threads
        self.open: dict[int, Window] = {}

    def get(self, index: int) -> Window:
        """Return a window when it is read, and have the next one read; those before it are done with."""
        window, following, _ = (self._opened(index + ahead) for ahead in range(3))
        if not window.is_ready:
            self.release_before(index)
            window.read(self.memories, self.threads)
            if following is not None:
                following.read(self.memories, self.threads)
            window.wait()
        return window

    def release_before(self, index: int) -> None:
        """Take back the memory of all windows before this one."""
        for done in [opened for opened in self.open if opened < index]:
            window = self.open.pop(done)
            # A rank may skip a window that was begun, and whose blocks are still being read: that memory is let go.
            window.stop()
            if window.memory is not None and window.is_idle:
                self.memories.release(window.memory)

    def stop(self) -> None:
        """Have nothing more read."""
        for window in self.open.values():
            window.stop()

    def _opened(self, index: int) -> Window | None:
        if index >= self.plan.n_windows:
            return None
        if index not in self.open:
            self.open[index] = Window(self.source, self.plan, index, self.pool)
        return self.open[index]
