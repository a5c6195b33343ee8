"""The loader as a plug-in for benchmarks: `prepare` writes an h5ad as shards, `epoch` yields minibatches of them.

The cells are written as the workflow writes a sample: once in order as a counts store, then shuffled into shards. One
loader per store, batch size and output is kept open. Dense minibatches are float32, sparse ones int32 and float32, or
both in the store's small types; they lie in memory that the next one overwrites.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.shards import write_shard

CHUNK_CELLS = 2048
CELLS_A_SHARD = 250_000


def prepare(h5ad: str, folder: str) -> str:
    """Write the counts of an h5ad as shards; return their folder."""
    backed = ad.read_h5ad(h5ad, backed="r")
    counts, n_obs = Path(folder) / "counts.json", backed.n_obs
    blocks = (
        sp.csr_matrix(backed.X[start : start + CHUNK_CELLS], dtype=np.uint32) for start in range(0, n_obs, CHUNK_CELLS)
    )
    obs = backed.obs[[]].assign(row=np.arange(n_obs), sample="all")
    write_json(write_counts(blocks, obs, backed.var[[]], counts.with_suffix(".zarr"), sample="all"), counts)
    split = Store(max(1, n_obs // CELLS_A_SHARD), Validation(1e-12, "cell"), 0)

    def write(shard: int) -> None:
        path = Path(folder) / "shards" / f"train-{shard:04d}.json"
        write_json(write_shard([counts], "train", shard, path.with_suffix(".zarr"), seed=0, store=split), path)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # as the jobs of the workflow, side by side
        list(pool.map(write, range(split.shards)))
    return str(Path(folder) / "shards")


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
