"""Cohorts to measure models on, in memory, and their cells as shards, written as the workflow writes them.

Real ones lie in the folder that COHORTVI_TEST_DATA names; each comes with its 2,000 most variable genes, counts as
float32 CSR, and the columns `sample`, the batch of all models, and `total_counts` over all genes.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from simulated import Preset, simulate
from sklearn.linear_model import LogisticRegression

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.names import shard_names
from cohortvi.store.shards import write_shard

SPLIT = Store(4, Validation(0.1, "cell"), 0)
# Types of Kang et al. that a classifier over other cells cannot be asked for: states, and what surface proteins define.
COARSE = {"CD4 Naive T": "CD4 T", "CD4 Memory T": "CD4 T", "T activated": "CD4 T", "B Activated": "B"}
COVID = ("Normal_PBMC_5", "Normal_PBMC_14", "nCoV_PBMC_1", "nCoV_PBMC_15", "nCoV_PBMC_16", "nCoV_PBMC_17")


def quiet() -> None:
    """Have scvi-tools, what it stands on and our training say nothing but errors."""
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi", "cohortvi"):
        logging.getLogger(name).setLevel(logging.ERROR)


def data_folder() -> Path:
    """Return the folder of the real cohorts."""
    if "COHORTVI_TEST_DATA" not in os.environ:
        raise SystemExit("COHORTVI_TEST_DATA is not set; expected the folder with the published cohorts")
    return Path(os.environ["COHORTVI_TEST_DATA"])


def variable_genes(cells: ad.AnnData, span: float = 0.3) -> ad.AnnData:
    """Return the cells on the 2,000 genes that are most variable over their samples."""
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    cells.obs["total_counts"] = cells.X.sum(1).A1
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
    kept.obs["sample"] = pd.Categorical(kept.obs["sample"].astype(str))  # sorted, as models have their batches
    return variable_genes(kept)


def read_mixology() -> ad.AnnData:
    """Return the 1,021 singlets of five cell lines of Tian et al. 2019, five batches of two protocols.

    `cell_type` is the line, known by genotype; genes are those that were detected in every batch.
    """
    cells = ad.read_h5ad(data_folder() / "sc_mixology_5batches" / "sc_mixology_5batches.h5ad")
    cells = cells[cells.obs["demuxlet_cls"] == "SNG", ~cells.var_names.str.startswith("ERCC-")].copy()
    cells.obs["sample"] = cells.obs["batch"].astype("category")
    parts = (cells.X[(cells.obs["sample"] == name).to_numpy()] for name in cells.obs["sample"].cat.categories)
    detected = np.all([np.asarray((part > 0).sum(0)).ravel() > 0 for part in parts], axis=0)
    return variable_genes(cells[:, detected].copy(), span=0.5)


def read_onek1k() -> ad.AnnData:
    """Return 7,811 cells of 40 donors of the OneK1K cohort, on all the 1,000 genes that there are."""
    cells = ad.read_h5ad(data_folder() / "onek1k_40donors_1000genes" / "onek1k_40donors_1000genes.h5ad")
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    cells.obs["sample"] = cells.obs["donor"].astype("category")
    cells.obs["total_counts"] = cells.X.sum(1).A1
    return cells


def transferred_types(cells: ad.AnnData, least: float = 0.9) -> pd.Series:
    """Return types for blood cells without labels, by logistic regression from those of Kang et al. 2018, made coarser.

    On log1p of counts per 10,000 of the genes of both, standardised in either data set by itself. Missing where no type
    has a probability of `least`. No model that is compared has a part in it, but what is linear in log counts may have
    an easier time. Of pbmc3k it types 77 %, and 98.6 % of these as published; of covid 75 %.
    """
    known = ad.read_h5ad(data_folder() / "kang_ifnb_13999" / "kang_ifnb_13999.h5ad")
    genes = cells.var_names.intersection(known.var_names, sort=False)
    scaled = []
    for part in (known[:, genes].copy(), cells[:, genes].copy()):
        sc.pp.normalize_total(part, target_sum=1e4)
        sc.pp.log1p(part)
        sc.pp.scale(part, max_value=10)
        scaled.append(part.X)
    types = known.obs["cell_type"].astype(str).replace(COARSE)
    model = LogisticRegression(C=0.01, max_iter=200).fit(scaled[0], types)
    chances_nt = model.predict_proba(scaled[1])
    found = pd.Series(model.classes_[chances_nt.argmax(1)], cells.obs_names)
    return found.where(chances_nt.max(1) >= least)


def simulated(preset: Preset) -> ad.AnnData:
    """Return a simulated cohort."""
    cells = simulate(preset)
    cells.obs["sample"] = cells.obs["batch"]
    return cells


COHORTS: dict[str, Callable[[], ad.AnnData]] = {
    "kang": read_kang,
    "covid": read_covid,
    "mixology": read_mixology,
    "onek1k": read_onek1k,
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
