"""inference.bounds: where log p(x) is known, every bound and gap has its exact value within its Monte Carlo error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from cohortvi.inference.bounds import LogJoint, importance, log_weights, refine
from cohortvi.inference.posteriors import DiagonalGaussian, FullGaussian
from cohortvi.inference.priors import StandardNormal

PRIOR = StandardNormal()
N_OBS, N_LATENT, NOISE = 40, 3, 0.7


def draws(s: int, n_latent: int, seed: int = 0) -> Tensor:
    """Antithetic standard normal noise, (s, n, k)."""
    half = torch.randn(s // 2, N_OBS, n_latent, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([half, -half])


class Known(NamedTuple):
    """A model of which log p(x) is known: of each cell, (n,)."""

    log_joint: LogJoint
    log_p_n: Tensor
    n_latent: int
    elbo: Callable[[DiagonalGaussian], Tensor] | None = None  # in closed form


class Linear(NamedTuple):
    """x | z ~ N(W z, NOISE^2 I): the posterior is Gaussian, with the same covariance for all cells."""

    known: Known
    exact: FullGaussian
    precision_kk: np.ndarray


@pytest.fixture(scope="module")
def linear() -> Linear:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, N_LATENT))
    x_ng = rng.normal(size=(N_OBS, N_LATENT)) @ weights.T + NOISE * rng.normal(size=(N_OBS, 5))
    log_p_n = scipy.stats.multivariate_normal(cov=weights @ weights.T + NOISE**2 * np.eye(5)).logpdf(x_ng)
    precision_kk = np.eye(N_LATENT) + weights.T @ weights / NOISE**2
    covariance_kk = np.linalg.inv(precision_kk)
    loc_nk = x_ng @ weights @ covariance_kk / NOISE**2
    tril_nkk = np.broadcast_to(np.linalg.cholesky(covariance_kk), (N_OBS, N_LATENT, N_LATENT)).copy()

    def log_joint(z_nk: Tensor) -> Tensor:
        away = torch.from_numpy(x_ng) - z_nk @ torch.from_numpy(weights).T
        log_likelihood_n = -0.5 * ((away / NOISE) ** 2 + math.log(2 * math.pi * NOISE**2)).sum(-1)
        return log_likelihood_n + PRIOR.log_prob(z_nk)

    known = Known(log_joint, torch.from_numpy(log_p_n), N_LATENT)
    return Linear(known, FullGaussian(torch.from_numpy(loc_nk), torch.from_numpy(tril_nkk)), precision_kk)


@pytest.fixture(scope="module")
def poisson() -> Known:
    """x_g | z ~ Poisson(exp(a_g z + b_g)) with one latent dimension; log p(x) by quadrature."""
    rng = np.random.default_rng(1)
    slopes, bias, z_n = rng.normal(size=8), rng.normal(size=8), rng.normal(size=N_OBS)
    x_ng = torch.from_numpy(rng.poisson(np.exp(np.outer(z_n, slopes) + bias)).astype(float))
    slopes_g, bias_g = torch.from_numpy(slopes), torch.from_numpy(bias)

    def log_joint(z_nk: Tensor) -> Tensor:
        log_mu = z_nk * slopes_g + bias_g
        return (x_ng * log_mu - log_mu.exp() - torch.lgamma(x_ng + 1)).sum(-1) + PRIOR.log_prob(z_nk)

    def exact_elbo(qz: DiagonalGaussian) -> Tensor:
        log_mu = qz.loc_nk * slopes_g + bias_g
        mean = (log_mu + 0.5 * (slopes_g * qz.scale_nk) ** 2).exp()  # of a log-normal
        return (x_ng * log_mu - mean - torch.lgamma(x_ng + 1)).sum(-1) - qz.kl_to_standard_normal()

    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    joint = torch.stack([log_joint(z.expand(N_OBS, 1)) for z in grid])
    return Known(log_joint, torch.logsumexp(joint, 0) + math.log(16 / 4000), 1, exact_elbo)


def start(n_latent: int) -> DiagonalGaussian:
    """A posterior far from the best: what a poor encoder gives."""
    return DiagonalGaussian(
        *torch.ones(2, N_OBS, n_latent, dtype=torch.float64) * torch.tensor([0.5, 0.6])[:, None, None]
    )


def fitted(known: Known, *, is_full: bool) -> DiagonalGaussian | FullGaussian:
    generator = torch.Generator().manual_seed(2)
    given = {"is_full": is_full, "steps": 800, "generator": generator}
    return refine(known.log_joint, start(known.n_latent), **given)


def test_of_a_linear_model_the_full_covariance_fit_is_the_posterior(linear):
    log_joint, log_p_n, *_ = linear.known
    qz = fitted(linear.known, is_full=True)
    np.testing.assert_allclose(qz.loc_nk, linear.exact.loc_nk, atol=0.02)
    covariance_nkk = qz.tril_nkk @ qz.tril_nkk.mT
    np.testing.assert_allclose(covariance_nkk, linear.exact.tril_nkk @ linear.exact.tril_nkk.mT, atol=0.08)
    found_n = log_weights(log_joint, qz, draws(20_000, N_LATENT)).mean(0)
    np.testing.assert_allclose(found_n, log_p_n, atol=0.05)
    elbo_n = log_weights(log_joint, linear.exact, draws(20_000, N_LATENT)).mean(0)
    np.testing.assert_allclose(elbo_n, log_p_n, atol=0.05)  # no approximation gap


def test_of_a_linear_model_the_mean_field_fit_has_the_known_gap(linear):
    log_joint, log_p_n, *_ = linear.known
    qz = fitted(linear.known, is_full=False)
    # The best factorised Gaussian has the posterior's mean and the inverse of the precision's diagonal (Bishop 2006,
    # section 10.1.2).
    scale_k = np.diag(linear.precision_kk) ** -0.5
    np.testing.assert_allclose(qz.loc_nk, linear.exact.loc_nk, atol=0.02)
    np.testing.assert_allclose(qz.scale_nk, np.broadcast_to(scale_k, qz.scale_nk.shape), rtol=0.12)
    gap = 0.5 * (np.log(np.diag(linear.precision_kk)).sum() - np.linalg.slogdet(linear.precision_kk)[1])
    assert gap > 0.1
    best = DiagonalGaussian(linear.exact.loc_nk, torch.from_numpy(scale_k).expand(N_OBS, -1))
    elbo_n = log_weights(log_joint, best, draws(20_000, N_LATENT)).mean(0)
    np.testing.assert_allclose(log_p_n - elbo_n, gap, atol=0.05)
    found_n = log_weights(log_joint, qz, draws(20_000, N_LATENT)).mean(0)
    np.testing.assert_allclose(found_n, elbo_n, atol=0.03)


def test_of_a_poisson_model_the_fit_reaches_the_best_of_a_grid(poisson):
    qz = fitted(poisson, is_full=False)
    best_n = torch.full((N_OBS,), -torch.inf, dtype=torch.float64)
    for loc in torch.linspace(-4, 4, 201):
        for scale in torch.linspace(0.05, 1.5, 117):
            both = (torch.full((N_OBS, 1), float(value), dtype=torch.float64) for value in (loc, scale))
            best_n = torch.maximum(best_n, poisson.elbo(DiagonalGaussian(*both)))
    found_n = poisson.elbo(qz)
    assert (found_n >= best_n - 0.02).all()
    assert (found_n <= poisson.log_p_n).all()
    assert (log_weights(poisson.log_joint, qz, draws(20_000, 1)).mean(0) - found_n).abs().max() < 0.05


def test_weights_of_the_posterior_itself_are_all_the_evidence(linear):
    weights = log_weights(linear.known.log_joint, linear.exact, draws(10, N_LATENT))
    np.testing.assert_allclose(weights, linear.known.log_p_n.expand(10, -1), atol=1e-9)
    for k in (1, 10):
        found = importance(weights, k)
        np.testing.assert_allclose(found.bound_n, linear.known.log_p_n, atol=1e-9)
        np.testing.assert_allclose(found.error_n, 0, atol=1e-6)
        np.testing.assert_allclose(found.ess_n, 10, rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "poisson"])
def test_bounds_rise_with_the_number_of_draws_to_the_evidence(name, request):
    model = request.getfixturevalue(name)
    known = model.known if name == "linear" else model
    noise = torch.randn(4_000, N_OBS, known.n_latent, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    proposal = fitted(known, is_full=False)._replace() if name == "poisson" else start(known.n_latent)
    weights = log_weights(known.log_joint, proposal, noise)
    found = [importance(weights, k) for k in (1, 10, 100, 4_000)]
    elbo_n = log_weights(known.log_joint, proposal, noise).mean(0)
    assert abs((found[0].bound_n - elbo_n).mean()) < 0.05 * (1 + abs(float(elbo_n.mean())) * 0.01)
    means = [float(bound.bound_n.mean()) for bound in found]
    assert means == sorted(means)
    away = (found[-1].bound_n - known.log_p_n) / found[-1].error_n
    reliable = found[-1].ess_n > 100
    assert reliable.sum() > N_OBS / 4
    assert float(away[reliable].abs().max()) < 5
    below = found[1].bound_n - known.log_p_n
    assert (below < 4 * found[1].error_n).all()


def test_draws_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="10 draws cannot be dealt to groups of 4"):
        importance(torch.zeros(10, 2), 4)


def test_a_full_gaussian_has_the_density_divergence_and_draws_of_scipy_s(linear):
    qz, noise = linear.exact, draws(200_000, N_LATENT)[:, :1]
    first = FullGaussian(qz.loc_nk[:1], qz.tril_nkk[:1])
    z_snk, log_q_sn = first.draw(noise)
    reference = scipy.stats.multivariate_normal(first.loc_nk[0], (first.tril_nkk[0] @ first.tril_nkk[0].mT).numpy())
    np.testing.assert_allclose(log_q_sn[:50, 0], reference.logpdf(z_snk[:50, 0]), rtol=1e-9)
    np.testing.assert_allclose(first.log_prob(z_snk[:50]), log_q_sn[:50], rtol=1e-9)
    np.testing.assert_allclose(np.cov(z_snk[:, 0].T), reference.cov, atol=0.01)
    divergence = float((log_q_sn - PRIOR.log_prob(z_snk)).mean())
    assert float(first.kl_to_standard_normal()) == pytest.approx(divergence, abs=0.02)
