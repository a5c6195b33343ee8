"""Differential expression beside enumeration, quadrature, scipy, and a cohort whose changes are known."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiny_cohort
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from cohortvi.atlas.differential import differential
from cohortvi.atlas.pseudobulk import pseudobulk
from cohortvi.config import Comparison, Differential
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.differential import (
    Population,
    changes,
    draw_population,
    expected_fdr,
    join_populations,
    pair_cells,
)
from cohortvi.inference.networks import Covariates
from cohortvi.inference.train import fit
from cohortvi.inference.vae import VAE
from cohortvi.store.opening import open_counts

N_CELLS, N_CHANGED, FOLD = 150, 6, 4.0


def small_vae(**changes) -> VAE:
    torch.manual_seed(0)
    settings = {"n_latent": 1, "n_hidden": 8, "n_layers": 1, "dropout": 0.0, "likelihood": "poisson"}
    settings |= {"dispersion": "gene", "encode_covariates": False, "norm": "none"}
    return VAE(12, 2, **settings | changes).eval().requires_grad_(requires_grad=False)


def of_batches(*codes: int) -> Covariates:
    return Covariates(torch.tensor(codes))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_expected_fdr_is_that_of_the_set_of_all_larger_probabilities(values):
    p_g = np.array(values)
    for alpha in (0.0501234, 0.3012345):  # which no mean of simple numbers rounds to
        chosen = expected_fdr(p_g) <= alpha
        # the largest set of likeliest genes whose mean probability of no change is at most alpha
        sorted_p = np.sort(p_g)[::-1]
        sizes = [k for k in range(1, len(p_g) + 1) if (1 - sorted_p[:k]).mean() <= alpha]
        assert chosen.sum() == max(sizes, default=0)
        if chosen.any() and not chosen.all():
            assert p_g[chosen].min() >= p_g[~chosen].max()


def test_pairs_are_of_one_batch_where_the_groups_share_some():
    first, second = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 0, 3])
    rows, others, shared = pair_cells(first, second, 30_000, np.random.default_rng(0))
    assert shared
    np.testing.assert_array_equal(first[rows], second[others])
    # harmonic means: batch 0 has 1 / (1/3 + 1), batch 1 has 1 / (1 + 1/2)
    assert np.mean(first[rows] == 0) == pytest.approx(0.75 / (0.75 + 2 / 3), abs=0.01)
    assert np.mean(rows[first[rows] == 0] == 2) == pytest.approx(1 / 3, abs=0.02)
    rows, others, shared = pair_cells(np.array([0, 0]), np.array([1, 2]), 100, np.random.default_rng(0))
    assert not shared
    assert set(rows) == set(others) == {0, 1}


def test_draws_have_the_moments_of_the_posterior_by_quadrature():
    vae = small_vae()
    torch.manual_seed(1)
    x_ng = torch.poisson(torch.rand(3, 12) * 4)
    covariates = of_batches(0, 1, 0)
    grid = torch.linspace(-8, 8, 4001)
    log_joint = vae.log_joint(x_ng, covariates)
    weights_zn = torch.stack([log_joint(z.expand(3, 1)) for z in grid]).softmax(0)
    mean_n = (weights_zn * grid[:, None]).sum(0)
    sd_n = ((weights_zn * grid[:, None] ** 2).sum(0) - mean_n**2).sqrt()
    repeated = 1500
    found = draw_population(vae, x_ng.repeat(repeated, 1), of_batches(*[0, 1, 0] * repeated))
    z_nd = found.z_nrk[..., 0].reshape(repeated, 3, -1).transpose(0, 1).flatten(1)
    # an encoder that was not trained proposes badly: what 100 proposals leave is a bias of about 1 %
    torch.testing.assert_close(z_nd.mean(1), mean_n, atol=0.05, rtol=0)
    torch.testing.assert_close(z_nd.std(1), sd_n, atol=0.05, rtol=0)


def test_changes_of_pairs_equal_those_of_the_definition():
    vae = small_vae(n_latent=2)
    torch.manual_seed(2)
    first, second = torch.randn(2, 40, 1, 2)
    told = of_batches(*[0, 1] * 20)
    found = changes(vae, Population(first, told), Population(second, told), delta=0.2, pseudocount=1e-3, seed=0)
    logits = [vae.decode(z[:, 0], torch.ones(40, 1), told).log_px_rate_ng.double().numpy() for z in (first, second)]
    rho, tau = (np.exp(values) for values in logits)
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-5)
    lfc = np.log2(rho + 1e-3) - np.log2(tau + 1e-3)
    np.testing.assert_allclose(found.p_g, (np.abs(lfc) > 0.2).mean(0), atol=1e-9)
    np.testing.assert_allclose(found.lfc_g, lfc.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sd_g, lfc.std(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.first_g, rho.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.second_g, tau.mean(0), rtol=1e-5)


def test_joined_populations_keep_cells_and_covariates():
    parts = [
        Population(torch.full((n, 2, 1), float(n)), Covariates(torch.tensor([n] * n), (torch.ones(n),))) for n in (1, 2)
    ]
    joined = join_populations(parts)
    assert joined.z_nrk[:, 0, 0].tolist() == joined.covariates.batch_n.tolist() == [1, 2, 2]
    assert joined.covariates.categories[0].shape == (3,)
    assert joined.covariates.continuous_nc is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four donors, half of whose cells are treated: genes 0, 1, 2 rise by FOLD, 3, 4, 5 fall by it, sums stay."""
    folder = tmp_path_factory.mktemp("treated")
    samples = {}
    fractions = np.full(tiny_cohort.N_VARS, 1.0)
    fractions[:3], fractions[3:6] = 0.4, 0.4 * FOLD
    fractions /= fractions.sum()
    for i in range(4):
        r = np.random.default_rng(i)
        treated = r.random(N_CELLS) < 0.5
        change = np.ones((N_CELLS, tiny_cohort.N_VARS))
        change[treated, :3], change[treated, 3:6] = FOLD, 1 / FOLD
        mean = 300 * np.exp(r.normal(0, 0.2, (N_CELLS, 1))) * fractions * change
        x = r.poisson(r.gamma(10.0, mean / 10)).astype(np.uint32)
        obs = {"row": np.arange(N_CELLS), "sex": "f", "age": r.normal(50.0, 9.0, N_CELLS), "total_counts": x.sum(1)}
        obs["arm"] = np.where(treated, "treated", "control")
        samples[f"s{i}"] = sp.csr_matrix(x), pd.DataFrame(obs, index=[f"cell{j}" for j in range(N_CELLS)])
    counts = tiny_cohort.write_samples(folder, samples)
    told = {"categorical_covariates": (), "continuous_covariates": ()}
    steps = {"learning_rate": 0.04, "learning_rate_decay": 0.8, "max_epochs": 40}
    model = dataclasses.replace(tiny_cohort.MODEL, **told, **steps, n_latent=2)
    splits = (tiny_cohort.manifests(folder, split) for split in ("train", "validation"))
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=folder / "checkpoints", threads=1)
    save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
    cells = pd.concat([open_counts(path).obs for path in counts])
    return folder / "model.safetensors", counts, cells


def settings(**changes) -> Differential:
    comparison = Comparison(column="arm", group="treated", reference="control", within=None)
    common = {"comparisons": {"arm": comparison}, "replicate": "sample", "cells": 200, "pairs": 2000}
    return Differential(**common | {"delta": 0.25, "fdr": 0.05} | changes)


COMMON = {"sheet": {}, "seed": 0, "threads": 1, "chunk_cells": 100}


def test_genes_that_change_are_found(trained):
    table = differential(*trained, settings(), **COMMON)
    assert len(table) == tiny_cohort.N_VARS
    changed = {f"gene{j}" for j in range(N_CHANGED)}
    assert set(table["gene"][:N_CHANGED]) == changed
    assert table["p_change"].is_monotonic_decreasing
    top = table.set_index("gene").loc[sorted(changed)]
    assert top["is_changed"].all()
    expected = np.log2(FOLD) * np.array([1, 1, 1, -1, -1, -1])
    np.testing.assert_allclose(top["lfc"], expected, atol=0.4)
    np.testing.assert_allclose(top["pseudobulk_lfc"], expected, atol=0.2)
    assert (top["pseudobulk_fdr"] < 0.01).all()
    assert table["same_batch"].all()
    assert (table["mean_first"].sum(), table["mean_second"].sum()) == pytest.approx((1, 1), rel=1e-4)
    pd.testing.assert_frame_equal(table, differential(*trained, settings(), **COMMON))


def test_within_compares_group_by_group_and_a_group_against_all_others(trained):
    comparisons = {"one": Comparison(column="batch", group="run0", reference=None, within="arm")}
    table = differential(*trained, settings(comparisons=comparisons), **COMMON)
    assert set(table["stratum"]) == {"control", "treated"}
    assert not table["same_batch"].any()
    _, _, cells = trained
    for stratum, rows in table.groupby("stratum"):
        here = cells["arm"] == stratum
        assert (rows["cells_first"] == (here & (cells["batch"] == "run0")).sum()).all()
        assert (rows["cells_second"] == (here & (cells["batch"] != "run0")).sum()).all()


def test_no_comparison_is_an_empty_table_with_all_columns(trained):
    table = differential(*trained, settings(comparisons={}), **COMMON)
    assert len(table) == 0
    assert list(table.columns) == list(differential(*trained, settings(), **COMMON).columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "dose"}, "comparisons.arm: no column 'dose'; expected one of row, sex"),
        ({"within": "dose"}, "comparisons.arm: no column 'dose'"),
        ({"group": "high"}, "no cell has arm 'high'; expected one of 'control', 'treated'"),
        ({"reference": "low"}, "no cell has arm 'low'"),
    ],
)
def test_groups_that_are_not_there_are_refused(trained, change, message):
    comparison = dataclasses.replace(settings().comparisons["arm"], **change)
    with pytest.raises(ValueError, match=message):
        differential(*trained, settings(comparisons={"arm": comparison}), **COMMON)


def test_pseudobulk_equals_a_paired_test_of_sums(trained):
    _, counts, cells = trained
    parts = [open_counts(path).read(0, N_CELLS) for path in counts]
    csr = [(part.data, part.indices.astype(np.int32), part.indptr) for part in parts]
    x = np.concatenate([sp.csr_matrix(one, shape=(N_CELLS, tiny_cohort.N_VARS)).toarray() for one in csr])
    groups = [np.flatnonzero(cells["arm"] == arm) for arm in ("treated", "control")]
    replicates = cells["sample"].astype(str).to_numpy()
    genes = pd.Index([f"gene{j}" for j in range(tiny_cohort.N_VARS)])
    (found,) = pseudobulk(counts, genes, [tuple(groups)], replicates, 70)
    logs = []
    for rows in groups:
        sums = pd.DataFrame(x[rows]).groupby(replicates[rows]).sum()
        totals = cells["total_counts"].iloc[rows].groupby(replicates[rows]).sum()
        logs.append(np.log2(1 + 1e6 * sums.div(totals, axis=0)).to_numpy())
    np.testing.assert_allclose(found["pseudobulk_lfc"], (logs[0] - logs[1]).mean(0), rtol=1e-9)
    np.testing.assert_allclose(found["pseudobulk_p"], ttest_rel(*logs).pvalue, rtol=1e-6)
    assert found["replicates"] == 4


def test_groups_of_one_replicate_are_not_tested(trained):
    _, counts, cells = trained
    groups = tuple(np.flatnonzero(cells["sample"] == sample) for sample in ("s0", "s1"))
    (found,) = pseudobulk(counts, pd.Index(["gene0", "gene1"]), [groups], cells["sample"].astype(str).to_numpy(), 70)
    assert np.isnan(found["pseudobulk_p"]).all()
    assert np.isfinite(found["pseudobulk_lfc"]).all()
