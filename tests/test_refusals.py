"""Bad input through the whole workflow: the message that a user sees, and nothing under results/ for the sample."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from make_inputs import truncate
from workflows import TINY, cohort_clone, run

pytestmark = pytest.mark.slow

N_OBS, N_VARS = 120, 60
NOT_ASKED = {
    "differential": {"comparisons": {}},
    "expression": {"genes": [], "batches": [], "groups": []},
    "report": {"color_by": []},
}
VALUES = TINY | {"atlas": TINY["atlas"] | {"metrics": {"truth": None}}} | NOT_ASKED


def write(path: Path, change: Callable[[ad.AnnData], ad.AnnData] = lambda adata: adata) -> Path:
    """Write counts as h5ad, changed by `change`."""
    x = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (N_OBS, N_VARS)).astype(np.float32))
    obs = pd.DataFrame({"donor": "d1"}, index=[f"cell{i}" for i in range(N_OBS)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_VARS)])
    change(ad.AnnData(x, obs=obs, var=var)).write_h5ad(path)
    return path


def with_value(value: float) -> Callable[[ad.AnnData], ad.AnnData]:
    def change(adata: ad.AnnData) -> ad.AnnData:
        adata.X.data[7] = value
        return adata

    return change


def normalised(adata: ad.AnnData) -> ad.AnnData:
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    return adata


def same_cells(adata: ad.AnnData) -> ad.AnnData:
    adata.obs_names = ["cell1", *adata.obs_names[1:]]
    return adata


def same_genes(adata: ad.AnnData) -> ad.AnnData:
    adata.var_names = ["gene1", *adata.var_names[1:]]
    return adata


def other_genes(adata: ad.AnnData) -> ad.AnnData:
    adata.var_names = [f"ENSG{i}" for i in range(N_VARS)]
    return adata


def attempt(tmp_path: Path, rows: list[dict], values: dict = VALUES) -> tuple[str, Path]:
    """Run the workflow on a sheet of these rows; return what it printed, having failed, and the clone."""
    sheet = pd.DataFrame(rows).fillna("")
    clone = cohort_clone(tmp_path / "clone", sheet, values)
    done = run(clone, check=False)
    assert done.returncode != 0
    return done.stdout, clone


def refused(tmp_path: Path, rows: list[dict], values: dict = VALUES) -> str:
    """Return what the workflow printed, having refused before any job started."""
    printed, clone = attempt(tmp_path, rows, values)
    assert not (clone / "results").exists()
    assert not (clone / "logs").exists()
    return printed


def test_every_fault_of_the_files_metadata_is_listed_before_any_job(tmp_path):
    truncated, good, table = write(tmp_path / "t.h5ad"), write(tmp_path / "good.h5ad"), tmp_path / "table.csv"
    truncate(truncated)
    table.write_text("1,2\n")
    found = {
        "missing": ({"path": tmp_path / "nowhere.h5ad"}, "does not exist"),
        "truncated": ({"path": truncated}, "cannot be read as h5ad"),
        "unknown": ({"path": table}, "unknown format"),
        "layer": (
            {"path": good, "layer": "layers/counts"},
            "no layer 'layers/counts'; expected one of X: set `layer`",
        ),
        "select": ({"path": good, "select": "donor=d9"}, "has no cell with donor=d9; expected values as in the file"),
        "cells": ({"path": write(tmp_path / "c.h5ad", same_cells)}, "1 barcodes that stand more than once: cell1;"),
        "genes": ({"path": write(tmp_path / "g.h5ad", same_genes)}, "1 gene names that stand more than once: gene1;"),
        "empty": ({"path": write(tmp_path / "e.h5ad", lambda adata: adata[:0].copy())}, "is empty: it holds 0 cells"),
    }
    rows = [{"sample": name, "run": "run1"} | row for name, (row, _) in found.items()]
    printed = refused(tmp_path, [*rows, {"sample": "good", "run": "run1", "path": good}])
    for name, (row, message) in found.items():
        (line,) = (line for line in printed.splitlines() if f"sample {name!r}" in line)
        assert str(row["path"]) in line
        assert message in line
    assert "sample 'good'" not in printed


def test_samples_that_share_no_gene(tmp_path):
    paths = write(tmp_path / "a.h5ad"), write(tmp_path / "b.h5ad", other_genes)
    printed = refused(tmp_path, [{"sample": f"s{i}", "path": path, "run": "r"} for i, path in enumerate(paths)])
    assert "the samples share no gene: their lists begin gene0, gene1, gene2 ...; ENSG0, ENSG1, ENSG2 ..." in printed
    assert "Set cohort.gene_key to a column of var that they have in common, or cohort.join: outer" in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sample": "s1", "run": "a"}, {"sample": "s1", "run": "a"}], "sample 's1' stands in 2 rows"),
        ([{"sample": "s1", "donor": "a"}], "no column 'run', which cohort.batch_key names; found sample, donor, path"),
        (
            [{"sample": "s1", "run": "a"}, {"sample": "s2"}],
            "line 3: sample 's2': column 'run' is empty;",
        ),
    ],
)
def test_faults_of_the_sheet(tmp_path, rows, message):
    path = write(tmp_path / "good.h5ad")
    assert message in refused(tmp_path, [row | {"path": path} for row in rows])


def test_every_fault_of_the_config_is_listed_with_the_nearest_key(tmp_path):
    values = deepcopy(VALUES)
    values["genes"] |= {"flavour": "seurat_v3", "n_top": "many"}
    values["qc"]["gate"]["min_cels"] = 5
    values["models"]["nb"] |= {"likelihood": "normal", "max_epochs": 2.5, "learning_rate": "1e-3"}
    printed = refused(tmp_path, [{"sample": "s1", "path": write(tmp_path / "good.h5ad"), "run": "r"}], values)
    for message in (
        "genes.flavour: unknown key; did you mean 'flavor'?",
        "genes.n_top: found 'many' (text); expected integer",
        "qc.gate.min_cels: unknown key; did you mean 'min_cells'?",
        "models.nb.likelihood: found 'normal' (text); expected one of nb, zinb, poisson",
        "models.nb.max_epochs: found 2.5 (a number); expected integer",
        "models.nb.learning_rate: found '1e-3' (text); expected number; write 0.001 or 1.0e-3",
    ):
        assert message in printed


def test_values_that_are_no_counts_fail_in_their_own_job_and_the_other_samples_go_on(tmp_path):
    found = {
        "fraction": (with_value(1.5), "non-integer value 1.5"),
        "negative": (with_value(-1.0), "negative value -1.0"),
        "missing": (with_value(np.nan), "non-finite value nan"),
        "infinite": (with_value(np.inf), "non-finite value inf"),
        "lognorm": (normalised, "Log-normalised matrices are the commonest mistake"),
        "nocell": (
            lambda adata: adata[:, :3].copy(),
            "no cell left of 120 after QC; removed by n_genes_by_counts_low",
        ),
    }
    rows = [{"sample": name, "path": write(tmp_path / f"{name}.h5ad", change)} for name, (change, _) in found.items()]
    values = deepcopy(VALUES)
    values["qc"] = {
        "gate": {"min_cells": 0, "min_median_genes": 0},
        "doublets": {"enabled": False},
        "thresholds": {"n_genes_by_counts": {"above": 5}, "total_counts": {"above": 5}},
    }
    good = {"sample": "good", "path": write(tmp_path / "good.h5ad")}
    printed, clone = attempt(tmp_path, [row | {"run": "r"} for row in [*rows, good]], values)
    for name, (_, message) in found.items():
        log = (clone / f"logs/qc/{name}.log").read_text()
        assert f"{tmp_path / name}.h5ad: sample {name!r}" in log
        assert message in log
        assert message in printed
        assert not list((clone / "results").rglob(f"*{name}*"))
    assert "whole numbers are in layers/counts" in (clone / "logs/qc/lognorm.log").read_text()
    assert (clone / "results/cohort/qc/good.parquet").exists()
    assert (clone / "results/store/counts/good.json").exists()
