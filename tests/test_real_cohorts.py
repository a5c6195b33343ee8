"""The workflow from published counts to the report; the figures expected are those published with the cohorts."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import yaml
from sklearn.metrics import adjusted_rand_score
from workflows import GATHER, cohort_clone, planned, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NO_BOUND = {"above": None, "below": None, "mads_low": None, "mads_high": None, "log1p": False}
# cells per donor in both conditions, without the 36 whose donor is unknown
KANG = {
    "ctrl": {101: 498, 1015: 1619, 1016: 717, 1039: 276, 107: 335, 1244: 1043, 1256: 1180, 1488: 880},
    "stim": {101: 722, 1015: 1566, 1016: 767, 1039: 405, 107: 332, 1244: 989, 1256: 1226, 1488: 1408},
}
# of 1,500 cells each, those with more than 200 genes and less than 20 % mitochondrial counts
COVID = {"Normal_PBMC_5": 1052, "Normal_PBMC_14": 1090, "nCoV_PBMC_1": 1087, "nCoV_PBMC_15": 1006,
         "nCoV_PBMC_16": 724, "nCoV_PBMC_17": 1237}  # fmt: skip
MIXOLOGY = {"sc_dropseq": 225, "sc_celseq2": 274, "sc_celseq2_5cl_p1": 297, "sc_celseq2_5cl_p2": 307,
            "sc_celseq2_5cl_p3": 305}  # fmt: skip


def values(thresholds: dict, **sections) -> dict:
    """What differs from config.yaml for a published cohort: bounds that are stated, no doublets removed, no gate."""
    bounds = {name: NO_BOUND for name in ("n_genes_by_counts", "total_counts", "pct_counts_mt")}
    common = {
        "qc": {
            "thresholds": bounds | {name: NO_BOUND | bound for name, bound in thresholds.items()},
            "doublets": {"enabled": False},
            "gate": {"min_cells": 0, "min_median_genes": 0},
        },
        "genes": {"n_top": 1000, "span": 0.5},
        "store": {"shards": 2},
        "models": {"nb": {"max_epochs": 15, "min_steps": 0}},
        "gap": {"cells": 100, "steps": 50, "draws": 100},
        "atlas": {"metrics": {"truth": None}},
        "report": {"color_by": []},
    }
    for name, section in sections.items():
        common[name] = common.get(name, {}) | section
    common["atlas"]["clusters"] = {"resolutions": [0.5], "shown": 0.5}
    return common


def ledger(clone: Path) -> pd.DataFrame:
    return pd.read_csv(clone / "results/cohort/ledger.tsv", sep="\t", index_col="sample")


def atlas(clone: Path) -> ad.AnnData:
    found = ad.read_zarr(clone / "results/models/nb/atlas.zarr")
    assert (clone / "results/report/index.html").stat().st_size > 100_000
    assert ledger(clone)["atlas_nb"].to_dict() == found.obs["sample"].value_counts().to_dict()
    return found


def test_kang_as_sixteen_samples_of_one_file(test_data, tmp_path):
    path = test_data / "kang_ifnb_13999/kang_ifnb_13999.h5ad"
    rows = [(f"{donor}_{condition}", path, f"donor={donor},condition={condition}", donor, condition)
            for condition in KANG for donor in KANG[condition]]  # fmt: skip
    sheet = pd.DataFrame(rows, columns=["sample", "path", "select", "donor", "condition"])
    sections = {
        "cohort": {"batch_key": ["donor", "condition"], "keep_obs": ["cell_type"]},
        "report": {"color_by": ["condition", "cell_type"]},
        "atlas": {
            "clusters": {"resolutions": [0.5], "shown": 0.5},
            "metrics": {"labels": ["cell_type"], "truth": None},
        },
        "genes": {"n_top": 2000, "span": 0.5},
    }
    clone = cohort_clone(tmp_path / "clone", sheet, values({}, **sections))
    run(clone)
    cells = {f"{donor}_{condition}": n for condition, donors in KANG.items() for donor, n in donors.items()}
    assert ledger(clone)["cells_in"].to_dict() == ledger(clone)["kept"].to_dict() == cells
    found = atlas(clone)
    assert found.n_obs == 13_963
    reference = ad.read_h5ad(path)
    names = [name.split("_", 2)[2] for name in found.obs_names]
    assert (reference[names].X != found[:, reference.var_names].X).nnz == 0
    assert (reference[names].obs["cell_type"].to_numpy() == found.obs["cell_type"].to_numpy()).all()
    sc.pp.highly_variable_genes(found, flavor="seurat_v3", n_top_genes=2000, batch_key="batch", span=0.5)
    chosen = pd.read_parquet(clone / "results/cohort/genes.parquet")["highly_variable"]
    assert chosen.sum() == 2000
    assert (chosen.loc[found.var_names].to_numpy() == found.var["highly_variable"].to_numpy()).all()
    agreement = adjusted_rand_score(found.obs["cell_type"], found.obs["leiden_0.5"])
    assert agreement > 0.4
    metrics = yaml.safe_load((clone / "results/models/nb/metrics.json").read_text())
    assert metrics["clusters"]["leiden_0.5"]["labels"]["cell_type"]["ari"] == pytest.approx(agreement)


def test_covid_as_six_10x_files(test_data, tmp_path):
    rows = [(name, test_data / f"covid_pbmc_6samples/{name}.h5", name.split("_")[0]) for name in COVID]
    sheet = pd.DataFrame(rows, columns=["sample", "path", "group"])
    thresholds = {"n_genes_by_counts": {"above": 200}, "pct_counts_mt": {"below": 20}}
    sections = {"cohort": {"gene_key": "gene_ids", "batch_key": ["sample"]}, "report": {"color_by": ["group"]}}
    clone = cohort_clone(tmp_path / "clone", sheet, values(thresholds, **sections))
    run(clone)
    table = ledger(clone)
    assert table["kept"].to_dict() == COVID
    assert (table["cells_in"] == 1500).all()
    removed = table[["removed_n_genes_by_counts_low", "removed_pct_counts_mt_high"]].sum(axis=1)
    assert (removed == 1500 - table["kept"]).all()
    found = atlas(clone)
    assert found.shape == (6196, 33_538)
    assert found.var_names.str.startswith("ENSG").all()
    assert found.var["symbol"].duplicated().sum() == 24


def test_pbmc3k_as_one_sample(test_data, tmp_path):
    path = test_data / "pbmc3k/pbmc3k.h5ad"
    sheet = pd.DataFrame([("pbmc3k", path)], columns=["sample", "path"])
    thresholds = {"n_genes_by_counts": {"above": 200, "below": 2500}, "pct_counts_mt": {"below": 5}}
    sections = {
        "cohort": {"batch_key": [], "keep_obs": ["cell_type"]},
        "models": {"nb": {"max_epochs": 40, "min_steps": 0}},
    }
    settings = values(thresholds, **sections)
    settings["qc"]["symbols"] = "symbol"
    clone = cohort_clone(tmp_path / "clone", sheet, settings)
    run(clone)
    found = atlas(clone)
    assert found.n_obs == 2638
    labels = found.obs["cell_type"]
    assert not labels.isin(["NA"]).any()
    assert labels.value_counts().to_dict() == {
        "Naive CD4 T": 697, "Memory CD4 T": 483, "CD14+ Mono": 480, "B": 344, "CD8 T": 271, "FCGR3A+ Mono": 162,
        "NK": 155, "DC": 32, "Platelet": 14,
    }  # fmt: skip
    assert adjusted_rand_score(labels, found.obs["leiden_0.5"]) > 0.4


def mixology_sheet(test_data: Path, folder: Path) -> tuple[pd.DataFrame, ad.AnnData]:
    """Write the five protocols' cells as files of the genes that each detects; return their sheet and the whole.

    The file of sc_dropseq does not tell the cell lines.
    """
    whole = ad.read_h5ad(test_data / "sc_mixology_5batches/sc_mixology_5batches.h5ad")
    whole = whole[:, ~whole.var_names.str.startswith("ERCC-")].copy()
    rows = []
    for name in MIXOLOGY:
        part = whole[whole.obs["batch"] == name].copy()
        if name == "sc_dropseq":
            del part.obs["cell_type"]
        part[:, np.asarray(part.X.sum(0)).ravel() > 0].copy().write_h5ad(folder / f"{name}.h5ad")
        rows.append((name, folder / f"{name}.h5ad", "dropseq" if "dropseq" in name else "celseq2"))
    return pd.DataFrame(rows, columns=["sample", "path", "protocol"]), whole


def test_sc_mixology_by_an_inner_and_an_outer_join_of_the_protocols_genes(test_data, tmp_path):
    sheet, whole = mixology_sheet(test_data, tmp_path)
    labels = {"column": "cell_type", "unknown": ["NA"], "weight": 50}
    sections = {"cohort": {"batch_key": ["sample"], "keep_obs": ["cell_type"], "join": "inner"},
                "models": {"nb": {"prior": "mixture", "labels": labels}}}  # fmt: skip
    clone = cohort_clone(tmp_path / "clone", sheet, values({}, **sections))
    run(clone)
    parts = [whole[whole.obs["batch"] == name].X for name in MIXOLOGY]
    detected = np.array([np.asarray(part.sum(0)).ravel() > 0 for part in parts])
    for join, genes in (("inner", detected.all(0)), ("outer", detected.any(0))):
        if join == "outer":
            settings = yaml.safe_load((clone / "tiny.yaml").read_text())
            settings["cohort"]["join"] = "outer"
            (clone / "tiny.yaml").write_text(yaml.safe_dump(settings))
            assert planned(clone) == GATHER | {"shard": 3}
            run(clone)
        found = atlas(clone)
        assert ledger(clone)["kept"].to_dict() == MIXOLOGY
        assert set(found.var_names) == set(whole.var_names[genes])
        names = [
            name.removeprefix(f"{sample}_") for name, sample in zip(found.obs_names, found.obs["sample"], strict=True)
        ]
        assert (found.X != whole[names, found.var_names].X).nnz == 0
        is_told, lines = (found.obs["sample"] != "sc_dropseq").to_numpy(), whole[names].obs["cell_type"].to_numpy()
        assert (found.obs["cell_type"].to_numpy() == np.where(is_told, lines, "NA")).all()
        is_right = found.obs["predicted_label"].to_numpy() == lines
        assert is_right[is_told].mean() > 0.95
        assert is_right[~is_told].mean() > 0.95
