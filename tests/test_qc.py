"""Quality control: metrics equal scanpy's, every cell has one reason, whole samples are gated."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from cohortvi.cohort.genes import gene_moments
from cohortvi.cohort.qc import bounds, gene_set_mask, reasons, run_qc, thresholds_of
from cohortvi.cohort.readers import iter_counts, open_raw
from cohortvi.cohort.sheet import Sample
from cohortvi.config import Doublets, Gate, Qc, Threshold

GENE_SETS = {"mt": "^MT-", "ribo": "^RP[SL]", "hb": r"^HB[ABDEGMQZ]\d?$"}
OPEN = Threshold(above=None, below=None, mads_low=None, mads_high=None, log1p=False)
NO_DOUBLETS = Doublets(enabled=False, expected_rate=0.06, remove=True, min_cells=100)
NO_GATE = Gate(min_cells=0, min_median_genes=0, keep=())
COVID = ["Normal_PBMC_5", "Normal_PBMC_14", "nCoV_PBMC_1", "nCoV_PBMC_15", "nCoV_PBMC_16", "nCoV_PBMC_17"]


def qc_of(**parts) -> Qc:
    defaults = {"symbols": None, "gene_sets": GENE_SETS, "thresholds": {}, "overrides": {}}
    return Qc(**{**defaults, "doublets": NO_DOUBLETS, "gate": NO_GATE, **parts})


def raw_of(path, gene_key="var_names", symbols=None, name="s", chunk_cells=400):
    sample = Sample(name, str(path), None, None, (), "b", {})
    return open_raw(sample, gene_key=gene_key, symbols=symbols, keep_obs=(), chunk_cells=chunk_cells)


@pytest.fixture
def small(tmp_path):
    """60 cells: 20 rich, 20 poor, 20 full of mitochondrial counts; the last one has no count at all."""
    rng = np.random.default_rng(0)
    x = rng.poisson(2.0, (60, 50)).astype(np.float32)
    x[20:40, 15:] = 0
    x[40:, :5] += 40
    x[59] = 0
    names = [f"MT-{i}" for i in range(5)] + [f"RPS{i}" for i in range(5)] + [f"G{i}" for i in range(40)]
    path = tmp_path / "small.h5ad"
    ad.AnnData(
        sp.csr_matrix(x), obs=pd.DataFrame(index=[f"c{i}" for i in range(60)]), var=pd.DataFrame(index=names)
    ).write(path)
    return path


def assert_metrics_equal_scanpys(cells, adata):
    for name, pattern in GENE_SETS.items():
        adata.var[name] = adata.var["symbol"].str.match(pattern).to_numpy()
    sc.pp.calculate_qc_metrics(adata, qc_vars=list(GENE_SETS), percent_top=None, log1p=False, inplace=True)
    for name in ("n_genes_by_counts", "total_counts"):
        np.testing.assert_array_equal(cells[name], adata.obs[name].astype(np.int64))
    for name in GENE_SETS:
        np.testing.assert_allclose(cells[f"pct_counts_{name}"], adata.obs[f"pct_counts_{name}"], atol=1e-6, rtol=0)


def test_metrics_equal_scanpys_on_simulated_cells(small):
    adata = ad.read_h5ad(small)
    adata.X = adata.X.astype(np.float64)
    adata.var["symbol"] = adata.var_names
    cells, _ = run_qc(raw_of(small, chunk_cells=7), qc_of(), 0)
    assert_metrics_equal_scanpys(cells, adata)


@pytest.mark.parametrize("name", COVID)
def test_metrics_equal_scanpys_on_covid(test_data, name):
    path = test_data / "covid_pbmc_6samples" / f"{name}.h5"
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        adata = sc.read_10x_h5(path)
    adata.X = adata.X.astype(np.float64)
    adata.var["symbol"] = adata.var_names
    adata.var_names = adata.var["gene_ids"].to_numpy()
    cells, _ = run_qc(raw_of(path, gene_key="gene_ids"), qc_of(), 0)
    assert_metrics_equal_scanpys(cells, adata)


def test_pbmc3k_has_the_published_numbers(test_data):
    path = test_data / "pbmc3k" / "pbmc3k.h5ad"
    raw = raw_of(path, symbols="symbol")
    thresholds = {
        "n_genes_by_counts": replace(OPEN, above=200, below=2500),
        "pct_counts_mt": replace(OPEN, below=5),
    }
    cells, facts = run_qc(raw, qc_of(thresholds=thresholds), 0)
    assert facts["n_kept"] == 2638
    assert facts["removed"] == {"n_genes_by_counts_high": 5, "pct_counts_mt_high": 57}
    moments = gene_moments((block for _, block in iter_counts(raw)), raw.var)
    assert (moments["n_cells"] >= 3).sum() == 13714
    adata = ad.read_h5ad(path)
    adata.X = adata.X.astype(np.float64)
    assert_metrics_equal_scanpys(cells, adata)
    labels = pd.read_csv(path.parent / "obs.tsv.gz", sep="\t", index_col=0, dtype=str, keep_default_na=False)
    assert set(cells.index[cells["reason"] == ""]) == set(labels.index[labels["cell_type"] != "NA"])


def test_a_fixed_bound_is_strict_and_a_missing_value_breaks_it():
    metrics = pd.DataFrame({"a": [1.0, 2.0, 3.0, np.nan]})
    assert list(reasons(metrics, {"a": {"low": 1.0, "high": 3.0}})) == ["a_low", "", "a_high", "a_low"]


def test_the_first_bound_in_the_config_is_the_reason():
    metrics = pd.DataFrame({"a": [0.0], "b": [0.0]})
    assert list(reasons(metrics, {"b": {"low": 1.0}, "a": {"low": 1.0}})) == ["b_low"]


def test_mad_bounds_are_median_minus_and_plus_mads():
    values = pd.Series([1.0, 2.0, 3.0, 4.0, 100.0])  # median 3, absolute deviations 2 1 0 1 97, their median 1
    assert bounds(values, replace(OPEN, mads_low=2, mads_high=3)) == {"mad_low": 1.0, "mad_high": 6.0}
    on_log = bounds(np.expm1(values), replace(OPEN, mads_high=3, log1p=True))
    assert on_log["mad_high"] == pytest.approx(np.expm1(6.0))


def test_an_override_changes_one_bound_of_one_sample():
    qc = qc_of(thresholds={"pct_counts_mt": replace(OPEN, below=20)}, overrides={"s": {"pct_counts_mt": {"below": 30}}})
    assert thresholds_of("s", qc)["pct_counts_mt"].below == 30
    assert thresholds_of("t", qc)["pct_counts_mt"].below == 20


def test_gene_sets_by_pattern_and_by_list():
    symbols = pd.Series(["MT-1", "AMT-1", "HBB", "HBEGF"])
    assert list(gene_set_mask(symbols, "^MT-")) == [True, False, False, False]
    assert list(gene_set_mask(symbols, ["HBB", "XX"])) == [False, False, True, False]


def test_every_cell_is_kept_or_has_one_reason(small):
    thresholds = {
        "n_genes_by_counts": replace(OPEN, above=20),
        "pct_counts_mt": replace(OPEN, below=50),
    }
    cells, facts = run_qc(raw_of(small), qc_of(thresholds=thresholds), 0)
    assert facts["n_kept"] + sum(facts["removed"].values()) == facts["n_obs"] == len(cells)
    assert facts["removed"] == {"n_genes_by_counts_low": 21, "pct_counts_mt_high": 19}


def test_a_sample_under_the_gate_is_quarantined_and_may_be_let_through_by_name(small):
    gate = Gate(min_cells=100, min_median_genes=0, keep=())
    cells, facts = run_qc(raw_of(small), qc_of(gate=gate), 0)
    assert facts["n_kept"] == 0
    assert facts["quarantined"] == "60 cells left, fewer than qc.gate.min_cells = 100"
    assert set(cells["reason"]) == {"quarantined"}
    _, kept = run_qc(raw_of(small), qc_of(gate=replace(gate, keep=("s",))), 0)
    assert kept["quarantined"] is None
    assert kept["n_kept"] == 60
    assert "fewer than" in kept["kept_by_override"]
    _, low = run_qc(raw_of(small), qc_of(gate=replace(gate, min_cells=0, min_median_genes=49)), 0)
    assert "lower than qc.gate.min_median_genes = 49" in low["quarantined"]


def test_no_cell_left_is_an_error_that_says_what_removed_them(small):
    qc = qc_of(thresholds={"total_counts": replace(OPEN, above=1e6)})
    with pytest.raises(ValueError, match="sample 's' has no cell left of 60 after QC; removed by total_counts_low 60"):
        run_qc(raw_of(small), qc, 0)


def test_doublets_are_scrublets_calls(tmp_path):
    rng = np.random.default_rng(0)
    profiles = rng.dirichlet(np.full(300, 0.1), 4)
    types = rng.integers(0, 4, 400)
    mean = profiles[types] * 1500
    mean[:40] += profiles[(types[:40] + 1) % 4] * 1500
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    adata.obs_names = [f"c{i}" for i in range(400)]
    adata.var_names = [f"g{i}" for i in range(300)]
    path = tmp_path / "d.h5ad"
    adata.write(path)
    doublets = Doublets(enabled=True, expected_rate=0.1, remove=True, min_cells=50)
    cells, facts = run_qc(raw_of(path), qc_of(gene_sets={}, doublets=doublets), 7)
    sc.pp.scrublet(
        adata, expected_doublet_rate=0.1, mean_center=False, use_approx_neighbors=False, random_state=7, verbose=False
    )
    np.testing.assert_allclose(cells["doublet_score"], adata.obs["doublet_score"], rtol=1e-6)
    np.testing.assert_array_equal(cells["predicted_doublet"], adata.obs["predicted_doublet"])
    assert facts["removed"]["doublet"] == adata.obs["predicted_doublet"].sum() > 20
    kept, _ = run_qc(raw_of(path), qc_of(gene_sets={}, doublets=replace(doublets, remove=False)), 7)
    assert (kept["reason"] == "").all()
    assert kept["predicted_doublet"].any()
