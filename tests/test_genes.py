"""Gene selection: ranks and choice equal scanpy's on the same cells, parts merge to the whole, lists are obeyed."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from cohortvi.cohort.genes import batch_variance, fit_trend, gene_moments, merge_moments, standardized
from cohortvi.cohort.readers import iter_counts, open_raw
from cohortvi.cohort.selection import joined, read_list, select_genes
from cohortvi.cohort.sheet import Sample
from cohortvi.config import Genes

SEURAT = Genes(flavor="seurat_v3", n_top=200, span=0.3, theta=100, always=(), never=(), frozen=None)


def blocks(raw, keep):
    return (block for _, block in iter_counts(raw, keep))


def moments_of(raw, keep):
    return gene_moments(blocks(raw, keep), raw.var)


def select(raws, batches, genes, join="inner", keep=None):
    """Run all passes as the workflow does."""
    keep = keep or {name: np.arange(len(raw.obs)) for name, raw in raws.items()}
    moments = {name: moments_of(raw, keep[name]) for name, raw in raws.items()}
    fits = {}
    for batch in set(batches.values()):
        merged = merge_moments([moments[name] for name in raws if batches[name] == batch])
        fits[batch] = fit_trend(merged, batch, genes)
    variances = {
        name: standardized(
            blocks(raw, keep[name]), fits[batches[name]].reindex(raw.var.index), genes.flavor, genes.theta
        )
        for name, raw in raws.items()
    }
    return select_genes(moments, variances, fits, batches, genes, join)


def open_h5ad(path, select=(), **options):
    sample = Sample("s", str(path), None, None, tuple(select), "b", {})
    options = {"gene_key": "var_names", "symbols": None, "keep_obs": (), "chunk_cells": 300, **options}
    return open_raw(sample, **options)


def write_h5ad(path, x, genes=None):
    names = genes if genes is not None else [f"g{i}" for i in range(x.shape[1])]
    cells = pd.DataFrame(index=[f"c{i}" for i in range(len(x))])
    ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=cells, var=pd.DataFrame(index=names)).write(path)
    return open_h5ad(path)


def simulated(seed, n=300, g=500):
    rng = np.random.default_rng(seed)
    mean = np.exp(rng.normal(-0.5, 1.2, g))
    return rng.poisson(rng.gamma(1.5, mean / 1.5, (n, g)))


def assert_same_choice(ours, theirs, variances):
    """Same values, same ranks and the same set, but for genes whose standardized variances tie to 1e-6."""
    np.testing.assert_allclose(ours["variances_norm"], theirs[variances], rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(ours["highly_variable_nbatches"], theirs["highly_variable_nbatches"])
    pd.testing.assert_series_equal(
        ours["highly_variable_rank"].astype(float),
        theirs["highly_variable_rank"].astype(float).set_axis(ours.index),
        check_names=False,
    )
    np.testing.assert_array_equal(ours["highly_variable"], theirs["highly_variable"])


def test_seurat_v3_equals_scanpy_on_simulated_batches(tmp_path):
    arrays = {name: simulated(seed) for seed, name in enumerate("abc")}
    raws = {name: write_h5ad(tmp_path / f"{name}.h5ad", x) for name, x in arrays.items()}
    batches = {"a": "1", "b": "1", "c": "2"}
    ours = select(raws, batches, SEURAT)
    whole = ad.AnnData(sp.csr_matrix(np.vstack(list(arrays.values())).astype(np.float64)))
    whole.obs["batch"] = np.repeat(["1", "1", "2"], 300)
    theirs = sc.pp.highly_variable_genes(whole, flavor="seurat_v3", n_top_genes=200, batch_key="batch", inplace=False)
    assert_same_choice(ours, theirs, "variances_norm")


def test_pearson_residuals_equal_scanpy(tmp_path):
    x = np.vstack([simulated(0), simulated(1)])
    raws = {"a": write_h5ad(tmp_path / "a.h5ad", x[:300]), "b": write_h5ad(tmp_path / "b.h5ad", x[300:])}
    ours = select(raws, {"a": "1", "b": "1"}, replace(SEURAT, flavor="pearson_residuals"))
    theirs = sc.experimental.pp.highly_variable_genes(
        ad.AnnData(sp.csr_matrix(x.astype(np.float64))),
        flavor="pearson_residuals",
        n_top_genes=200,
        inplace=False,
    )
    np.testing.assert_allclose(ours["variances_norm"], theirs["residual_variances"], rtol=1e-6)
    np.testing.assert_array_equal(ours["highly_variable"], theirs["highly_variable"])


def test_pearson_residuals_of_two_batches_equal_scanpy(tmp_path):
    arrays = {name: simulated(seed) for seed, name in enumerate("ab")}
    raws = {name: write_h5ad(tmp_path / f"{name}.h5ad", x) for name, x in arrays.items()}
    ours = select(raws, {"a": "1", "b": "2"}, replace(SEURAT, flavor="pearson_residuals"))
    whole = ad.AnnData(sp.csr_matrix(np.vstack(list(arrays.values())).astype(np.float64)))
    whole.obs["batch"] = np.repeat(["1", "2"], 300)
    # Batches of equal size: scanpy takes the clipping value of the first for all.
    theirs = sc.experimental.pp.highly_variable_genes(
        whole, flavor="pearson_residuals", n_top_genes=200, batch_key="batch", inplace=False
    )
    assert_same_choice(ours, theirs, "residual_variances")


def test_kang_equals_scanpy_over_16_batches(test_data):
    path = test_data / "kang_ifnb_13999" / "kang_ifnb_13999.h5ad"
    adata = ad.read_h5ad(path)
    adata = adata[adata.obs["donor"] != "NA"].copy()
    adata.X = adata.X.astype(np.float64)
    adata.obs["batch"] = adata.obs["donor"].astype(str) + "-" + adata.obs["condition"].astype(str)
    names = sorted(adata.obs["batch"].unique())
    raws = {
        name: open_h5ad(path, select=[("donor", name.split("-")[0]), ("condition", name.split("-")[1])])
        for name in names
    }
    assert len(raws) == 16
    assert sum(len(raw.obs) for raw in raws.values()) == 13963
    genes = replace(SEURAT, n_top=2000, span=0.5)
    ours = select(raws, {name: name for name in names}, genes)
    theirs = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=2000, batch_key="batch", span=0.5, inplace=False
    )
    assert_same_choice(ours, theirs, "variances_norm")


def test_covid_equals_scanpy_over_6_batches(test_data):
    folder = test_data / "covid_pbmc_6samples"
    paths = {path.stem: path for path in sorted(folder.glob("*.h5"))}
    assert len(paths) == 6
    raws = {name: open_h5ad(path, gene_key="gene_ids") for name, path in paths.items()}
    parts = []
    for name, path in paths.items():
        with pytest.warns(UserWarning, match="Variable names are not unique"):
            part = sc.read_10x_h5(path)
        part.var_names = part.var["gene_ids"].to_numpy()
        part.obs["batch"] = name
        parts.append(part)
    whole = ad.concat(parts, index_unique="-")
    whole.X = whole.X.astype(np.float64)
    ours = select(raws, {name: name for name in paths}, replace(SEURAT, n_top=2000))
    theirs = sc.pp.highly_variable_genes(whole, flavor="seurat_v3", n_top_genes=2000, batch_key="batch", inplace=False)
    assert_same_choice(ours, theirs, "variances_norm")


def test_a_fit_that_fails_names_batch_size_and_span(test_data):
    path = test_data / "kang_ifnb_13999" / "kang_ifnb_13999.h5ad"
    raw = open_h5ad(path, select=[("donor", "1039"), ("condition", "ctrl")])
    moments = merge_moments([moments_of(raw, np.arange(len(raw.obs)))])
    with pytest.raises(
        ValueError, match=r"batch 'b1': the loess fit .* genes.span = 0.3 \(276 cells, .* Set genes.span to 0.5"
    ):
        fit_trend(moments, "b1", SEURAT)


def test_moments_do_not_depend_on_chunks_and_merge_exactly(tmp_path):
    x = simulated(3)
    write_h5ad(tmp_path / "x.h5ad", x)
    keep = np.arange(0, 300, 2)
    tables = [moments_of(open_h5ad(tmp_path / "x.h5ad", chunk_cells=n), keep) for n in (1, 64, 1000)]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    merged = merge_moments([tables[0], moments_of(open_h5ad(tmp_path / "x.h5ad"), keep + 1)])
    np.testing.assert_allclose(merged["mean"], x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged["variance"], x.var(0, ddof=1), rtol=1e-12)


def test_variance_of_a_huge_mean_is_exact(tmp_path):
    x = np.full((200, 100), 10**6) + np.arange(200)[:, None] % 2
    merged = merge_moments([moments_of(write_h5ad(tmp_path / "x.h5ad", x), np.arange(200))])
    np.testing.assert_allclose(merged["variance"], x.var(0, ddof=1), rtol=1e-12)


def test_joins():
    indexes = [pd.Index(["a", "b", "c"]), pd.Index(["c", "d", "a"])]
    assert list(joined(indexes, "inner")) == ["a", "c"]
    assert list(joined(indexes, "outer")) == ["a", "b", "c", "d"]


def test_inner_and_outer_join_of_samples_with_other_genes(tmp_path):
    x = simulated(0)
    raws = {
        "a": write_h5ad(tmp_path / "a.h5ad", x, [f"g{i}" for i in range(500)]),
        "b": write_h5ad(tmp_path / "b.h5ad", x, [f"g{i}" for i in range(100, 600)]),
    }
    batches = {"a": "1", "b": "2"}
    assert len(select(raws, batches, SEURAT)) == 400
    outer = select(raws, batches, SEURAT, join="outer")
    assert len(outer) == 600
    assert outer["highly_variable"].sum() == 200


def test_quarantined_samples_have_no_say(tmp_path):
    x = simulated(0)
    raws = {
        "a": write_h5ad(tmp_path / "a.h5ad", x),
        "q": write_h5ad(tmp_path / "q.h5ad", x, [f"other{i}" for i in range(500)]),
    }
    keep = {"a": np.arange(300), "q": np.array([], dtype=np.int64)}
    chosen = select(raws, {"a": "1", "q": "2"}, SEURAT, keep=keep)
    assert list(chosen.index) == [f"g{i}" for i in range(500)]


def test_always_never_and_frozen_lists(tmp_path):
    raws = {"a": write_h5ad(tmp_path / "a.h5ad", simulated(0))}
    plain = select(raws, {"a": "1"}, SEURAT)
    chosen = plain.index[plain["highly_variable"]]
    loser = plain.index[~plain["highly_variable"]][0]
    listed = select(raws, {"a": "1"}, replace(SEURAT, always=(loser,), never=(chosen[0],)))
    assert listed.loc[loser, "highly_variable"]
    assert not listed.loc[chosen[0], "highly_variable"]
    assert listed["highly_variable"].sum() == 200
    (tmp_path / "frozen.txt").write_text("# chosen in 2024\ng5\n\ng7\n")
    frozen = select(raws, {"a": "1"}, replace(SEURAT, frozen=str(tmp_path / "frozen.txt")))
    assert list(frozen.index[frozen["highly_variable"]]) == ["g5", "g7"] == read_list(tmp_path / "frozen.txt")
    with pytest.raises(ValueError, match=r"genes.always: 1 of 1 genes are not in the cohort"):
        select(raws, {"a": "1"}, replace(SEURAT, always=("nope",)))


def test_no_shared_gene_and_no_sample_left_are_errors(tmp_path):
    x = simulated(0, g=100)
    raws = {
        "a": write_h5ad(tmp_path / "a.h5ad", x),
        "b": write_h5ad(tmp_path / "b.h5ad", x, [f"ENSG{i}" for i in range(100)]),
    }
    genes = replace(SEURAT, span=1.0)
    with pytest.raises(ValueError, match=r"the 2 samples share no gene: a has g0, g1, g2 ...; b has ENSG0"):
        select(raws, {"a": "1", "b": "2"}, genes)
    nobody = {name: np.array([], dtype=np.int64) for name in raws}
    with pytest.raises(ValueError, match="no sample has a cell left, all are quarantined"):
        select(raws, {"a": "1", "b": "2"}, genes, keep=nobody)


def test_parts_of_a_batch_merge_to_the_whole(tmp_path):
    x = simulated(5)
    whole = write_h5ad(tmp_path / "x.h5ad", x)
    for flavor in ("seurat_v3", "pearson_residuals"):
        genes = replace(SEURAT, flavor=flavor)
        fit = fit_trend(merge_moments([moments_of(whole, np.arange(300))]), "b", genes)
        one = [standardized(blocks(whole, np.arange(300)), fit, flavor, 100)]
        many = [standardized(blocks(whole, part), fit, flavor, 100) for part in np.split(np.arange(300), [1, 50, 200])]
        np.testing.assert_allclose(batch_variance(many, fit, flavor), batch_variance(one, fit, flavor), rtol=1e-10)
