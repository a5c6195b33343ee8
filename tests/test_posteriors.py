"""Posterior, prior and their divergence agree with torch, with Monte Carlo and with bounds that are known exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import distributions

from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import elbo
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.priors import StandardNormal
from cohortvi.inference.vae import VAE


def posterior(n_obs: int = 6, n_latent: int = 3, seed: int = 0) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n_obs, n_latent, generator=generator, dtype=torch.float64)  # noqa: E731
    return DiagonalGaussian(draw(), draw().exp())


def test_densities_equal_those_of_torch():
    qz = posterior()
    z_nk = posterior(seed=1).loc_nk
    expected = distributions.Normal(qz.loc_nk, qz.scale_nk).log_prob(z_nk).sum(1)
    torch.testing.assert_close(qz.log_prob(z_nk), expected)
    torch.testing.assert_close(StandardNormal().log_prob(z_nk), distributions.Normal(0.0, 1.0).log_prob(z_nk).sum(1))


def test_samples_have_the_mean_and_scale_of_the_posterior():
    qz = posterior(2)
    z_snk = qz.sample(torch.randn(200_000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(z_snk.mean(0), qz.loc_nk, atol=0.03, rtol=0.01)
    torch.testing.assert_close(z_snk.std(0), qz.scale_nk, atol=0.0, rtol=0.01)


def test_kl_equals_that_of_torch_and_its_monte_carlo_estimate():
    qz, prior = posterior(), StandardNormal()
    exact = distributions.kl_divergence(distributions.Normal(*qz), distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(qz.kl_to_standard_normal(), exact)
    noise = torch.randn(100_000, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z_snk = qz.sample(noise)
    draws = qz.log_prob(z_snk) - prior.log_prob(z_snk)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - qz.kl_to_standard_normal()).abs() < 5 * error).all()


@given(loc=st.floats(-5, 5), log_scale=st.floats(-5, 3))
def test_kl_is_never_negative(loc, log_scale):
    qz = DiagonalGaussian(*torch.tensor([[[loc]], [[np.exp(log_scale)]]], dtype=torch.float64))
    assert float(qz.kl_to_standard_normal()) >= -1e-12


def test_kl_is_zero_for_the_prior_alone():
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    assert float(DiagonalGaussian(zeros, ones).kl_to_standard_normal()) == 0
    for other in (DiagonalGaussian(zeros + 0.1, ones), DiagonalGaussian(zeros, 0.9 * ones)):
        assert float(other.kl_to_standard_normal()) > 0


def tiny_vae(likelihood: str) -> VAE:
    """One latent dimension and a decoder that depends on it, so that log p(x) is an integral over a line."""
    torch.manual_seed(3)
    settings = {"n_latent": 1, "n_hidden": 4, "n_layers": 1, "dropout": 0.0, "dispersion": "gene"}
    vae = VAE(5, 1, likelihood=likelihood, encode_covariates=False, **settings).double().eval()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
@torch.no_grad()
def test_log_evidence_is_elbo_plus_divergence_from_the_true_posterior(likelihood):
    """log p(x) = KL(q(z|x) || p(z|x)) + ELBO, each by its own quadrature over the one latent dimension."""
    vae = tiny_vae(likelihood)
    z = np.linspace(-10, 10, 20_001)
    noise, zeros = torch.from_numpy(z)[:, None], Covariates(torch.zeros(len(z), dtype=torch.int64))
    for x_g in torch.from_numpy(np.random.default_rng(0).poisson(3.0, (4, 5))).double():
        x_sg = x_g.expand(len(z), 5)
        elbo_s = elbo(vae, x_sg, zeros, noise, kl_weight=1.0).elbo_n.numpy()
        bound = integrate.simpson(elbo_s * stats.norm.pdf(z), x=z)
        px = vae.decode(noise, x_sg.sum(1, keepdim=True), zeros)
        log_joint = px.log_prob(x_sg).sum(1).numpy() + stats.norm.logpdf(z)
        log_evidence = np.log(integrate.simpson(np.exp(log_joint), x=z))
        qz = vae.encode(x_sg[:1], Covariates(zeros.batch_n[:1]))
        log_q = stats.norm.logpdf(z, float(qz.loc_nk), float(qz.scale_nk))
        divergence = integrate.simpson(np.exp(log_q) * (log_q - log_joint + log_evidence), x=z)
        assert divergence > 0.01
        assert bound < log_evidence
        assert bound + divergence == pytest.approx(log_evidence, abs=1e-5)
