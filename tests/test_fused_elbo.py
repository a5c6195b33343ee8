"""The ELBO whose gradients are written by hand equals that of the modules, differentiated by torch in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fused import GRADIENT, LOSS, draw_counts, model, sparse
from test_train import TIMES, run
from tiny_cohort import MODEL, manifests, write_cohort
from torch import Tensor

from cohortvi.inference import prepare as preparing
from cohortvi.inference import ranks
from cohortvi.inference.fused_elbo import FusedElbo, is_plain
from cohortvi.inference.hidden import hidden, hidden_backward
from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import Elbo, elbo
from cohortvi.inference.vae import VAE

N_GENES, N_LATENT, KL_WEIGHT = 200, 4, 0.7


def given(n_obs: int, n_categories: tuple[int, ...] = (), n_values: int = 0) -> tuple[np.ndarray, Covariates, Tensor]:
    """Counts with an empty cell and a huge count, covariates and noise."""
    generator = torch.Generator().manual_seed(n_obs)
    categories = tuple(torch.randint(n, (n_obs,), generator=generator) for n in n_categories)
    values_nv = torch.randn(n_obs, n_values, generator=generator) if n_values else None
    covariates = Covariates(torch.randint(3, (n_obs,), generator=generator), categories, values_nv)
    return draw_counts(n_obs, N_GENES, 1, largest=300), covariates, torch.randn(n_obs, N_LATENT, generator=generator)


def by_modules(vae: VAE, x_ng: np.ndarray, covariates: Covariates, noise_nk: Tensor, seed: int) -> Elbo:
    """The reference: in float64, dense, differentiated by torch."""
    torch.manual_seed(seed)
    values_nv = covariates.continuous_nc
    covariates = covariates._replace(continuous_nc=None if values_nv is None else values_nv.double())
    found = elbo(vae, torch.from_numpy(x_ng).double(), covariates, noise_nk.double(), kl_weight=KL_WEIGHT)
    found.loss.backward()
    return found


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize(
    ("dispersion", "n_obs", "changes"),
    [
        ("gene", 64, {}),
        ("gene", 2, {"dropout": 0.2, "encode_covariates": True}),
        ("gene-batch", 64, {"dropout": 0.2}),
        ("gene-batch", 300, {"n_layers": 3, "dropout": 0.5, "encode_covariates": True, "n_categories": (3, 1, 2)}),
        ("gene", 64, {"n_layers": 2, "encode_covariates": True, "n_categories": (2,), "n_continuous": 2}),
    ],
    ids=["default", "two cells", "gene-batch", "deep", "continuous"],
)
def test_terms_gradients_and_statistics_equal_those_of_the_modules(likelihood, dispersion, n_obs, changes):
    torch.manual_seed(1)
    vae = model(likelihood, dispersion, N_GENES, **changes)
    reference = copy.deepcopy(vae).double()
    x_ng, covariates, noise_nk = given(n_obs, vae.settings["n_categories"], vae.settings["n_continuous"])
    fused = FusedElbo(vae)
    for seed in range(3):  # gradients are those of the last call, statistics of all
        reference.zero_grad()
        expected = by_modules(reference, x_ng, covariates, noise_nk, seed)
        torch.manual_seed(seed)
        found = fused(sparse(x_ng), covariates, noise_nk, kl_weight=KL_WEIGHT)
    rounding = LOSS + 1e-7 * x_ng.sum(1).max()
    for name, values in found._asdict().items():
        np.testing.assert_allclose(values, getattr(expected, name).detach(), rtol=10 * LOSS, atol=10 * rounding)
    for name, values in reference.named_buffers():
        np.testing.assert_allclose(vae.get_buffer(name), values, rtol=1e-5, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    whole = float(torch.cat([value.flatten() for value in gradients.values()]).norm())
    for name, value in gradients.items():
        error = float((vae.get_parameter(name).grad.double() - value).norm())
        # What batch norm takes out again, a bias before it, has no gradient but rounding.
        assert error <= max(GRADIENT * float(value.norm()), 1e-6 * whole, rounding / n_obs), f"{name}: {error}"


def test_a_single_cell_is_refused():
    x_ng, covariates, noise_nk = given(1)
    with pytest.raises(ValueError, match="1 cell; expected 2 or more"):
        FusedElbo(model("nb", "gene", N_GENES))(sparse(x_ng), covariates, noise_nk, kl_weight=1.0)


def test_a_code_that_the_model_has_not_is_refused():
    x_ng, covariates, noise_nk = given(8)
    for code in (-1, 3):
        covariates.batch_n[5] = code
        with pytest.raises(IndexError, match="code of a batch or category"):
            FusedElbo(model("nb", "gene", N_GENES))(sparse(x_ng), covariates, noise_nk, kl_weight=1.0)


def test_batch_norm_of_many_cells_keeps_its_digits():
    r, n_obs = np.random.default_rng(0), 50_000
    units_nh, upstream_nh = (r.normal(at, 1, (n_obs, 3)).astype(np.float32) for at in (100, 1))
    exact, d = units_nh.astype(float), upstream_nh.astype(float)
    h, out, du = units_nh.copy(), np.empty_like(units_nh), np.empty_like(units_nh)
    ones, zeros, inverse, dgain, dshift = (np.full(3, value, np.float32) for value in (1, 0, 0, 0, 0))
    nothing, mean, variance, count = np.empty((0, 3), np.float32), zeros.copy(), zeros.copy(), np.zeros((), int)
    rows, bits = np.empty((0, n_obs), int), np.empty((0, 3), np.int16)
    norm, dropout = (ones, 100 * ones, mean, variance, count), (bits, 0, 1.0)  # no unit is cut off
    hidden(h, (rows, nothing), norm, (1.0, 0.0), dropout, (out, inverse))
    normal = (exact - exact.mean(0)) / exact.std(0)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=2e-7)
    np.testing.assert_allclose(variance, exact.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(h.mean(0, dtype=float), 0, atol=2e-6)
    hidden_backward(upstream_nh, (out, h, inverse, ones), 1.0, rows, (du, dgain, dshift, nothing))
    np.testing.assert_allclose(dshift, d.sum(0), rtol=2e-7)
    np.testing.assert_allclose(dgain, (d * normal).sum(0), atol=1e-6 * np.abs(d * normal).sum(0).max())


@pytest.mark.parametrize("where", ["encoder.hidden.layers.0.linear.bias", "encoder.log_variance.weight", "log_theta"])
def test_what_is_not_a_number_reaches_the_loss(where):
    vae = model("nb", "gene", N_GENES, dropout=0.2)
    with torch.no_grad():
        vae.get_parameter(where).view(-1)[0] = np.nan
    x_ng, covariates, noise_nk = given(16)
    assert FusedElbo(vae)(sparse(x_ng), covariates, noise_nk, kl_weight=1.0).loss_n.isnan().any()


@pytest.mark.parametrize(
    "changes",
    [
        {"library": "latent"},
        {"posterior": "full"},
        {"posterior": "flow"},
        {"prior": "mixture"},
        {"prior": "vamp"},
        {"prior": "mixture", "n_labels": 3},
        {"decoder": "linear"},
        {"norm": "layer"},
        {"norm": "none"},
        {"coding": "embedding"},
        {"dispersion": "gene-cell"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_models_go_through_their_modules(changes):
    shape = {"n_latent": 4, "n_hidden": 8, "n_layers": 1, "dropout": 0.0, "encode_covariates": False}
    assert is_plain(VAE(50, 3, likelihood="nb", dispersion="gene", **shape))
    assert not is_plain(VAE(50, 3, **({"likelihood": "nb", "dispersion": "gene"} | shape | changes)))


def test_models_elsewhere_go_through_their_modules(monkeypatch):
    vae = model("nb", "gene", N_GENES)
    assert not is_plain(copy.deepcopy(vae).eval())
    assert not is_plain(copy.deepcopy(vae).double())
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert not is_plain(vae)


def test_models_of_several_draws_go_through_their_modules(tmp_path):
    write_cohort(tmp_path)
    splits = manifests(tmp_path, "train"), manifests(tmp_path, "validation")
    for draws in (1, 2):
        model = replace(MODEL, draws=draws)
        _, state = preparing.prepare(*splits, model, sheet={}, seed=0, threads=1)
        assert (state.fused is None) == (draws > 1)


def test_training_takes_the_same_way_with_and_without(tmp_path, monkeypatch):
    cohort = tmp_path / "cohort"
    write_cohort(cohort)
    settings = replace(MODEL, max_epochs=4, kl_warmup=0.5)
    _, history, _ = run(cohort, tmp_path / "fused", settings)
    monkeypatch.setattr(preparing, "is_plain", lambda vae: False)
    _, expected, _ = run(cohort, tmp_path / "modules", settings)
    history, expected = (table.drop(columns=TIMES) for table in (history, expected))
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    assert not history.equals(expected), "both went one way"
