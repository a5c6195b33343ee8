"""annbatch opens our shards as they are: by zarr-python's codecs, in an interpreter of its own (it wants Python 3.12).

COHORTVI_ANNBATCH_PYTHON names one that has benchmarks/requirements-annbatch.txt; `.ci/run` makes it.
"""

import os
import subprocess

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.shards import write_shard

THEIRS = """
import sys
import anndata as ad, numpy as np, scipy.sparse as sp, zarr
from annbatch import Loader

folder, shard = sys.argv[1:]
loader = Loader(batch_size=20, chunk_size=10, preload_nchunks=4, shuffle=True, preload_to_gpu=False,
                rng=np.random.default_rng(0), return_index=False)
group = zarr.open_group(shard, mode="r")
obs = ad.io.read_elem(group["obs"])[["row"]]
loader.add_adata(ad.AnnData(ad.io.sparse_dataset(group["X"]), obs=obs, var=ad.io.read_elem(group["var"])))
found = [(minibatch["X"], minibatch["obs"]["row"].to_numpy()) for minibatch in loader]
sp.save_npz(f"{folder}/x.npz", sp.vstack([sp.csr_matrix(x) for x, _ in found]))
np.save(f"{folder}/rows.npy", np.concatenate([rows for _, rows in found]))
"""


@pytest.mark.skipif("COHORTVI_ANNBATCH_PYTHON" not in os.environ, reason="no COHORTVI_ANNBATCH_PYTHON")
def test_annbatch_reads_our_shards_as_they_are(tmp_path):
    x = np.random.default_rng(0).poisson(0.5, (200, 30)).astype(np.uint32)
    x[5, 3], x[150, 7] = 300, 70_000
    obs = pd.DataFrame({"row": np.arange(200)}, index=[f"c{i}" for i in range(200)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(30)])
    counts = tmp_path / "counts.json"
    write_json(write_counts([sp.csr_matrix(x)], obs, var, counts.with_suffix(".zarr"), sample="s"), counts)
    shard = tmp_path / "train-0000.zarr"
    write_shard([counts], "train", 0, shard, seed=0, store=Store(1, Validation(1e-12, "cell"), 0))
    command = [os.environ["COHORTVI_ANNBATCH_PYTHON"], "-c", THEIRS, str(tmp_path), str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, rows = sp.load_npz(tmp_path / "x.npz").toarray(), np.load(tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.sort(rows), np.arange(200))
    np.testing.assert_array_equal(found, x[rows])
