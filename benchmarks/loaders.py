"""The loader as a plug-in for benchmarks: `prepare` writes an h5ad as shards, `epoch` yields minibatches of them.

The cells are written as the workflow writes samples, which here are equal parts of the file: once in order as counts
stores, then shuffled into shards, each by a process, as many at a time as there are cores. One
loader per store, batch size and output is kept open. Dense minibatches are float32, sparse ones int32 and float32, or
both in the store's small types; they lie in memory that the next one overwrites.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.shards import write_shard

CHUNK_CELLS = 8_192
CELLS_A_SHARD = 250_000


def prepare(h5ad: str, folder: str) -> str:
    """Write the counts of an h5ad as shards; return their folder."""
    with h5py.File(h5ad) as file:
        n_obs = len(file["X/indptr"]) - 1
    cores = len(os.sched_getaffinity(0))
    bounds = np.linspace(0, n_obs, min(cores, n_obs) + 1, dtype=int).tolist()
    counts = [Path(folder) / f"counts-{start}.json" for start in bounds[:-1]]
    split = Store(max(len(counts), n_obs // CELLS_A_SHARD), Validation(1e-12, "cell"), 0)
    shards = Path(folder) / "shards"
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:  # forked: what is imported need not be again
        list(pool.map(partial(_extract, h5ad), bounds[:-1], bounds[1:], counts))
        list(pool.map(partial(_gather, counts, split, shards), range(split.shards)))
    return str(shards)


def _extract(h5ad: str, start: int, stop: int, path: Path) -> None:
    backed, rows = ad.read_h5ad(h5ad, backed="r"), np.arange(start, stop)
    blocks = (
        sp.csr_matrix(backed.X[part[0] : part[-1] + 1], dtype=np.uint32)
        for part in np.array_split(rows, -(-len(rows) // CHUNK_CELLS))
    )
    obs = backed.obs[[]].iloc[rows].assign(row=rows, sample=path.stem)
    write_json(write_counts(blocks, obs, backed.var[[]], path.with_suffix(".zarr"), sample=path.stem), path)


def _gather(counts: list[Path], split: Store, folder: Path, shard: int) -> None:
    path = folder / f"train-{shard:04d}.json"
    write_json(write_shard(counts, "train", shard, path.with_suffix(".zarr"), seed=0, store=split), path)


@cache
def opened(path: str, batch_size: int, output: str) -> tuple[Loader, np.ndarray]:
    """Return a loader of the shards in a folder, and the source's row of each of its cells."""
    store = ShardedCounts(sorted(Path(path).glob("*.json")))
    rows = np.concatenate([reader.raw_column("row", 0, reader.n_obs).astype(np.int32) for reader in store.stores])
    threads = len(os.sched_getaffinity(0))
    return Loader(store, batch_size=batch_size, seed=0, output=output, threads=threads), rows


def epoch(path: str, batch_size: int, output: str, seed: int) -> Iterator[tuple[object, np.ndarray]]:
    """Yield the minibatches of an epoch, each with its rows in the h5ad; `output`: as the loader names it."""
    loader, source_rows = opened(path, batch_size, output)
    loader.epoch, loader.step = seed, 0
    for x_ng, _, rows in loader:
        is_dense = output in ("dense", "counts")
        yield (x_ng.numpy() if is_dense else tuple(array.numpy() for array in x_ng[:3])), source_rows[rows]
