"""Minibatches out of stores on disk, in the order of a plan, resumable at any step.

`Loader` obeys store/plan.py; store/windows.py reads what it asks for, ahead and in threads, and store/batches.py lays
minibatches out in recycled memory. Threads live as long as an iteration: one that ends, by itself, by `break` or by an
exception, leaves none.
"""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.files import digest
from cohortvi.store.batches import Batches, Counts
from cohortvi.store.plan import BLOCK, Epoch, Piece
from cohortvi.store.sampling import Sampling
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.windows import Memories, Source, Windows

THREAD_NAME = "cohortvi-loader"
# Small minibatches are laid out together: Python takes its time for each call.
GROUP_BYTES, GROUP_CELLS = 2**25, 1_024
NICENESS = 5  # of threads that read, above that of the program
REMOTE_READERS = 64  # requests under way at once to stores behind URLs, which answer late


class Minibatch(NamedTuple):
    """Counts (n, g), see Loader; columns of obs, (n,), int64 codes or float32; row numbers, int64."""

    x_ng: Counts
    obs: dict[str, torch.Tensor]
    rows: np.ndarray


class Loader:
    """Iterable over minibatches; an iteration goes from the current step to the end of its epoch and begins the next.

    Which cells step k of an epoch holds depends on the store, `batch_size` and `seed` alone: not on threads, ranks, or
    where an iteration was interrupted. Iterate in one place at a time. A loop that breaks at the last minibatch has not
    ended the epoch: the next iteration, which yields nothing, does.
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
        drop_last: bool = False,
        where: str | None = None,
        balance: str | None = None,
        weights: str | None = None,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
    ):
        """`batch_size`: cells of all ranks together; `columns`: of obs, to be delivered; `threads`: beside the caller.

        `output`: dense (float32, exact up to 2^24), counts (dense, in the stores' own unsigned type), csr (int32 and
        float32) or csr_counts (uint16 or uint32 ids, counts in the stores' type). x_ng lies in memory that is written
        anew for the next minibatch, pinned where there is a GPU: wait for a copy of it to end before you ask for that
        one. `copy` gives each its own. `drop_last` leaves out cells that fill no minibatch; the last two share them
        otherwise. `where`, `balance` and `weights` say which cells an epoch draws (store/sampling.py). Errors:
        ValueError for a column that not all stores have, an output that there is not, a rank outside the world, or no
        thread.
        """
        for name in columns:
            if name not in store.columns:
                found = f"column {name!r} is not one that all stores have"
                raise ValueError(f"{store.stores[0].path}: {found}; expected some of {', '.join(store.columns)}")
        if threads < 1:
            raise ValueError(f"threads: found {threads}; expected at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: expected a rank from 0 to {world - 1}")
        self.store, self.columns = store, list(columns)
        self.order = {"shuffle": shuffle, "drop_last": drop_last}
        self.batches = Batches(output, store.n_vars, store.id_type, store.count_type, copy=copy)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world, self.threads = rank, world, threads
        cells = min(GROUP_CELLS, GROUP_BYTES // self.batches.bytes_of(store.n_entries / max(store.n_obs, 1)))
        self.group = 1 if copy else max(1, cells * world // batch_size)  # minibatches
        self.drawn = {"where": where, "balance": balance, "weights": weights}
        sampling = Sampling(store, **self.drawn) if any(self.drawn.values()) else None
        self.source, self.memories = Source(store, self.columns, sampling), Memories(store)
        self.draws: dict[str, Any] = {}
        if sampling:
            self.draws = {"weights": sampling.block_weights(BLOCK), "n_draws": sampling.n_draws}
        self.epoch = self.step = 0

    def _plan(self, epoch: int) -> Epoch:
        settings = {"batch_size": self.batch_size, "seed": self.seed, **self.order}
        return Epoch(self.store.sizes, epoch=epoch, generations=self.store.generations, **settings, **self.draws)

    def n_steps(self, epoch: int) -> int:
        """Return the number of minibatches of an epoch, the same for every rank."""
        return self._plan(epoch).n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        self.store.check_process()
        plan = self.plan = self._plan(self.epoch)
        with ExitStack() as pools:
            pools.callback(lambda: windows.release_before(plan.n_windows))  # called last, when no thread reads any more
            pool = pools.enter_context(_threads(self.threads))
            readers = pools.enter_context(_threads(REMOTE_READERS)) if self.store.is_remote else pool
            windows = Windows(self.source, plan, readers, self.memories, self.threads)
            pools.callback(windows.stop)  # called first
            for first in range(self.step, plan.n_steps, self.group):
                steps = range(first, min(first + self.group, plan.n_steps))
                pieces = [plan.pieces(step, self.rank, self.world) for step in steps]
                for minibatch in self._lay_out(pieces, windows, pool):
                    self.step += 1
                    yield minibatch
        self.epoch, self.step = plan.epoch + 1, 0

    def _lay_out(self, group: list[list[Piece]], windows: Windows, pool: ThreadPoolExecutor) -> Iterator[Minibatch]:
        """Yield the minibatches of these pieces; one window after the other, since memory goes to the next but one."""
        sizes = [sum(piece.stop - piece.start for piece in step) for step in group]
        layout = self.batches.begin(sum(sizes), pool, self.threads)
        numbers, columns = [], []
        for index, start, stop in _merged(group):
            window = windows.get(index)
            layout.add(window.rows, window.order[start:stop])
            numbers.append(window.numbers[start:stop])
            columns.append([values[start:stop] for values in window.columns])
        rows, obs = _joined(numbers, np.int64), {}
        for index, name in enumerate(self.columns):
            dtype = np.int64 if name in self.store.categories else np.float32
            obs[name] = torch.from_numpy(_joined([values[index] for values in columns], dtype)).split(sizes)
        ends = np.cumsum([0, *sizes]).tolist()
        for k, x_ng in enumerate(layout.end(ends)):
            yield Minibatch(x_ng, {name: column[k] for name, column in obs.items()}, rows[ends[k] : ends[k + 1]])

    def part(self) -> tuple[int, int, int]:
        """Return which rows the last minibatch yielded has of all ranks' one: first, end, and how many that has."""
        first, end = self.plan.bounds(self.step - 1)
        start, stop = ((end - first) * part // self.world for part in (self.rank, self.rank + 1))
        return start, stop, end - first

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on after the last minibatch that was yielded; JSON-able."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader of the same store, seed and batch size stood, whatever its ranks and threads.

        Errors: ValueError if the sequence of minibatches is another one.
        """
        found = {name: value for name, value in state.items() if name not in ("epoch", "step")}
        for name, value in ({**dict.fromkeys(found)} | self._identity()).items():
            if found.get(name) != value:
                raise ValueError(f"loader state: {name} is {found.get(name)}; expected {value}, as the loader has it")
        self.epoch, self.step = state["epoch"], state["step"]

    def _identity(self) -> dict[str, Any]:
        contents = digest([store.manifest["content"] for store in self.store.stores])
        sequence = {"seed": self.seed, "batch_size": self.batch_size, **self.order, "store": contents}
        return sequence | {name: value for name, value in self.drawn.items() if value}


@contextmanager
def _threads(number: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(number, THREAD_NAME, initializer=_step_back)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _step_back() -> None:
    """Let the loop that takes minibatches go first where cores are few. On Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


def _merged(group: list[list[Piece]]) -> list[Piece]:
    """Return the pieces of a group, those that follow one another in their window as one."""
    merged: list[Piece] = []
    for piece in (piece for step in group for piece in step):
        if merged and merged[-1].window == piece.window and merged[-1].stop == piece.start:
            merged[-1] = merged[-1]._replace(stop=piece.stop)
        else:
            merged.append(piece)
    return merged


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])  # a copy: who keeps it does not keep the window
