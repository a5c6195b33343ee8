"""Blocks of rows read together: by compiled code, for which a thread needs one turn in Python for all blocks; by hand,
block after block, where a store is none of ours, lies behind a URL, has counts of another type than those beside it, or
something is wrong with it, which is then told.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cohortvi.store.arrays import do_jobs
from cohortvi.store.kernels import rise
from cohortvi.store.layout import Rows
from cohortvi.store.native import JOB, OK
from cohortvi.store.sharded import ShardedCounts

ALL_CLAIMED = 2**62  # more jobs than there are


class Blocks:
    """Blocks, (n, 3) as `plan.cut` gives them, whose rows are wanted as they lie.

    When `opened` is done: `indptr` of their rows, numbered through all blocks.
    """

    def __init__(self, store: ShardedCounts, blocks: np.ndarray, pool: ThreadPoolExecutor):
        """Have row ends read."""
        self.store, self.blocks, self.pool = store, blocks, pool
        shards, types = np.unique(blocks[:, 0]).tolist(), (store.id_type, store.count_type)
        self.native_shards = [shard for shard in shards if store.stores[shard].is_native(*types)]
        others = np.flatnonzero(~np.isin(blocks[:, 0], self.native_shards)).tolist()
        self.ends_by_hand = {index: pool.submit(self._read_ends, index) for index in others}
        self.opened = pool.submit(self._open)
        self.claimed = np.zeros(1, np.int64)

    def _open(self) -> None:
        """Set `ends`, those of each block as `CountsReader.ends` gives them; `indptr`; `bounds`, where blocks begin
        among the entries; `jobs`, and the numbers of the blocks that are read `by_hand`."""
        ends, parts = self._ends()
        self.ends = np.split(ends, parts[1:-1])
        lengths = np.delete(np.diff(ends), parts[1:-1] - 1)
        self.indptr = np.cumsum(np.concatenate([np.zeros(1, np.int64), lengths]))
        first, last = ends[parts[:-1]], ends[parts[1:] - 1]
        self.bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), last - first]))
        indices, data = (self._jobs(name, first, last, self.bounds) for name in ("indices", "data"))
        data["array"] = 1
        both = np.intersect1d(indices["block"], data["block"])
        jobs = np.concatenate([indices, data])
        self.jobs = jobs[np.isin(jobs["block"], both)]
        self.by_hand = np.setdiff1d(np.arange(len(self.blocks)), both).tolist()

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row ends of all blocks, and where those of each begin."""
        _, starts, stops = self.blocks.T
        parts = np.cumsum([0, *(stops - starts + 1)])
        ends = np.zeros(parts[-1], np.int64)
        jobs = self._jobs("indptr", starts, stops + 1, parts)
        if len(jobs):
            do_jobs(jobs, np.zeros(1, np.int64), ends.view(np.uint64), ends.view(np.uint64))
        done = set(jobs["block"][jobs["failure"] == OK].tolist())
        for index, of_block in enumerate(np.split(ends, parts[1:-1])):
            if index in self.ends_by_hand:
                of_block[:] = self.ends_by_hand[index].result()
            elif index not in done or not rise(of_block, self.store.stores[self.blocks[index, 0]].manifest["nnz"]):
                of_block[:] = self._read_ends(index)
        return ends, parts

    def _read_ends(self, index: int) -> np.ndarray:
        shard, start, stop = self.blocks[index].tolist()
        return self.store.stores[shard].ends(start, stop)

    def _jobs(self, name: str, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Return jobs that read values starts[k]:stops[k] of an array of block k's store, of blocks where it can be."""
        parts = [np.zeros(0, JOB)]
        for shard in self.native_shards:
            inside = np.flatnonzero(self.blocks[:, 0] == shard)
            try:
                jobs = getattr(self.store.stores[shard], name).jobs(starts[inside], stops[inside], out[inside])
            except (ValueError, OSError):
                continue  # told when it is read by hand
            jobs["block"] = inside
            parts.append(jobs[jobs["size"] >= 0])
        return np.concatenate(parts)

    def read(self, rows: Rows, threads: int) -> list[Future[None]]:
        """Have ids and counts read into `rows`, in so many threads; call `check` when the futures are done."""
        self.rows = rows
        tasks = [self.pool.submit(self.help) for _ in range(threads if len(self.jobs) else 0)]
        return tasks + [self.pool.submit(self._read, index) for index in self.by_hand]

    def help(self) -> None:
        """Do jobs, in this thread, until none is left that no other has taken."""
        if len(self.jobs):
            do_jobs(self.jobs, self.claimed, self.rows.indices, self.rows.data)

    def _read(self, index: int) -> None:
        shard, start, _ = self.blocks[index].tolist()
        place = slice(self.bounds[index], self.bounds[index + 1])
        self.store.stores[shard].read_into(start, self.ends[index], self.rows.indices[place], self.rows.data[place])

    def stop(self) -> None:
        """Let threads take no further job: nobody wants these blocks any more."""
        self.claimed[0] = ALL_CLAIMED

    def check(self) -> None:
        """Read blocks again of which compiled code could not: a ValueError says what is wrong."""
        for index in np.unique(self.jobs["block"][self.jobs["failure"] != OK]).tolist():
            self._read(index)
