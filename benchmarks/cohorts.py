"""Cohorts to measure models on, in memory, and their cells as shards, written as the workflow writes them.

Real ones lie in the folder that COHORTVI_TEST_DATA names; each comes with its 2,000 most variable genes, counts as
float32 CSR, and the column `sample`, the batch of all models.
"""

import os
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from simulated import Preset, simulate

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.names import shard_names
from cohortvi.store.shards import write_shard

SPLIT = Store(4, Validation(0.1, "cell"), 0)
COVID = ("Normal_PBMC_5", "Normal_PBMC_14", "nCoV_PBMC_1", "nCoV_PBMC_15", "nCoV_PBMC_16", "nCoV_PBMC_17")


def data_folder() -> Path:
    """Return the folder of the real cohorts."""
    if "COHORTVI_TEST_DATA" not in os.environ:
        raise SystemExit("COHORTVI_TEST_DATA is not set; expected the folder with the published cohorts")
    return Path(os.environ["COHORTVI_TEST_DATA"])


def variable_genes(cells: ad.AnnData, span: float = 0.3) -> ad.AnnData:
    """Return the cells on the 2,000 genes that are most variable over their samples."""
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    sc.pp.highly_variable_genes(cells, flavor="seurat_v3", n_top_genes=2000, batch_key="sample", span=span, subset=True)
    return cells


def read_kang() -> ad.AnnData:
    """Return the 13,963 cells of known donor of Kang et al. 2018, on genes that were detected in both conditions."""
    cells = ad.read_h5ad(data_folder() / "kang_ifnb_13999" / "kang_ifnb_13999.h5ad")
    cells = cells[cells.obs["donor"] != "NA"].copy()
    cells.obs["sample"] = pd.Categorical(cells.obs["donor"].astype(str) + "-" + cells.obs["condition"].astype(str))
    stim = (cells.obs["condition"] == "stim").to_numpy()
    detected = [np.asarray((cells.X[rows] > 0).sum(0)).ravel() > 0 for rows in (stim, ~stim)]
    return variable_genes(cells[:, detected[0] & detected[1]].copy(), span=0.5)


def read_covid() -> ad.AnnData:
    """Return the 6,196 cells of Lee et al. 2020 with more than 200 genes and less than 20 % of mitochondrial counts."""
    parts = {name: sc.read_10x_h5(data_folder() / "covid_pbmc_6samples" / f"{name}.h5") for name in COVID}
    for part in parts.values():
        part.var_names_make_unique()
    cells = ad.concat(parts, label="sample", index_unique="-", merge="same")
    total = np.asarray(cells.X.sum(1)).ravel()
    mitochondrial = np.asarray(cells.X[:, cells.var_names.str.startswith("MT-")].sum(1)).ravel()
    n_genes = np.diff(sp.csr_matrix(cells.X).indptr)
    kept = cells[(n_genes > 200) & (mitochondrial < 0.2 * total)].copy()
    kept.obs["sample"] = kept.obs["sample"].astype("category")
    return variable_genes(kept)


def simulated(preset: Preset) -> ad.AnnData:
    """Return a simulated cohort."""
    cells = simulate(preset)
    cells.obs["sample"] = cells.obs["batch"]
    return cells


COHORTS: dict[str, Callable[[], ad.AnnData]] = {
    "kang": read_kang,
    "covid": read_covid,
    "S": lambda: simulated(Preset(50_000, 2_000, 0.1, 6, 3)),
    "T": lambda: simulated(Preset(10_000, 2_000, 0.05, 20, 4)),
}


def write_samples(cells: ad.AnnData, folder: Path) -> list[Path]:
    """Write each sample's counts as the workflow does; return the manifests. `row` of obs, if there, is kept."""
    paths = []
    for sample in cells.obs["sample"].cat.categories:
        part = cells[cells.obs["sample"] == sample]
        if not part.n_obs:
            continue
        block = sp.csr_matrix(part.X, dtype=np.uint32)
        obs = pd.DataFrame({"row": np.arange(part.n_obs), "sample": sample, "batch": sample}, part.obs_names)
        obs["total_counts"] = block.sum(1).A1
        for column in part.obs.columns.intersection(["row", "cell_type"]):
            obs[column] = part.obs[column].to_numpy()
        path = folder / f"{sample}.json"
        write_json(write_counts([block], obs, part.var[[]], path.with_suffix(".zarr"), sample=sample), path)
        paths.append(path)
    return paths


def write_shards(cells: ad.AnnData, folder: Path) -> tuple[list[Path], list[Path]]:
    """Write the cells as the workflow does; return the manifests of the training and the validation shards."""
    counts, paths = write_samples(cells, folder), []
    for name in shard_names(SPLIT):
        split, shard = name.split("-")
        path = folder / f"{name}.json"
        write_json(write_shard(counts, split, int(shard), path.with_suffix(".zarr"), seed=0, store=SPLIT), path)
        paths.append(path)
    return tuple([path for path in paths if path.name.startswith(split)] for split in ("train", "validation"))
