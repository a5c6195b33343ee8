"""Minibatches out of stores on disk, in the order of a plan, resumable at any step.

`Loader` obeys store/plan.py; store/windows.py reads what it asks for, ahead and in threads, and store/batches.py lays
minibatches out in recycled memory. Threads live as long as an iteration: one that ends, by itself, by `break` or by an
exception, leaves none.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.files import digest
from cohortvi.store.batches import Batches, Counts
from cohortvi.store.plan import Epoch, Piece
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.windows import Memory, Window, Windows

THREAD_NAME = "cohortvi-loader"
GROUP_CELLS = 1_024  # cells laid out by one task: small minibatches are made several at a time


class Minibatch(NamedTuple):
    """Counts (n, g), see Loader; columns of obs, (n,), int64 codes or float32; row numbers, int64."""

    x_ng: Counts
    obs: dict[str, torch.Tensor]
    rows: np.ndarray


class Loader:
    """Iterable over minibatches; an iteration goes from the current step to the end of its epoch and begins the next.

    Which cells step k of an epoch holds depends on the store, `batch_size` and `seed` alone: not on threads, ranks, or
    where an iteration was interrupted. Iterate in one place at a time.
    """

    def __init__(  # noqa: PLR0913 (all but the first are given by name)
        self,
        store: ShardedCounts,
        *,
        batch_size: int,
        seed: int,
        columns: Sequence[str] = (),
        output: str = "dense",
        copy: bool = False,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
    ):
        """`batch_size`: cells of all ranks together; `columns`: of obs, to be delivered; `threads`: that read.

        `output`: dense (float32, exact up to 2^24), counts (dense, in the stores' own unsigned type), csr (int32 and
        float32) or csr_counts (uint16 or uint32 ids, counts in the stores' type). x_ng lies in memory that is written
        anew for the next minibatch; `copy` gives each its own. Errors: ValueError for a column that not all stores
        have in the same way, an output that there is not, or a rank outside the world.
        """
        for name in columns:
            if name not in store.columns:
                found = f"column {name!r} is not one that all stores have, with the same categories"
                raise ValueError(f"{store.stores[0].path}: {found}; expected some of {', '.join(store.columns)}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: expected a rank from 0 to {world - 1}")
        self.store, self.columns, self.shuffle, self.copy = store, list(columns), shuffle, copy
        self.batches = Batches(output, store.n_vars, store.id_type, store.count_type)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world, self.threads = rank, world, threads
        self.window_memory: list[Memory] = []
        self.epoch = self.step = 0

    def _plan(self, epoch: int) -> Epoch:
        settings = {"batch_size": self.batch_size, "seed": self.seed, "shuffle": self.shuffle}
        return Epoch(self.store.sizes, epoch=epoch, **settings)

    def n_steps(self, epoch: int) -> int:
        """Return the number of minibatches of an epoch, the same for every rank."""
        return self._plan(epoch).n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        self.store.check_process()
        plan = self._plan(self.epoch)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix=THREAD_NAME)
        try:
            windows = Windows(self.store, plan, self.columns, pool, self.window_memory)
            for minibatch in self._minibatches(plan, windows, pool):
                self.step += 1
                yield minibatch
            windows.release_before(plan.n_windows)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self.epoch, self.step = plan.epoch + 1, 0

    def _minibatches(self, plan: Epoch, windows: Windows, pool: ThreadPoolExecutor) -> Iterator[Minibatch]:
        """Yield what is left of the epoch; while one group of minibatches is served, the next ones are laid out."""
        groups, running = self._groups(plan), deque()
        group = next(groups, None)
        while group or running:
            while group and len(running) <= self.threads:
                running.append(self._submit(group, windows, pool))
                group = next(groups, None)
            first_window, memory, made = running.popleft()
            for minibatch in made.result():
                yield minibatch._replace(x_ng=self.batches.copied(minibatch.x_ng)) if self.copy else minibatch
            self.batches.release(memory)
            windows.release_before(first_window)

    def _groups(self, plan: Epoch) -> Iterator[list[list[Piece]]]:
        """Yield the pieces of as many consecutive steps as have GROUP_CELLS cells."""
        size = max(1, GROUP_CELLS * self.world // self.batch_size)
        for first in range(self.step, plan.n_steps, size):
            steps = range(first, min(first + size, plan.n_steps))
            yield [plan.pieces(step, self.rank, self.world) for step in steps]

    def _submit(
        self, group: list[list[Piece]], windows: Windows, pool: ThreadPoolExecutor
    ) -> tuple[int, Any, Future[list[Minibatch]]]:
        pieces = [piece for step in group for piece in step]
        needed = {piece.window: windows.get(piece.window) for piece in pieces}
        if pieces:
            windows.read_ahead(pieces[-1])
        memory = self.batches.take()
        return min(needed, default=0), memory, pool.submit(self._lay_out, group, needed, memory)

    def _lay_out(self, group: list[list[Piece]], windows: dict[int, Window], memory: Any) -> list[Minibatch]:
        for window in windows.values():
            window.wait()
        chosen = [[(windows[piece.window], piece) for piece in step] for step in group]
        parts = [[(window, window.order[piece.start : piece.stop]) for window, piece in step] for step in chosen]
        counts = self.batches.lay_out([[(window.rows, places) for window, places in step] for step in parts], memory)
        return [
            Minibatch(x_ng, self._columns(step), _joined([window.numbers[places] for window, places in step], np.int64))
            for x_ng, step in zip(counts, parts, strict=True)
        ]

    def _columns(self, step: list[tuple[Window, np.ndarray]]) -> dict[str, torch.Tensor]:
        found = {}
        for index, name in enumerate(self.columns):
            dtype = np.int64 if name in self.store.categories else np.float32
            values = _joined([window.columns[index][places] for window, places in step], dtype)
            found[name] = torch.from_numpy(values)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on after the last minibatch that was yielded; JSON-able."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader of the same store, seed and batch size stood, whatever its ranks and threads.

        Errors: ValueError if the sequence of minibatches is another one.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"loader state: {name} is {state[name]}; expected {value}, as before the interruption")
        self.epoch, self.step = state["epoch"], state["step"]

    def _identity(self) -> dict[str, Any]:
        contents = digest([store.manifest["content"] for store in self.store.stores])
        return {"seed": self.seed, "batch_size": self.batch_size, "shuffle": self.shuffle, "store": contents}


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])
