"""latent.zarr holds the posterior of every cell, in the order of the counts stores."""

import dataclasses
import json
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import tiny_cohort
import torch
from tiny_cohort import MODEL, VARIANTS, manifests

from cohortvi.atlas import cell_store
from cohortvi.atlas.embed import embed, open_latent
from cohortvi.config import Embed
from cohortvi.files import write_json
from cohortvi.inference.bounds import log_weights
from cohortvi.inference.checkpoint import load_model, save_model
from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.reading import Source
from cohortvi.inference.refinement import refined
from cohortvi.inference.sparse import take_rows
from cohortvi.inference.train import fit

SHEET = {"site": {"s0": "north", "s1": "south"}, "dose": {"s0": "0.5", "s1": "2"}}
TOLD = {"encode_covariates": True, "categorical_covariates": ("site", "sex"), "continuous_covariates": ("dose", "age")}
PLAIN = Embed(refine_above=None, steps=100, samples=0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Counts, shards and four models: `plain`, `told` of the covariates, `full` with a full covariance, a `flow`."""
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    splits = manifests(folder, "train"), manifests(folder, "validation")
    kinds = {"plain": {}, "told": TOLD, **{name: {"posterior": name, "max_epochs": 20} for name in ("full", "flow")}}
    for name, changes in kinds.items():
        model = dataclasses.replace(MODEL, **{"max_epochs": 2} | changes)
        vae, _, facts = fit(*splits, model, sheet=SHEET, seed=0, checkpoints=folder / f"{name}-ck", threads=1)
        save_model(vae, facts, folder / f"{name}.safetensors", folder / f"{name}.json")
    return folder


def counts_of(cohort: Path) -> list[Path]:
    return [cohort / "counts" / "s0.json", cohort / "counts" / "s1.json"]


def run(cohort: Path, out: Path, name: str = "plain", counts=None, settings: Embed = PLAIN, **changes) -> dict:
    options = {"sheet": SHEET, "seed": 0, "chunk_cells": 64, "threads": 1} | changes
    return embed(cohort / f"{name}.safetensors", counts or counts_of(cohort), out, settings, **options)


def test_the_store_is_an_anndata_with_every_cell_in_order(cohort, tmp_path):
    manifest = run(cohort, tmp_path / "latent.zarr")
    latent = ad.io.read_zarr(tmp_path / "latent.zarr")
    assert latent.obs_names.tolist() == [f"s{i}_cell{j}" for i in range(2) for j in range(150)]
    assert latent.obs["sample"].tolist() == ["s0"] * 150 + ["s1"] * 150
    assert latent.obs.columns.tolist() == ["sample"]
    assert latent.shape == (300, 0)
    assert {key: (value.shape, value.dtype) for key, value in latent.obsm.items()} == {
        "X_latent": ((300, 3), np.dtype("float32")),
        "X_latent_std": ((300, 3), np.dtype("float32")),
    }
    assert manifest["samples"] == {"s0": 150, "s1": 150}
    assert (manifest["n_obs"], manifest["n_latent"]) == (300, 3)


@pytest.mark.parametrize("name", ["plain", "told"])
def test_values_are_those_of_the_encoder_with_each_cells_covariates(cohort, tmp_path, name):
    run(cohort, tmp_path / "latent.zarr", name)
    vae, facts = load_model(cohort / f"{name}.safetensors")
    latent = ad.io.read_zarr(tmp_path / "latent.zarr")

    def scaled(key: str, values: np.ndarray) -> np.ndarray:
        mean, std = facts["continuous"].get(key, (0, 1))
        return (values - mean) / std

    for i in range(2):
        x, obs = tiny_cohort.simulate(150, seed=i)
        sex, site = torch.from_numpy((obs["sex"] == "m").to_numpy(np.int64)), torch.full((150,), i)
        continuous = [scaled("age", obs["age"].to_numpy()), scaled("dose", np.full(150, [0.5, 2.0][i]))]
        continuous_nc = torch.from_numpy(np.stack(continuous, axis=1)).float()
        with torch.inference_mode():
            qz = vae.encode(torch.from_numpy(x.toarray()).float(), Covariates(site, (sex, site), continuous_nc))
        here = latent[latent.obs["sample"] == f"s{i}"]
        np.testing.assert_allclose(here.obsm["X_latent"], qz.loc_nk, atol=1e-5)
        np.testing.assert_allclose(here.obsm["X_latent_std"], qz.scale_nk, atol=1e-5)


def test_refined_cells_have_the_larger_elbo_and_others_stay(cohort, tmp_path):
    plain = run(cohort, tmp_path / "plain.zarr")
    assert plain["refined"] == {"cells": 0, "elbo_gain": 0.0, "shift": 0.0}
    whole = run(cohort, tmp_path / "whole.zarr", settings=Embed(0.0, 100, 0))
    assert whole["refined"]["cells"] > 270  # all but those that gain nothing
    assert whole["refined"]["elbo_gain"] > 0.05
    some = run(cohort, tmp_path / "some.zarr", settings=Embed(0.5, 100, 0))
    assert 0 < some["refined"]["cells"] < 300
    assert some["refined"]["elbo_gain"] > whole["refined"]["elbo_gain"]
    means = [ad.io.read_zarr(tmp_path / f"{name}.zarr").obsm["X_latent"] for name in ("plain", "whole", "some")]
    moved = (means[0] != means[2]).any(1)
    assert moved.sum() == some["refined"]["cells"]
    apart, moves = (np.square(means[2][moved] - means[at][moved]).mean() for at in (1, 0))
    assert apart < 0.1 * moves  # fits by other random numbers: nearer to one another than to the start
    assert whole["content"] != plain["content"]


@pytest.mark.parametrize("name", ["plain", "full", "flow"])
def test_refined_cells_have_a_larger_elbo_than_by_the_encoders_own_posterior(cohort, name):
    source = Source(cohort / f"{name}.safetensors", counts_of(cohort)[:1], sheet=SHEET, threads=1)
    (chunk,) = source.chunks(next(source.stores()), 1000)
    qz = source.vae.encode(chunk.x, chunk.covariates)
    start = DiagonalGaussian(*qz.moments(torch.randn(128, 1, 3)))
    torch.manual_seed(0)
    rows_m, own, gain_m, _ = refined(source.vae, chunk.x, chunk.covariates, qz, start, above=0.3, steps=100)
    assert len(rows_m) > 20
    # judged by other draws than those by which cells were chosen
    log_joint, noise_snk = source.vae.log_joint(chunk.x, chunk.covariates), torch.randn(400, len(start.loc_nk), 3)
    with torch.inference_mode():
        before_m = log_weights(log_joint, qz, noise_snk).mean(0)[rows_m]
        own_log_joint = source.vae.log_joint(take_rows(chunk.x, rows_m), chunk.covariates.take(rows_m))
        after_m = log_weights(own_log_joint, own, noise_snk[:, rows_m]).mean(0)
    assert float((after_m > before_m - 0.2).float().mean()) > 0.95
    assert float((after_m - before_m).mean()) == pytest.approx(float(gain_m.mean()), rel=0.3)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_embeds_cells_in_chunks_of_any_size(cohort, tmp_path, changes):
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    model = dataclasses.replace(MODEL, max_epochs=2, **changes)
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=tmp_path / "ck", threads=1)
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    found = []
    for chunk_cells in (64, 300):
        out = tmp_path / f"{chunk_cells}.zarr"
        few = dataclasses.replace(PLAIN, samples=5)
        common = {"sheet": {}, "seed": 0, "chunk_cells": chunk_cells, "threads": 1}
        embed(tmp_path / "model.safetensors", counts_of(cohort), out, few, **common)
        found.append(ad.io.read_zarr(out).obsm)
    for name, shape in (("X_latent", (3,)), ("X_latent_std", (3,)), ("X_latent_samples", (5, 3))):
        assert found[0][name].shape == (300, *shape)
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-4)
    assert (found[0]["X_latent_std"] > 0).all()


def test_samples_are_of_the_posterior_that_mean_and_std_tell_of(cohort, tmp_path):
    """Of the encoder's, of those that were refined, and of a full covariance beside either."""
    draws = 400
    for name, above in (("plain", None), ("plain", 0.5), ("full", None), ("full", 0.5)):
        run(cohort, tmp_path / "latent.zarr", name, settings=Embed(above, 50, draws))
        obsm = ad.io.read_zarr(tmp_path / "latent.zarr").obsm
        away = (obsm["X_latent_samples"] - obsm["X_latent"][:, None]) / obsm["X_latent_std"][:, None]
        # 900 means and variances of 400 draws: none is five standard errors off, and together they are as they should
        assert np.abs(away.mean(1)).max() < 5 / draws**0.5
        assert np.abs(away.var(1) - 1).max() < 6 * (2 / draws) ** 0.5
        assert away.var() == pytest.approx(1, abs=0.02)


def test_samples_do_not_depend_on_other_cells_or_samples(cohort, tmp_path):
    settings = Embed(None, 10, 3)
    whole, one = (ad.io.read_zarr(path).obsm["X_latent_samples"] for path in _written(cohort, tmp_path, settings))
    np.testing.assert_allclose(whole[150:], one, atol=1e-4)
    run(cohort, tmp_path / "other.zarr", settings=settings, seed=1)
    assert np.abs(ad.io.read_zarr(tmp_path / "other.zarr").obsm["X_latent_samples"] - whole).min(2).max() > 0.1


def test_cells_that_are_refined_stay_where_they_are_when_samples_are_added(cohort, tmp_path):
    whole, one = (ad.io.read_zarr(path) for path in _written(cohort, tmp_path, Embed(0.0, 10, 2)))
    assert (whole.obs_names[150:] == one.obs_names).all()
    for name in ("X_latent", "X_latent_std", "X_latent_samples"):
        np.testing.assert_allclose(whole.obsm[name][150:], one.obsm[name], atol=1e-4)


def _written(cohort, tmp_path, settings):
    for name, counts in (("whole", counts_of(cohort)), ("one", counts_of(cohort)[1:])):
        run(cohort, tmp_path / f"{name}.zarr", counts=counts, settings=settings)
        yield tmp_path / f"{name}.zarr"


def test_chunks_and_shards_do_not_change_what_is_written(cohort, tmp_path, monkeypatch):
    whole = run(cohort, tmp_path / "whole.zarr", chunk_cells=1000)
    monkeypatch.setattr(cell_store, "SHARD_CHUNKS", 4)
    monkeypatch.setattr(cell_store, "CHUNK_CELLS", 16)
    for size in (7, 64, 150):
        parts = run(cohort, tmp_path / "parts.zarr", chunk_cells=size)
        assert parts["samples"] == whole["samples"]
        found = [ad.io.read_zarr(tmp_path / f"{name}.zarr") for name in ("whole", "parts")]
        assert found[0].obs.equals(found[1].obs)
        # a matrix product over other rows may round otherwise
        np.testing.assert_allclose(found[0].obsm["X_latent"], found[1].obsm["X_latent"], atol=1e-5)


def test_equal_runs_give_equal_digests_and_other_cells_another(cohort, tmp_path):
    first, again = (run(cohort, tmp_path / f"{i}.zarr") for i in range(2))
    assert first == again
    assert run(cohort, tmp_path / "one.zarr", counts=counts_of(cohort)[:1])["content"] != first["content"]


def test_open_latent_reads_what_was_written_and_refuses_another_manifest(cohort, tmp_path):
    manifest = run(cohort, tmp_path / "latent.zarr")
    write_json(manifest, tmp_path / "latent.json")
    latent = open_latent(tmp_path / "latent.json")
    expected = ad.io.read_zarr(tmp_path / "latent.zarr")
    assert latent.names.equals(expected.obs_names)
    np.testing.assert_array_equal(latent.mean_nk, expected.obsm["X_latent"])
    np.testing.assert_array_equal(latent.std_nk, expected.obsm["X_latent_std"])
    write_json(manifest | {"content": "0"}, tmp_path / "latent.json")
    with pytest.raises(ValueError, match="not the store of its manifest"):
        open_latent(tmp_path / "latent.json")


def test_a_sample_without_cells_is_counted_and_takes_no_room(cohort, tmp_path):
    x, obs = tiny_cohort.simulate(5, seed=3)
    empty = tiny_cohort.write_samples(tmp_path / "more", {"s2": (x[:0], obs[:0])}, shards=False)
    manifest = run(cohort, tmp_path / "latent.zarr", "told", counts=[*counts_of(cohort), *empty])
    assert manifest["samples"] == {"s0": 150, "s1": 150, "s2": 0}
    assert ad.io.read_zarr(tmp_path / "latent.zarr").n_obs == 300


def with_genes(cohort: Path, folder: Path, genes: list[str]) -> Path:
    """Return the plain model as if trained on genes of these names."""
    facts = json.loads((cohort / "plain.json").read_text())
    write_json(facts | {"genes": genes}, folder / "model.json")
    (folder / "model.safetensors").write_bytes((cohort / "plain.safetensors").read_bytes())
    return folder / "model.safetensors"


def test_genes_are_found_by_their_names(cohort, tmp_path):
    model = with_genes(cohort, tmp_path, [f"gene{i}" for i in reversed(range(tiny_cohort.N_VARS))])
    embed(model, counts_of(cohort), tmp_path / "latent.zarr", PLAIN, sheet={}, seed=0, chunk_cells=200, threads=1)
    x, _ = tiny_cohort.simulate(150, seed=0)
    x_ng = torch.from_numpy(x.toarray()[:, ::-1].astype(np.float32))
    with torch.inference_mode():
        expected = load_model(model)[0].encode(x_ng, Covariates(torch.zeros(150, dtype=torch.int64))).loc_nk
    np.testing.assert_allclose(ad.io.read_zarr(tmp_path / "latent.zarr").obsm["X_latent"][:150], expected, atol=1e-5)


def test_stores_with_none_of_the_models_genes_are_refused(cohort, tmp_path):
    model = with_genes(cohort, tmp_path, [f"ENSG{i}" for i in range(tiny_cohort.N_VARS)])
    with pytest.raises(ValueError, match="it has none of the 30 genes of the model"):
        embed(model, counts_of(cohort), tmp_path / "o.zarr", PLAIN, sheet={}, seed=0, chunk_cells=9, threads=1)
    assert not (tmp_path / "o.zarr").exists()


def test_a_new_batch_is_refused_only_by_models_that_encode_it(cohort, tmp_path):
    x, obs = tiny_cohort.simulate(5, seed=3)
    new = tiny_cohort.write_samples(tmp_path / "more", {"a": (x, obs), "b": (x, obs), "s0": (x, obs)}, shards=False)
    with pytest.raises(ValueError, match=re.escape("batch 'run2' is not among the model's run0, run1")):
        run(cohort, tmp_path / "latent.zarr", "told", counts=new[2:])
    assert run(cohort, tmp_path / "latent.zarr", "plain", counts=new[2:])["n_obs"] == 5
    with pytest.raises(ValueError, match=re.escape("sheet: site of sample 'a' is None; expected one of north, south")):
        run(cohort, tmp_path / "latent.zarr", "told", counts=new[:1])
