"""Our loader on 10 million cells beside 500,000 of the same kind: `make bench-loader-scale`.

Both cohorts are simulated straight to shards, of about a million cells and of 250,000. For each shard 16,384 cells of
data set A's kind are drawn; its blocks are these cells, each block in an order of its own, with names of their own. So
a cell's counts come again every 16,384 cells of a shard, which no reader profits from: chunks hold about 160 cells.

Every measurement is a fresh process on the same cores, the cohorts in turn: seconds to open the store and to the first
minibatch of 1,024 cells, dense; cells a second; peak memory above that of imports. Medians. Ends with an error if
opening takes a second, the first minibatch two, or if it needs a tenth more memory or serves a tenth fewer cells.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from loader_stores import HERE, OUT
from loader_tables import markdown, number
from loader_worker import files, megabytes, run
from simulated import BLOCK, PRESETS, Cells, draw_cells, draw_counts, draw_truth, joined, obs_of, var_of

from cohortvi.digest import code
from cohortvi.files import digest, remove, write_json
from cohortvi.store.kernels import take_rows
from cohortvi.store.layout import Rows, write_store

DRAWN = 16_384  # cells that a shard repeats
SHARD, SMALL_SHARD = 1_000_000, 250_000
BATCH = 1_024
AT_MOST = {"open_s": 1.0, "first_batch_s": 2.0}
GROWTH = {"peak_mb": 1.1, "cells_per_s": 0.9}  # at most, at least


def write_shard(shard: int, n_obs: int, folder: Path) -> None:
    """Simulate one shard."""
    preset = PRESETS["A"]._replace(n_obs=DRAWN)
    truth, rng = draw_truth(preset), np.random.default_rng([preset.seed, 3, shard])
    cells = draw_cells(preset, truth)
    parts = [slice(start, start + BLOCK) for start in range(0, DRAWN, BLOCK)]
    drawn = joined(
        [
            draw_counts(preset, truth, Cells(*(array[part] for array in cells)), shard * len(parts) + index)
            for index, part in enumerate(parts)
        ]
    )
    orders = [rng.permutation(DRAWN)[: n_obs - start] for start in range(0, n_obs, DRAWN)]
    order, names = np.concatenate(orders), pd.RangeIndex(n_obs).astype(str) + f"-{shard}"
    obs = obs_of(preset, Cells(*(array[order] for array in cells)), names)
    blocks = (Rows(*take_rows(*drawn, order)) for order in orders)
    path = folder / f"train-{shard:04d}"
    facts = {"samples": {"all": n_obs}, "split": "train", "shard": shard}
    write_json(write_store(blocks, obs, var_of(preset), path.with_suffix(".zarr"), facts), path.with_suffix(".json"))


def cohort(n_obs: int, per_shard: int, cores: int) -> Path:
    """Return the folder of a cohort's shards; simulate it first, if it is not there."""
    folder = OUT / "loader" / f"scale-{n_obs}"
    key = folder / f"{digest(code(__file__), code(HERE / 'simulated.py'))}.code"
    if key.exists():
        return folder
    remove(folder)
    folder.mkdir(parents=True)
    n_shards = max(1, round(n_obs / per_shard))
    sizes = np.diff(np.arange(n_shards + 1) * n_obs // n_shards).tolist()
    began = time.perf_counter()
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(write_shard, folder=folder), range(n_shards), sizes))
    key.touch()
    print(f"simulated {n_obs:,} cells in {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def rows_of(found: dict[str, list[dict[str, Any]]]) -> tuple[list[list[str]], list[str]]:
    """Return the table's rows, the second cohort beside the first, and which goals are missed."""
    small, large = found.values()
    rows, missed = [], []
    fields = {
        "open_s": "open, s",
        "first_batch_s": "first minibatch, s",
        "cells_per_s": "cells/s",
        "peak_mb": "peak MB",
    }
    for field, title in fields.items():
        values = [median(record[field] for record in records) for records in (small, large)]
        ratio = median(big[field] / little[field] for little, big in zip(small, large, strict=True))
        rows.append([title, *map(number, values), number(ratio)])
        if field in AT_MOST and values[1] > AT_MOST[field]:
            missed.append(f"{title}: found {values[1]:.2f}; expected at most {AT_MOST[field]}")
        elif field == "peak_mb" and ratio > GROWTH[field]:
            missed.append(f"{title}: found {ratio:.2f} times as much; expected at most {GROWTH[field]}")
        elif field == "cells_per_s" and ratio < GROWTH[field]:
            missed.append(f"{title}: found {ratio:.2f} times as many; expected at least {GROWTH[field]}")
    return rows, missed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs=2, default=[500_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    stores = {}
    for n_obs, per_shard in zip(options.cells, (SMALL_SHARD, SHARD), strict=True):
        stores[f"{n_obs:,} cells"] = cohort(n_obs, per_shard, options.cores)
    nnz = PRESETS["A"].density * PRESETS["A"].n_vars
    job = {"kind": "warm", "loader": "cohortvi", "setting": "dense", "output": "dense", "batch_size": BATCH}
    job |= {"n_vars": PRESETS["A"].n_vars, "nnz": nnz, "seconds": options.seconds}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in stores}
    for index in range(options.rounds):
        for name, folder in list(stores.items())[:: -1 if index % 2 else 1]:
            found[name].append(run(sys.executable, {**job, "path": str(folder)}, options.cores))
            print(f"round {index}, {name}: {number(found[name][-1]['cells_per_s'])} cells/s", flush=True)
    rows, missed = rows_of(found)
    rows.insert(0, ["MB on disk", *(number(megabytes(files(folder))) for folder in stores.values()), ""])
    print(markdown(["", *stores, "ratio"], rows))
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
