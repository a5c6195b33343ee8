"""inference.criticism: simulations have their moments; checks and ranks tell a right model from a wrong one."""

import numpy as np
import pytest
import scipy.stats
import torch
from test_models import OPTIONS, build, covariates, draw_counts, sparse

from cohortvi.inference.criticism import calibration_ranks, coverage, replicates, statistics
from cohortvi.inference.likelihoods import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from cohortvi.inference.posteriors import FullGaussian

FIRST = {name: values[0] for name, values in OPTIONS.items()}
DRAWS = 200_000


def test_samples_have_the_moments_of_their_likelihoods():
    torch.manual_seed(0)
    mu_g, theta_g, pi_g = np.array([0.1, 2.0, 30.0]), np.array([0.5, 3.0, 10.0]), np.array([0.1, 0.5, 0.3])
    log_mu_ng = torch.from_numpy(mu_g).log().expand(DRAWS, 3)
    log_theta_g, logits_ng = (
        torch.from_numpy(theta_g).log(),
        torch.from_numpy(np.log(pi_g / (1 - pi_g))).expand(DRAWS, 3),
    )
    variance_g = mu_g + mu_g**2 / theta_g
    mean_g = (1 - pi_g) * mu_g
    expected = {
        Poisson(log_mu_ng): (mu_g, mu_g),
        NegativeBinomial(log_mu_ng, log_theta_g): (mu_g, variance_g),
        ZeroInflatedNegativeBinomial(log_mu_ng, log_theta_g, logits_ng): (
            mean_g,
            (1 - pi_g) * (variance_g + mu_g**2) - mean_g**2,
        ),
    }
    for likelihood, (mean, variance) in expected.items():
        x_ng = likelihood.sample()
        assert (x_ng == x_ng.round()).all()
        assert (np.abs(x_ng.mean(0).numpy() - mean) < 5 * np.sqrt(variance / DRAWS)).all()
        np.testing.assert_allclose(x_ng.var(0).numpy(), variance, rtol=0.05)


def test_statistics_are_numpys():
    x_ng = draw_counts(60, 30, 1)
    found = statistics(torch.from_numpy(x_ng).double())
    expressed = x_ng.mean(0) >= 0.05
    ratios = np.sort(x_ng.var(0, ddof=1)[expressed] / x_ng.mean(0)[expressed])
    assert float(found.zero_fraction) == pytest.approx((x_ng == 0).mean())
    assert float(found.library_mean) == pytest.approx(x_ng.sum(1).mean())
    assert float(found.library_sd) == pytest.approx(np.log(np.maximum(x_ng.sum(1), 1)).std(ddof=1))
    assert float(found.variance_over_mean) == pytest.approx(ratios[(len(ratios) - 1) // 2])


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_checks_accept_cells_of_the_model_and_refuse_others(likelihood):
    vae, known = build(FIRST | {"likelihood": likelihood}).eval(), covariates(400, 1)
    depth = sparse(draw_counts(400, vae.settings["n_genes"], 1) + 3)
    torch.manual_seed(1)
    with torch.no_grad():
        x_ng = vae.predict(depth, vae.sample_prior(400), known).sample()
    for counts_ng, is_like in (
        (x_ng, True),
        ((x_ng * 3).round(), False),
        (torch.poisson(x_ng.mean(0).expand_as(x_ng)), False),
    ):
        drawn = torch.tensor([statistics(replicate) for replicate in replicates(vae, counts_ng, known, 20)])
        observed = torch.tensor(statistics(counts_ng))
        away = (observed - drawn.mean(0)).abs() / drawn.std(0)
        chosen = torch.tensor([0, 3])  # what the posterior does not see by itself: zeros, variance over mean
        assert bool((away[chosen] < 5).all()) == is_like, away


class Linear:
    """x | z ~ N(W z, I / 4) with z ~ N(0, I), its exact posterior widened by a factor."""

    n_dimensions, device = 2, torch.device("cpu")
    weights = torch.tensor([[1.0, 0.3], [-0.5, 1.0], [0.2, 0.7]])

    def __init__(self, widened: float):
        self.widened = widened

    def sample_prior(self, n):
        return torch.randn(n, 2)

    def predict(self, x, z_nk, known):
        mean_ng = z_nk @ self.weights.T

        class Normal:
            @staticmethod
            def sample():
                return mean_ng + 0.5 * torch.randn_like(mean_ng)

        return Normal

    def encode(self, x_ng, known):
        covariance = torch.linalg.inv(torch.eye(2) + 4 * self.weights.T @ self.weights)
        tril = torch.linalg.cholesky(covariance) * self.widened
        return FullGaussian(4 * x_ng @ self.weights @ covariance, tril.expand(len(x_ng), 2, 2))


@pytest.mark.parametrize(("widened", "is_calibrated"), [(1.0, True), (0.6, False), (1.6, False)])
def test_ranks_are_uniform_for_the_true_posterior_alone(widened, is_calibrated):
    torch.manual_seed(2)
    ranks_nk = calibration_ranks(Linear(widened), None, covariates(3_000, 0), 99)
    assert ranks_nk.min() >= 0
    assert ranks_nk.max() <= 99
    p_values = [scipy.stats.chisquare(np.histogram(rank, 10, (0, 100))[0]).pvalue for rank in ranks_nk.T.numpy()]
    assert (min(p_values) > 1e-3) == is_calibrated
    covered = coverage(ranks_nk, 99)
    for level, shares in covered.items():
        expected = scipy.stats.norm.cdf(widened * scipy.stats.norm.ppf(0.5 + level / 2)) * 2 - 1
        np.testing.assert_allclose(shares, expected, atol=0.04)


@pytest.mark.parametrize("prior", ["standard_normal", "mixture", "vamp"])
@pytest.mark.parametrize("posterior", ["diagonal", "flow"])
def test_draws_of_the_prior_have_its_density(prior, posterior):
    vae = build(FIRST | {"prior": prior, "posterior": posterior, "library": "latent"}).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        z_nk, other_nk = vae.sample_prior(20_000), torch.randn(20_000, vae.n_dimensions) * 3
        # E_p[f / p] over draws of p is the integral of f, a normal density narrower than p's tails.
        narrow = torch.distributions.Normal(z_nk.mean(0), 0.5 * z_nk.std(0))
        ratio_n = (narrow.log_prob(z_nk).sum(1) - vae.log_prior(z_nk)).exp()
    assert z_nk.shape == other_nk.shape
    assert float(ratio_n.mean()) == pytest.approx(1, abs=5 * float(ratio_n.std()) / 20_000**0.5 + 0.02)
