"""inference.gap: a table of bounds that are in order, for a subset that is what it says, and limits that hold."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiny_cohort
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cohort import MODEL, VARIANTS, manifests

from cohortvi.config import Gap, Limit, Limits
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.covariates import SAMPLE
from cohortvi.inference.gap import gap, khat
from cohortvi.inference.gap_summary import ALIKE, excess_gap
from cohortvi.inference.subset import draw_cells, shares
from cohortvi.inference.train import fit
from cohortvi.store.sharded import ShardedCounts

NAMES = ("amortization_gap", "amortization_gap_p99", "encoder_overfit", "unreliable_share", "group_excess")
SETTINGS = Gap(cells=50, steps=60, draws=200, limits=Limits(*[Limit(None, None)] * 5))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A cohort of two samples with a model."""
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    train_on(folder, folder)
    return folder


def train_on(shards: Path, out: Path, **changes: object) -> None:
    splits = manifests(shards, "train"), manifests(shards, "validation")
    model = dataclasses.replace(MODEL, max_epochs=30, learning_rate=5e-3, **changes)
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=out / "checkpoints", threads=1)
    save_model(vae, facts, out / "model.safetensors", out / "model.json")


def run(cohort: Path, settings: Gap = SETTINGS, *, shards: Path | None = None):
    shards = shards or cohort
    splits = {split: manifests(shards, split) for split in ("train", "validation")}
    counts = sorted((shards / "counts").glob("*.json"))
    return gap(cohort / "model.safetensors", splits, counts, settings, sheet={}, seed=3, threads=1)


@pytest.fixture(scope="module")
def found(cohort):
    return run(cohort)


def test_bounds_are_in_order_and_gaps_are_their_differences(found):
    table, facts = found
    for split, cells in table.groupby("split"):
        means = cells[["elbo", "elbo_mean_field", "elbo_full", "log_p"]].mean()
        assert (means.diff().dropna() > -0.02).all(), f"{split}: {means}"
        assert facts["splits"][split]["log_p"]["mean"] == pytest.approx(means["log_p"])
    np.testing.assert_allclose(table["inference_gap"], table["approximation_gap"] + table["amortization_gap"])
    np.testing.assert_allclose(table["amortization_gap"], table["elbo_mean_field"] - table["elbo"])
    assert (table["ess"] > table["ess_encoder"]).mean() > 0.8
    assert (table["log_p"] - table["log_p_encoder"]).abs().median() < 0.2


def test_bounds_rise_with_the_number_of_draws(found):
    bounds = pd.DataFrame(found[1]["bounds"])
    for _, curve in bounds.groupby(["split", "proposal"]):
        assert curve["draws"].tolist() == [1, 10, 100]
        assert (curve["bound"].diff().dropna() > 0).all()


def test_cells_are_those_that_the_counts_have(cohort, found):
    table, _ = found
    assert table["split"].value_counts().to_dict() == {"train": 50, "validation": 50}
    for sample in ("s0", "s1"):
        x, obs = tiny_cohort.simulate(150, seed=int(sample[1]))
        cells = table[table[SAMPLE] == sample].set_index("row")
        assert (cells["cell"] == f"{sample}_" + obs.index[cells.index]).all()
        np.testing.assert_array_equal(cells["n_counts"], np.asarray(x.sum(1)).ravel()[cells.index])
        assert (cells["sex"] == obs["sex"].to_numpy()[cells.index]).all()


def test_the_same_seed_gives_the_same_table(cohort, found):
    pd.testing.assert_frame_equal(run(cohort)[0], found[0], check_exact=True)


def test_groups_and_worst_cells_are_of_the_table(found):
    table, facts = found
    groups = pd.DataFrame(facts["groups"]).set_index(["column", "split", "value"])
    men = table[(table["split"] == "train") & (table["sex"] == "m")]
    assert groups.loc[("sex", "train", "m"), "amortization_gap"] == pytest.approx(men["amortization_gap"].mean())
    assert {"sample", "batch", "sex", "kind"} == set(groups.index.get_level_values("column"))
    assert facts["worst"][0]["amortization_gap"] == table["amortization_gap"].max()
    assert facts["latent"]["active_units"] <= MODEL.n_latent


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_bounds_of_every_variant_are_in_order(cohort, tmp_path, changes):
    train_on(cohort, tmp_path, **changes)
    table, facts = run(tmp_path, dataclasses.replace(SETTINGS, cells=30), shards=cohort)
    if "labels" in changes:
        known = table[(table["split"] == "validation") & table["kind"].isin(["a", "b"])]
        assert facts["labels"]["cells"] == sum(row["cells"] for row in facts["labels"]["labels"]) == len(known)
        assert facts["labels"]["accuracy"] == (known["predicted_label"] == known["kind"]).mean()
        assert facts["labels"]["confidence"] == pytest.approx(known["label_probability"].mean())
    means = table[["elbo", "elbo_mean_field", "elbo_full", "log_p"]].mean()
    assert means["elbo"] < means["elbo_full"] + 0.1
    assert means["elbo_mean_field"] < means["elbo_full"] + 0.02
    assert means["elbo_full"] < means["log_p"] + 0.02
    best = table["elbo_mean_field" if changes.get("posterior", "diagonal") == "diagonal" else "elbo_full"]
    np.testing.assert_allclose(table["amortization_gap"], best - table["elbo"])


def test_a_type_that_was_not_trained_on_has_a_larger_gap(tmp_path):
    x, obs = tiny_cohort.simulate(300, seed=5)
    profile = x.toarray()[:, :3].sum(1) > np.median(x.toarray()[:, :3].sum(1))
    swapped = x.toarray().copy()
    swapped[profile] = swapped[profile][:, ::-1]  # cells with the genes' places exchanged: a type of its own
    for name, cells in (("seen", ~profile), ("all", np.ones(300, bool))):
        part = (
            sp.csr_matrix(swapped[cells]),
            obs[cells].assign(row=np.arange(cells.sum()), type=profile[cells].astype(str)),
        )
        tiny_cohort.write_samples(tmp_path / name, {"s0": part})
    train_on(tmp_path / "seen", tmp_path, categorical_covariates=(), continuous_covariates=())
    table, facts = run(tmp_path, dataclasses.replace(SETTINGS, cells=200), shards=tmp_path / "all")
    by_type = table.groupby("type")["amortization_gap"].mean()
    assert by_type["True"] > 2 * by_type["False"]
    assert {row["value"] for row in facts["groups"] if row["column"] == "type"} == {"True", "False"}


def test_beyond_a_limit_the_rule_warns_or_fails(cohort):
    limits = dataclasses.replace(SETTINGS.limits, amortization_gap=Limit(-1.0, None))
    judged = {
        limit["name"]: limit["verdict"]
        for limit in run(cohort, dataclasses.replace(SETTINGS, limits=limits))[1]["limits"]
    }
    assert judged == dict.fromkeys(NAMES, "ok") | {"amortization_gap": "warn"}
    limits = dataclasses.replace(limits, amortization_gap_p99=Limit(None, -1.0))
    with pytest.raises(ValueError, match=r"amortization_gap_p99 is .* at most -1.0 wanted"):
        run(cohort, dataclasses.replace(SETTINGS, limits=limits))


def test_shards_of_other_genes_are_refused(cohort, tmp_path):
    x, obs = tiny_cohort.simulate(60, seed=1)
    tiny_cohort.write_samples(tmp_path, {"s0": (x[:, :20], obs)})
    with pytest.raises(ValueError, match=r"it lacks 10 of the 30 genes of the model \(gene20, gene21"):
        run(cohort, shards=tmp_path)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), st.integers(1, 300))
def test_samples_give_their_share(sizes, n):
    sizes = np.array(sizes)
    taken = shares(sizes, n)
    assert taken.sum() == min(n, sizes.sum())
    assert (taken <= sizes).all()
    if n >= (sizes > 0).sum():
        assert (taken[sizes > 0] > 0).all()
    if n < sizes.sum() and n >= 10 * len(sizes):
        assert np.abs(taken - n * sizes / sizes.sum()).max() <= len(sizes)


def test_the_draw_is_spread_over_samples_and_stores(cohort):
    store = ShardedCounts(manifests(cohort, "train"))
    rows = draw_cells(store, 40, seed=1)
    codes = np.concatenate([store.column(at, SAMPLE, 0, store.sizes[at])[found] for at, found in enumerate(rows)])
    assert sum(map(len, rows)) == 40
    assert abs(np.bincount(codes)[0] - 20) <= 1
    assert all((np.diff(found) > 0).all() for found in rows)
    other = draw_cells(store, 40, seed=2)
    assert not np.array_equal(np.concatenate(rows), np.concatenate(other))
    assert [len(found) for found in draw_cells(store, 10**6, seed=1)] == store.sizes


@pytest.mark.parametrize("shape", [0.3, 0.7])
def test_khat_is_the_shape_of_pareto_weights(shape):
    u_sn = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert khat(-shape * u_sn.log()).numpy() == pytest.approx(shape, abs=0.12)


def test_a_group_stands_out_by_its_gap_at_equal_depth_and_depth_alone_does_not():
    r = np.random.default_rng(0)
    deep, n = np.repeat([False, True], 1000), 2000
    n_counts = np.where(deep, 4000, 400) * r.lognormal(0, 0.3, n)
    table = pd.DataFrame({"split": np.tile(["train", "validation"], n // 2), "n_counts": n_counts})
    table["amortization_gap"] = 2 + n_counts / 1000 + r.normal(0, 0.5, n)
    is_odd = (table["split"] == "validation") & ~deep & (r.random(n) < 0.1)
    table["amortization_gap"] += np.where(is_odd, 2.0, 0.0)  # less than depth makes
    excess = excess_gap(table)
    assert table["amortization_gap"][deep].mean() > table["amortization_gap"][is_odd].mean() + 1
    assert excess[is_odd].mean() == pytest.approx(2, abs=0.3)
    assert np.abs([excess[deep].mean(), excess[~deep & ~is_odd].mean()]).max() < 0.1


def test_the_excess_of_a_cell_is_over_the_mean_of_training_cells_of_about_as_many_counts():
    r = np.random.default_rng(1)
    table = pd.DataFrame({"split": r.choice(["train", "validation"], 300), "n_counts": r.integers(1, 10_000, 300)})
    table["amortization_gap"] = r.gamma(2, 1, 300)
    training = table[table["split"] == "train"].sort_values("n_counts", kind="stable", ignore_index=True)
    found = table["amortization_gap"] - excess_gap(table)
    for at, expected in found.items():
        below = (training["n_counts"] < table["n_counts"][at]).sum()
        first = np.clip(below - ALIKE // 2, 0, len(training) - ALIKE)
        near = training.iloc[first : first + ALIKE]
        assert near["amortization_gap"].mean() == pytest.approx(expected)
