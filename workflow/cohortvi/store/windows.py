"""The windows of an epoch: the cells that are mixed, decoded into recycled memory by threads, a window ahead."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cohortvi.store.layout import Rows
from cohortvi.store.plan import Epoch, Piece
from cohortvi.store.sharded import ShardedCounts


class Memory:
    """Room for the entries of a window, which grows to what the largest one needs."""

    def __init__(self, id_type: np.dtype, count_type: np.dtype):
        self.indices, self.data = np.empty(0, id_type), np.empty(0, count_type)

    def take(self, nnz: int) -> tuple[np.ndarray, np.ndarray]:
        """Return room for so many ids and counts."""
        if len(self.data) < nnz:
            room = nnz + nnz // 16
            self.indices, self.data = np.empty(room, self.indices.dtype), np.empty(room, self.data.dtype)
        return self.indices[:nnz], self.data[:nnz]


class Window:
    """A window of an epoch. When `wait` has returned: `rows`, numbered through the window's blocks; `columns` of obs;
    the cells' `numbers` in the store; `order`, in which they are served."""

    def __init__(self, store: ShardedCounts, plan: Epoch, index: int, columns: Sequence[str], memory: Memory):
        self.store, self.names, self.memory = store, columns, memory
        self.blocks = [(store.stores[shard], int(start), int(stop)) for shard, start, stop in plan.blocks_of(index)]
        self.ends = [reader.ends(start, stop) for reader, start, stop in self.blocks]
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(ends) for ends in self.ends)])
        self.first = np.cumsum([0, *(ends[-1] - ends[0] for ends in self.ends)])
        self.rows = Rows(np.cumsum(lengths), *memory.take(int(self.first[-1])))
        numbers = [np.arange(start, stop) + store.first_rows[shard] for shard, start, stop in plan.blocks_of(index)]
        self.numbers, self.order = np.concatenate(numbers), plan.order(index)
        self.parts: list[Future[list[np.ndarray]]] = []
        self.columns: list[np.ndarray] = []

    def read(self, pool: ThreadPoolExecutor, share: float = 1.0) -> None:
        """Have at least this share of the blocks read."""
        while len(self.parts) < share * len(self.blocks):
            self.parts.append(pool.submit(self._read_block, len(self.parts)))

    def _read_block(self, index: int) -> list[np.ndarray]:
        reader, start, stop = self.blocks[index]
        place = slice(self.first[index], self.first[index + 1])
        reader.read_into(start, self.ends[index], self.rows.indices[place], self.rows.data[place])
        return [reader.column(name, start, stop) for name in self.names]

    def wait(self) -> None:
        """Return when all blocks are read; raise what went wrong with one."""
        parts = [part.result() for part in self.parts]
        self.columns = self.columns or [np.concatenate(values) for values in zip(*parts, strict=True)]


class Windows:
    """The windows of an epoch, asked for in ascending order."""

    def __init__(
        self, store: ShardedCounts, plan: Epoch, columns: Sequence[str], pool: ThreadPoolExecutor, free: list[Memory]
    ):
        """`free`: memory that earlier epochs left, and that this one leaves."""
        self.store, self.plan, self.columns, self.pool, self.free = store, plan, columns, pool, free
        self.open: dict[int, Window] = {}

    def get(self, index: int) -> Window:
        """Return a window of which all blocks are read or being read."""
        window = self._opened(index)
        window.read(self.pool)
        return window

    def read_ahead(self, piece: Piece) -> None:
        """Have as much of the next window read as of this one is asked for with `piece`: reading comes evenly."""
        if piece.window + 1 < self.plan.n_windows:
            size = self.plan.window_ends[piece.window + 1] - self.plan.window_ends[piece.window]
            self._opened(piece.window + 1).read(self.pool, piece.stop / size)

    def release_before(self, index: int) -> None:
        """Take back the memory of all windows before this one."""
        for done in [opened for opened in self.open if opened < index]:
            self.free.append(self.open.pop(done).memory)

    def _opened(self, index: int) -> Window:
        if index not in self.open:
            memory = self.free.pop() if self.free else Memory(self.store.id_type, self.store.count_type)
            self.open[index] = Window(self.store, self.plan, index, self.columns, memory)
        return self.open[index]
