"""Models with labels: joint density, prediction, calibration, and training with the labels of half a cohort."""

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve
from tiny_cohort import MODEL, manifests, simulate, write_samples

from cohortvi.atlas.embed import embed, predicted_labels
from cohortvi.config import Embed, Labels, Reference
from cohortvi.files import write_json
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.labels import calibration, label_probabilities
from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import elbo
from cohortvi.inference.train import fit
from cohortvi.inference.vae import VAE

LABELS = Labels("kind", ("NA",), 20.0)
SETTINGS = {"n_latent": 1, "n_hidden": 8, "n_layers": 1, "dropout": 0.0, "likelihood": "nb", "encode_covariates": False}


def small(dispersion: str = "gene") -> VAE:
    torch.manual_seed(0)
    vae = VAE(6, 1, **SETTINGS, dispersion=dispersion, prior="mixture", n_labels=3).double().eval()
    with torch.no_grad():
        vae.prior.log_scale_ck.normal_()
        vae.prior.logits_c.normal_()
    return vae


def test_labels_follow_from_the_joint_density_by_bayes_rule():
    vae, z_nk = small(), torch.randn(7, 1, dtype=torch.float64)
    shares = vae.prior.logits_c.softmax(0).detach().numpy()
    loc, scale = vae.prior.loc_ck.detach().numpy()[:, 0], vae.prior.log_scale_ck.exp().detach().numpy()[:, 0]
    joint_nl = shares * stats.norm(loc, scale).pdf(z_nk.numpy())
    np.testing.assert_allclose(vae.log_prior(z_nk).exp().detach(), joint_nl.sum(1))
    np.testing.assert_allclose(vae.log_label(z_nk).exp().detach(), joint_nl / joint_nl.sum(1, keepdims=True))
    label_n = torch.tensor([0, 1, 2, -1, 0, -1, 2])
    known = label_n >= 0
    expected_n = np.where(known, joint_nl[np.arange(7), label_n.clamp(min=0)], joint_nl.sum(1))
    np.testing.assert_allclose(vae.log_prior(z_nk, label_n).exp().detach(), expected_n)
    expected_n = np.where(known, -np.log(joint_nl[np.arange(7), label_n.clamp(min=0)] / joint_nl.sum(1)), 0)
    np.testing.assert_allclose(vae.label_loss(z_nk, label_n).detach(), expected_n)


def test_the_bound_of_a_labelled_cell_is_below_that_of_its_counts_alone_by_the_labels_log_probability():
    vae, noise_nk = small(), torch.randn(4, 1, dtype=torch.float64)
    x_ng, batch_n = torch.randint(0, 5, (4, 6)).double(), torch.zeros(4, dtype=torch.int64)
    label_n = torch.tensor([0, 1, 2, -1])
    plain = elbo(vae, x_ng, Covariates(batch_n), noise_nk, kl_weight=1.0)
    told = elbo(vae, x_ng, Covariates(batch_n, label_n=label_n), noise_nk, kl_weight=1.0, label_weight=0.0)
    z_nk = vae.encode(x_ng, Covariates(batch_n)).sample(noise_nk)
    log_p_n = torch.cat([vae.log_label(z_nk)[torch.arange(3), label_n[:3]], torch.zeros(1)])
    torch.testing.assert_close(told.elbo_n - plain.elbo_n, log_p_n)
    weighted = elbo(vae, x_ng, Covariates(batch_n, label_n=label_n), noise_nk, kl_weight=1.0, label_weight=5.0)
    torch.testing.assert_close(weighted.loss_n - told.loss_n, -5.0 * log_p_n)


def test_the_dispersion_of_a_cell_is_that_of_its_labels_by_their_probability():
    vae, covariates = small("gene-label"), Covariates(torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        vae.prior.loc_ck.copy_(torch.tensor([[-1.0], [1.0], [50.0]]))
        vae.prior.log_scale_ck.zero_()
        vae.prior.logits_c.zero_()
    z_nk = torch.tensor([[0.0], [50.0]], dtype=torch.float64)  # in the middle of two labels, and at the third
    found = vae.decode(z_nk, torch.ones(2, 1).double(), covariates).log_theta
    torch.testing.assert_close(found[0], vae.log_theta[:2].mean(0))
    torch.testing.assert_close(found[1], vae.log_theta[2])


def test_probabilities_are_those_of_the_posterior_by_quadrature():
    vae = small()
    x_ng, batch_n = torch.randint(0, 5, (4, 6)).double(), torch.zeros(4, dtype=torch.int64)
    qz = vae.encode(x_ng, Covariates(batch_n))
    line = torch.linspace(-15, 15, 4001, dtype=torch.float64)
    density_sn = qz.log_prob(line[:, None, None].expand(-1, 4, 1)).exp() * float(line[1] - line[0])
    expected_nl = (density_sn[..., None] * vae.log_label(line[:, None, None].expand(-1, 4, 1)).exp()).sum(0)
    found_nl = label_probabilities(vae, qz)
    np.testing.assert_allclose(found_nl.sum(1), 1)
    np.testing.assert_allclose(found_nl, expected_nl.detach(), atol=0.15)  # 32 draws


def test_calibration_is_that_of_scikit_learn():
    r = np.random.default_rng(0)
    confidence_n = r.uniform(0.3, 1, 5000)
    is_right_n = r.random(5000) < confidence_n**2
    found = calibration(confidence_n, is_right_n)
    accuracy, confidence = calibration_curve(is_right_n, confidence_n, n_bins=15)
    np.testing.assert_allclose([row["accuracy"] for row in found.bins], accuracy)
    np.testing.assert_allclose([row["confidence"] for row in found.bins], confidence)
    assert sum(row["cells"] for row in found.bins) == 5000
    assert found.error == pytest.approx(np.mean(confidence_n - confidence_n**2), abs=0.02)
    assert calibration(confidence_n, r.random(5000) < confidence_n).error < 0.03


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two samples of three kinds of cells; those of the second are not known."""
    folder, samples = tmp_path_factory.mktemp("labelled"), {}
    for i in range(2):
        x, obs = simulate(200, seed=i)
        samples[f"s{i}"] = x, obs if i == 0 else obs.assign(kind="NA")
    write_samples(folder, samples)
    return folder


def test_labels_of_a_sample_without_any_are_found(cohort, tmp_path):
    model = dataclasses.replace(MODEL, labels=LABELS, prior="mixture", max_epochs=40)
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=tmp_path / "ck", threads=1)
    assert facts["labels"] == ["a", "b", "c"]
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    counts, out = [cohort / "counts" / f"s{i}.json" for i in range(2)], tmp_path / "latent.zarr"
    options = {"sheet": {}, "seed": 0, "chunk_cells": 64, "threads": 1}
    manifest = embed(tmp_path / "model.safetensors", counts, out, Embed(None, 100, 0), **options)
    write_json(manifest, tmp_path / "latent.json")
    latent, found = ad.io.read_zarr(out), predicted_labels(tmp_path / "latent.json")
    np.testing.assert_allclose(latent.obsm["X_label"].sum(1), 1, rtol=1e-5)
    assert list(latent.uns["labels"]) == ["a", "b", "c"]
    assert found.index.equals(latent.obs_names)
    np.testing.assert_array_equal(found["label_probability"], latent.obsm["X_label"].max(1))
    truth = np.concatenate([simulate(200, seed=i)[1]["kind"] for i in range(2)])
    is_right = found["predicted_label"].astype(str).to_numpy() == truth
    assert is_right[:200].mean() > 0.9
    assert is_right[200:].mean() > 0.9


def test_cells_mapped_onto_a_labelled_model_get_its_labels(tmp_path):
    """A cohort without any label, with a new batch."""
    known, new = {"s0": simulate(200, seed=0)}, {}
    for i in range(2):
        x, obs = simulate(200, seed=i)
        new[f"s{i}"] = x, obs.assign(kind="NA")
    write_samples(tmp_path / "known", known)
    counts = write_samples(tmp_path / "new", new)
    model = dataclasses.replace(MODEL, labels=LABELS, prior="mixture", max_epochs=40)
    splits = (manifests(tmp_path / "known", split) for split in ("train", "validation"))
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=tmp_path / "ck", threads=1)
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    mapped = dataclasses.replace(model, reference=Reference(str(tmp_path), surgery=True))
    splits = (manifests(tmp_path / "new", split) for split in ("train", "validation"))
    vae, _, facts = fit(*splits, mapped, sheet={}, seed=0, checkpoints=tmp_path / "ck2", threads=1)
    assert (facts["labels"], facts["batches"]) == (["a", "b", "c"], ["run0", "run1"])
    save_model(vae, facts, tmp_path / "mapped.safetensors", tmp_path / "mapped.json")
    options = {"sheet": {}, "seed": 0, "chunk_cells": 64, "threads": 1}
    embed(tmp_path / "mapped.safetensors", counts, tmp_path / "latent.zarr", Embed(None, 100, 0), **options)
    found = predicted_labels(tmp_path / "latent.json")["predicted_label"].astype(str).to_numpy()
    assert (found == np.concatenate([simulate(200, seed=i)[1]["kind"] for i in range(2)])).mean() > 0.9


def test_labels_of_validation_cells_are_not_looked_at(cohort, tmp_path):
    """Other labels of the validation cells give the same model."""
    r, found = np.random.default_rng(0), []
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    held_out = pd.concat([pd.DataFrame(ad.io.read_zarr(path.with_suffix(".zarr")).obs) for path in splits[1]])
    samples = {}
    for i in range(2):
        x, obs = simulate(200, seed=i)
        kind = obs["kind"].to_numpy(object) if i == 0 else np.full(200, "NA", object)
        rows = held_out.loc[held_out["sample"] == f"s{i}", "row"].to_numpy()
        kind[rows] = r.permutation(kind[rows])
        samples[f"s{i}"] = x, obs.assign(kind=kind)
    write_samples(tmp_path, samples)
    for folder in (cohort, tmp_path):
        model = dataclasses.replace(MODEL, labels=LABELS, prior="mixture", max_epochs=3)
        splits = manifests(folder, "train"), manifests(folder, "validation")
        ck = tmp_path / f"ck{len(found)}"
        found.append(fit(*splits, model, sheet={}, seed=0, checkpoints=ck, threads=1)[0].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Labels("kind", ("NA", "a", "b"), 1.0), "labels: the training cells have 'c' in 'kind' but for unknown ones"),
        (Labels("age", ("NA",), 1.0), r"labels\.column: 'age' is no such column"),
    ],
)
def test_fewer_than_two_labels_are_refused(cohort, tmp_path, labels, words):
    model = dataclasses.replace(MODEL, labels=labels, prior="mixture")
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    with pytest.raises(ValueError, match=words):
        fit(*splits, model, sheet={}, seed=0, checkpoints=tmp_path / "ck", threads=1)


def test_labels_need_a_mixture_and_a_dispersion_by_label_needs_labels():
    with pytest.raises(ValueError, match=r"prior: found 'standard_normal' and 3 labels; expected 'mixture'"):
        VAE(6, 1, **SETTINGS, dispersion="gene", n_labels=3)
    with pytest.raises(ValueError, match=r"dispersion: found 'gene-label' and no labels"):
        VAE(6, 1, **SETTINGS, dispersion="gene-label")
