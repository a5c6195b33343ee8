"""Minibatches of dense float32 counts out of stores on disk, in the order of a plan, resumable at any step.

`ShardedCounts` is a cohort's shards as one table of cells, of which nothing but metadata is held in memory. `Loader`
obeys store/plan.py: a thread reads window k + 1 while window k is served, so memory is that of two windows. Threads
live as long as an iteration: one that ends, by itself, by `break` or by an exception, leaves none.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cohortvi.files import digest
from cohortvi.store.counts import CountsReader
from cohortvi.store.kernels import fill_dense
from cohortvi.store.layout import Rows
from cohortvi.store.plan import Epoch, Piece

THREAD_NAME = "cohortvi-loader"


class Minibatch(NamedTuple):
    """Counts (n, g) float32, exact up to 2^24; columns of obs, (n,), int64 codes or float32; row numbers, int64."""

    x_ng: torch.Tensor
    obs: dict[str, torch.Tensor]
    rows: np.ndarray


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
        filled = [store for store in self.stores if store.n_obs] or self.stores
        kinds = [store.manifest["columns"] for store in filled]
        self.columns = [name for name in kinds[0] if all(kind.get(name) == kinds[0][name] for kind in kinds)]
        found = {name: filled[0].categories(name) for name in self.columns}
        self.categories = {name: categories for name, categories in found.items() if categories is not None}

    def read(self, shard: int, start: int, stop: int, columns: Sequence[str]) -> tuple[Rows, list[np.ndarray]]:
        """Return rows start:stop of a shard, as stored, and their values in the columns of obs."""
        store = self.stores[shard]
        return store.read(start, stop), [store.column(name, start, stop) for name in columns]


class _Window(NamedTuple):
    """The decoded rows of a window, numbered through its blocks, and the order in which they are served."""

    rows: Rows
    columns: list[np.ndarray]
    numbers: np.ndarray
    order: np.ndarray


class _Windows:
    """Windows of an epoch, asked for in ascending order; the one after the last asked for is being read meanwhile."""

    def __init__(self, store: ShardedCounts, plan: Epoch, columns: Sequence[str], threads: int):
        self.store, self.plan, self.columns = store, plan, columns
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME)
        self.reading: dict[int, Future[_Window]] = {}

    def __enter__(self) -> "_Windows":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def get(self, window: int) -> _Window:
        for done in [index for index in self.reading if index < window]:
            del self.reading[done]
        for index in range(window, min(window + 2, self.plan.n_windows)):
            if index not in self.reading:
                self.reading[index] = self._submit(index)
        return self.reading[window].result()

    def _submit(self, window: int) -> Future[_Window]:
        blocks = self.plan.blocks_of(window)
        parts = [self.pool.submit(self.store.read, *map(int, block), self.columns) for block in blocks]
        # Tasks start in the order of submission, so all parts are done or running when this one waits for them.
        return self.pool.submit(self._assemble, window, blocks, parts)

    def _assemble(self, window: int, blocks: np.ndarray, parts: list[Future]) -> _Window:
        rows, columns = zip(*(part.result() for part in parts), strict=True)
        ends = np.cumsum(np.concatenate([[0], *(np.diff(part.indptr) for part in rows)]))
        arrays = (np.concatenate([getattr(part, name) for part in rows]) for name in ("indices", "data"))
        first_rows = self.store.first_rows
        numbers = [np.arange(start, stop) + first_rows[shard] for shard, start, stop in blocks]
        return _Window(
            rows=Rows(ends, *arrays),
            columns=[np.concatenate(values) for values in zip(*columns, strict=True)],
            numbers=np.concatenate(numbers),
            order=self.plan.order(window),
        )


class Loader:
    """Iterable over minibatches; an iteration goes from the current step to the end of its epoch and begins the next.

    Which cells step k of an epoch holds depends on the store, `batch_size` and `seed` alone: not on threads, ranks, or
    where an iteration was interrupted. Iterate in one place at a time.
    """

    def __init__(
        self,
        store: ShardedCounts,
        *,
        batch_size: int,
        seed: int,
        columns: Sequence[str] = (),
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
    ):
        """`batch_size`: cells of all ranks together; `columns`: of obs, to be delivered; `threads`: that read.

        Errors: ValueError for a column that not all stores have in the same way, or a rank outside the world.
        """
        for name in columns:
            if name not in store.columns:
                found = f"column {name!r} is not one that all stores have, with the same categories"
                raise ValueError(f"{store.stores[0].path}: {found}; expected some of {', '.join(store.columns)}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: expected a rank from 0 to {world - 1}")
        self.store, self.columns, self.shuffle = store, list(columns), shuffle
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world, self.threads = rank, world, threads
        self.epoch = self.step = 0

    def _plan(self, epoch: int) -> Epoch:
        settings = {"batch_size": self.batch_size, "seed": self.seed, "shuffle": self.shuffle}
        return Epoch(self.store.sizes, epoch=epoch, **settings)

    def n_steps(self, epoch: int) -> int:
        """Return the number of minibatches of an epoch, the same for every rank."""
        return self._plan(epoch).n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        plan = self._plan(self.epoch)
        with _Windows(self.store, plan, self.columns, self.threads) as windows:
            for step in range(self.step, plan.n_steps):
                minibatch = self._minibatch(windows, plan.pieces(step, self.rank, self.world))
                self.step = step + 1
                yield minibatch
        self.epoch, self.step = plan.epoch + 1, 0

    def _minibatch(self, windows: _Windows, pieces: list[Piece]) -> Minibatch:
        parts = [(windows.get(piece.window), piece) for piece in pieces]
        chosen = [(window, window.order[piece.start : piece.stop]) for window, piece in parts]
        x_ng, filled = np.empty((sum(len(places) for _, places in chosen), self.store.n_vars), np.float32), 0
        for window, places in chosen:
            fill_dense(*window.rows, places, x_ng[filled : filled + len(places)])
            filled += len(places)
        obs = {}
        for index, name in enumerate(self.columns):
            none = np.empty(0, np.int64 if name in self.store.categories else np.float32)
            values = np.concatenate([none, *(window.columns[index][places] for window, places in chosen)])
            obs[name] = torch.from_numpy(values)
        rows = np.concatenate([np.empty(0, np.int64), *(window.numbers[places] for window, places in chosen)])
        return Minibatch(torch.from_numpy(x_ng), obs, rows)

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
