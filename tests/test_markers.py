"""Markers and metrics: streamed moments equal scanpy's whole-matrix results; figures equal scikit-learn's."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortvi.atlas.clusters import from_largest
from cohortvi.atlas.markers import Moments, log_normalize, markers
from cohortvi.atlas.metrics import agreement, batch_mixing, silhouette


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    x = rng.poisson(np.exp(rng.normal(-1, 1, (3, 40)))[rng.integers(0, 3, 500)])
    x[:, 3] = 0
    clusters = pd.Series(pd.Categorical(rng.choice(["0", "1", "2"], 500, p=[0.6, 0.3, 0.1])))
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(40)]}, index=[f"g{i}" for i in range(40)])
    return sp.csr_matrix(x), x.sum(1) + 5, clusters, var


def blocks(x, totals, size):
    for start in range(0, x.shape[0], size):
        yield x[start : start + size], totals[start : start + size]


@pytest.mark.parametrize("size", [1, 97, 500])
def test_markers_equal_scanpys_t_test(cells, size):
    x, totals, clusters, var = cells
    ours = markers(blocks(x, totals, size), clusters, var)
    adata = ad.AnnData(
        log_normalize(x, totals), obs=pd.DataFrame({"c": clusters.to_numpy()}, index=map(str, range(500)))
    )
    adata.obs["c"] = adata.obs["c"].astype("category")
    adata.var_names = var.index
    adata.uns["log1p"] = {}
    with np.errstate(all="ignore"):
        sc.tl.rank_genes_groups(adata, "c", method="t-test", pts=True)
    for name in ("0", "1", "2"):
        theirs = sc.get.rank_genes_groups_df(adata, name).set_index("names")
        mine = ours[ours["cluster"] == name].set_index("gene").loc[theirs.index]
        np.testing.assert_allclose(mine["score"], theirs["scores"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine["pval_adj"], theirs["pvals_adj"], rtol=1e-4)
        np.testing.assert_allclose(mine["logfoldchange"], theirs["logfoldchanges"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine["pct_in"], theirs["pct_nz_group"], rtol=1e-6)
        np.testing.assert_allclose(mine["pct_out"], theirs["pct_nz_reference"], rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 59), max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_moments_of_parts_are_those_of_the_whole(seed, cuts):
    rng = np.random.default_rng(seed)
    x, codes = rng.poisson(1.0, (60, 7)).astype(float), rng.integers(0, 3, 60)
    moments = Moments(3, 7)
    for part in np.split(np.arange(60), sorted(cuts)):
        moments.add(sp.csr_matrix(x[part]), codes[part])
    for code in np.unique(codes):
        mine = x[codes == code]
        np.testing.assert_allclose(moments.mean[code], mine.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments.m2[code], ((mine - mine.mean(0)) ** 2).sum(0), atol=1e-9)
        np.testing.assert_array_equal(moments.expressing[code], (mine > 0).sum(0))


def test_agreement_leaves_out_unlabelled_cells():
    clusters = pd.DataFrame({"leiden_1": pd.Categorical(["0", "0", "1", "1", "0"])})
    found = agreement(clusters, pd.Series(["a", "a", "b", "b", "NA"]))["leiden_1"]
    assert found == {"ari": 1.0, "nmi": 1.0, "n_labelled": 4}


def graph_of(pairs, n):
    rows, columns = np.array(pairs).T
    distances = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    return ad.AnnData(obs=pd.DataFrame(index=map(str, range(n))), obsp={"distances": distances})


def test_mixing_is_one_when_neighbours_mirror_the_cohort_and_zero_when_none_does():
    mixed = graph_of([(i, j) for i in range(4) for j in range(4)], 4)
    assert batch_mixing(mixed, pd.Series(["a", "a", "b", "b"])) == pytest.approx(1)
    apart = graph_of([(0, 1), (1, 0), (2, 3), (3, 2)], 4)
    assert batch_mixing(apart, pd.Series(["a", "a", "b", "b"])) == pytest.approx(0)
    assert batch_mixing(apart, pd.Series(["a"] * 4)) is None


def test_silhouette_of_far_clusters_is_near_one_and_of_one_cluster_is_none():
    latent = np.repeat([[0.0, 0.0], [100.0, 0.0]], 20, axis=0) + np.random.default_rng(0).normal(size=(40, 2))
    assert silhouette(latent, pd.Series(["0"] * 20 + ["1"] * 20), 0) > 0.9
    assert silhouette(latent, pd.Series(["0"] * 40), 0) is None


def test_clusters_are_numbered_from_the_largest():
    found = from_largest(pd.Series(pd.Categorical(["b", "a", "a", "c", "c", "c"])))
    assert list(found) == ["2", "1", "1", "0", "0", "0"]
    assert list(found.cat.categories) == ["0", "1", "2"]
