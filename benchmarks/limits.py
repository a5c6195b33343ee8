"""What this machine allows a loader, stage by stage, and how much of that ours delivers: `make bench-limits`.

Stages, each alone, on one thread and on all cores, by the package's own compiled functions on windows of a store as the
loader reads them: read (bytes out of the page cache), decode (bytes to row ends, ids and counts), and laying out
minibatches of 1,024 rows in each output. A thread reads into one buffer and lays out in one, which may stay in its
caches. The bound of an output is that of its stages in turn, all threads at work. Every round times the stages, each
the best of three, then the loader.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from loader_stores import data_set, store
from loader_tables import markdown, number
from loader_worker import consume
from simulated import PRESETS

from cohortvi.store import arrays, native
from cohortvi.store.batches import OUTPUTS
from cohortvi.store.kernels import fill_dense, gather, row_ends
from cohortvi.store.layout import Rows
from cohortvi.store.libraries import Context
from cohortvi.store.loader import Loader
from cohortvi.store.plan import Epoch
from cohortvi.store.sharded import ShardedCounts

BATCH = 1_024
WINDOWS = 3  # that are read, decoded and laid out
BEST_OF = 3

Share = Callable[[int, int], None]  # does part k of n of the work of a stage


class Call(NamedTuple):
    """A range of a block that the loader would read, as `read_chunks` takes it, and its bytes."""

    path: int  # address of its name
    begin: int
    raw: np.ndarray
    places: np.ndarray
    skip: int
    out: np.ndarray
    chunk_bytes: int
    checked: bool
    delta: bool


class Part(NamedTuple):
    """Rows of a window that make a minibatch."""

    rows: Rows
    places: np.ndarray


def read_window(counts: ShardedCounts, plan: Epoch, window: int) -> tuple[Rows, list[Call]]:
    """Return the rows of a window, and the calls by which they were read; RuntimeError if these were not compiled."""
    calls: list[Call] = []

    def read_chunks(*given: Any) -> tuple[int, int]:
        path, places, skip, out, chunk_bytes, _, checked, delta = given
        begin, end = native.span(places)
        raw = np.empty(end - begin, np.uint8)
        native.read_file(path, begin, raw)
        calls.append(Call(path, begin, raw, places, skip, out, chunk_bytes, checked, delta))
        return native.read_chunks(*given)

    with patch.object(arrays, "read_chunks", read_chunks):
        blocks = [(counts.stores[shard], start, stop) for shard, start, stop in plan.blocks_of(window).tolist()]
        ends = [reader.ends(start, stop) for reader, start, stop in blocks]
        indptr = np.cumsum(np.concatenate([np.zeros(1, np.int64), *map(np.diff, ends)]))
        rows, filled = Rows(indptr, np.empty(indptr[-1], counts.id_type), np.empty(indptr[-1], counts.count_type)), 0
        for (reader, start, _), of_block in zip(blocks, ends, strict=True):
            place = slice(filled, filled + int(of_block[-1] - of_block[0]))
            reader.read_into(start, of_block, rows.indices[place], rows.data[place])
            filled = place.stop
    if len(calls) < 3 * len(blocks):
        raise RuntimeError(f"{blocks[0][0].path}: read {len(calls)} times by compiled code; expected 3 times a block")
    return rows, calls


def read(calls: list[Call], threads: int) -> Share:
    """Return the stage that reads the bytes of calls out of files."""
    buffers = [np.empty(max(len(call.raw) for call in calls), np.uint8) for _ in range(threads)]

    def share(part: int, parts: int) -> None:
        for call in calls[part::parts]:
            native.read_file(call.path, call.begin, buffers[part][: len(call.raw)])

    return share


def decode(calls: list[Call]) -> Share:
    """Return the stage that checks and decodes the bytes of calls."""
    context = Context()

    def share(part: int, parts: int) -> None:
        for call in calls[part::parts]:
            given = (call.raw, call.begin, call.places, call.skip, call.out, call.chunk_bytes)
            if native.decode_chunks(*given, context.address, call.checked, call.delta)[1] != native.OK:
                raise RuntimeError("a chunk cannot be decoded")

    return share


def lay_out(output: str, parts: list[Part], counts: ShardedCounts, threads: int) -> Share:
    """Return the stage that lays out minibatches."""
    small = output in ("counts", "csr_counts")
    id_type, count_type = (counts.id_type, counts.count_type) if small else (np.int32, np.float32)
    if output in ("dense", "counts"):
        dense = [np.zeros((BATCH, counts.n_vars), count_type) for _ in range(threads)]

        def share(part: int, n_parts: int) -> None:
            for rows, places in parts[part::n_parts]:
                fill_dense(*rows, places, dense[part])

        return share
    largest = max(int(np.diff(rows.indptr)[places].sum()) for rows, places in parts)
    sparse = [
        (np.zeros(BATCH + 1, np.int64), np.zeros(largest, id_type), np.zeros(largest, count_type))
        for _ in range(threads)
    ]

    def share_sparse(part: int, n_parts: int) -> None:
        ends, indices, data = sparse[part]
        for rows, places in parts[part::n_parts]:
            row_ends(rows.indptr, places, ends)
            gather(*rows, places, ends, indices, data)

    return share_sparse


def minibatches(rows: Rows, order: np.ndarray) -> Iterator[Part]:
    """Yield the whole minibatches of a window's rows in an order."""
    for start in range(0, len(order) - BATCH + 1, BATCH):
        yield Part(rows, order[start : start + BATCH])


def best(share: Share, threads: int, pool: ThreadPoolExecutor) -> float:
    """Return the shortest time of some runs of a stage by so many threads, in seconds."""
    found = []
    for _ in range(BEST_OF):
        began = time.perf_counter()
        list(pool.map(share, range(threads), [threads] * threads))
        found.append(time.perf_counter() - began)
    return min(found)


def measure(counts: ShardedCounts, options: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Return microseconds per cell by (stage, threads), medians of rounds; and a row per output and round."""
    plan = Epoch(counts.sizes, batch_size=BATCH, seed=0, epoch=0)
    windows = range(min(WINDOWS, plan.n_windows))
    loaded = [read_window(counts, plan, window) for window in windows]
    calls = [call for _, of_window in loaded for call in of_window]
    parts = [
        part
        for window, (rows, _) in zip(windows, loaded, strict=True)
        for part in minibatches(rows, plan.order(window))
    ]
    cells = {"read": int(plan.window_ends[len(windows)]), "decode": int(plan.window_ends[len(windows)])}
    stages = {"read": read(calls, options.cores), "decode": decode(calls)}
    stages |= {output: lay_out(output, parts, counts, options.cores) for output in OUTPUTS}
    loaders = {
        output: Loader(counts, batch_size=BATCH, seed=0, output=output, threads=options.cores) for output in OUTPUTS
    }
    times, rows = {}, []
    with ThreadPoolExecutor(options.cores) as pool:
        for stage in stages.values():  # compiled, and memory touched for the first time, before anything counts
            best(stage, options.cores, pool)
        for loader in loaders.values():
            consume(partial(_counts, loader), options.seconds)
        for _ in range(options.rounds):
            for (name, stage), threads in ((item, n) for item in stages.items() for n in {1, options.cores}):
                taken = best(stage, threads, pool) / cells.get(name, len(parts) * BATCH) * 1e6
                times.setdefault((name, threads), []).append(taken)
            for output, loader in loaders.items():
                taken = sum(times[name, options.cores][-1] for name in ("read", "decode", output))
                found = consume(partial(_counts, loader), options.seconds)
                rows.append({"output": output, "bound": 1e6 / taken, "loader": found["cells_per_s"]})
    return {name: median(found) for name, found in times.items()}, rows


def _counts(loader: Loader) -> Iterator[Any]:
    return (minibatch.x_ng for minibatch in loader)


def report(name: str, times: dict[tuple[str, int], float], rows: list[dict], cores: int) -> str:
    """Return the two tables of a data set."""
    threads = sorted({n for _, n in times})
    titles = {"read": "read", "decode": "decode", **{output: f"lay out {output}" for output in OUTPUTS}}
    first = markdown(
        [f"{name}, us per cell", *(f"{n} thread{'s' if n > 1 else ''}" for n in threads)],
        [[title, *(number(times[stage, n]) for n in threads)] for stage, title in titles.items()],
    )
    second = []
    for output in OUTPUTS:
        found = [row for row in rows if row["output"] == output]
        values = [median(row[field] for row in found) / 1e3 for field in ("bound", "loader")]
        share = median(row["loader"] / row["bound"] for row in found)
        second.append([output, *map(number, values), f"{share:.0%}"])
    return f"{first}\n\n" + markdown(
        [f"{name}, thousand cells/s", f"bound, {cores} threads", "loader", "share"], second
    )


def main() -> None:
    """Print two tables a data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--cells", type=int, help="at most so many a data set, to try it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of the loader")
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    for name in options.data:
        shards = Path(store(data_set(name, options.cells), cores=options.cores)["path"])
        times, rows = measure(ShardedCounts(sorted(shards.glob("*.json"))), options)
        print(report(name, times, rows, options.cores), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
