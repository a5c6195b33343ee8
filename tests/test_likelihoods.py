"""The likelihoods are probabilities, equal scipy's and their limits, and their gradients are right."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cohortvi.inference.likelihoods import log_rising, nb_log_prob, poisson_log_prob, zinb_log_prob

MEANS = (1e-6, 0.01, 0.5, 3.0, 40.0)
THETAS = (1e-3, 0.1, 1.0, 20.0, 31.99, 32.01, 1e3, 1e6)
GRID = [(mu, theta) for mu in MEANS for theta in THETAS]


def column(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).reshape(-1, 1)


def logs(mu: float, theta: float, n_obs: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n_obs, 1), np.log(mu), dtype=dtype), torch.full((1,), np.log(theta), dtype=dtype)


def definition(x: np.ndarray, mu: float, theta: float) -> np.ndarray:
    """Negative binomial: prod_{i<x} (theta + i) / (i + 1), times p^x (1 - p)^theta with p = mu / (theta + mu)."""
    steps = [np.log((theta + np.arange(value)) / np.arange(1, value + 1)).sum() for value in x]
    return np.array(steps) - x * np.log1p(theta / mu) - theta * np.log1p(mu / theta)


@pytest.mark.parametrize(("mu", "theta"), [(0.01, 0.1), (0.5, 1.0), (3.0, 0.7), (3.0, 50.0), (40.0, 5.0)])
@pytest.mark.parametrize("logit", [None, -3.0, 0.0, 2.0])
def test_probabilities_of_all_counts_sum_to_one(mu, theta, logit):
    x_ng = column(np.arange(4000))
    log_mu_ng, log_theta_g = logs(mu, theta, len(x_ng))
    if logit is None:
        found = nb_log_prob(x_ng, log_mu_ng, log_theta_g)
    else:
        found = zinb_log_prob(x_ng, log_mu_ng, log_theta_g, torch.full_like(x_ng, logit))
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("mu", MEANS)
def test_poisson_equals_scipy(mu):
    x = np.arange(200)
    found = poisson_log_prob(column(x), logs(mu, 1, len(x))[0])
    np.testing.assert_allclose(found[:, 0], stats.poisson.logpmf(x, mu), rtol=1e-12)


@pytest.mark.parametrize(("mu", "theta"), [(mu, theta) for mu, theta in GRID if mu >= 0.01 and theta < 1e3])
def test_negative_binomial_equals_scipy(mu, theta):
    x = np.concatenate([np.arange(50), [100, 1000, 30_000]])
    found = nb_log_prob(column(x), *logs(mu, theta, len(x)))
    np.testing.assert_allclose(found[:, 0], stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-8)


@pytest.mark.parametrize(("mu", "theta"), GRID)
def test_negative_binomial_equals_its_definition_where_scipy_loses_digits(mu, theta):
    x = np.concatenate([np.arange(50), [100, 1000]])
    found = nb_log_prob(column(x), *logs(mu, theta, len(x)))
    np.testing.assert_allclose(found[:, 0], definition(x, mu, theta), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("mu", "theta"), GRID)
def test_negative_binomial_in_float32_is_as_exact_as_float32_can_be(mu, theta):
    x = np.concatenate([np.arange(50), [100, 1000]])
    single = nb_log_prob(column(x).float(), *logs(mu, theta, len(x), torch.float32))
    double = nb_log_prob(column(x), *logs(mu, theta, len(x)))
    # the logarithms themselves are rounded to 1e-6, and a count of x multiplies that by x
    np.testing.assert_allclose(single[:, 0], double[:, 0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mu", MEANS)
def test_negative_binomial_tends_to_poisson(mu):
    x_ng = column(np.arange(60))
    poisson = poisson_log_prob(x_ng, logs(mu, 1, 60)[0])
    errors = [float((nb_log_prob(x_ng, *logs(mu, theta, 60)) - poisson).abs().max()) for theta in (1e4, 1e6, 1e8, 1e10)]
    assert all(later < earlier / 50 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(("mu", "theta"), GRID)
def test_zero_inflation_mixes_zeros_with_the_negative_binomial(mu, theta):
    x = np.arange(30)
    pi = 0.3
    logit = torch.full((30, 1), np.log(pi / (1 - pi)), dtype=torch.float64)
    found = zinb_log_prob(column(x), *logs(mu, theta, 30), logit)
    expected = pi * (x == 0) + (1 - pi) * np.exp(definition(x, mu, theta))
    np.testing.assert_allclose(found[:, 0].exp(), expected, rtol=1e-9)


@given(theta=st.floats(1e-4, 1e8), x=st.integers(1, 300))
def test_log_rising_factorial_is_its_product(theta, x):
    found = log_rising(torch.tensor([float(x)], dtype=torch.float64), torch.tensor([theta], dtype=torch.float64).log())
    assert float(found) == pytest.approx(np.log(theta + np.arange(x)).sum(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
@pytest.mark.parametrize("per_cell", [False, True], ids=["theta per gene", "theta per cell and gene"])
def test_gradients_equal_finite_differences(likelihood, per_cell):
    r = np.random.default_rng(0)
    x_ng = torch.from_numpy(r.poisson(2.0, (4, 5))).double()
    x_ng[:, 3] = 0
    x_ng[0, 0] = 500
    shape = (4, 5) if per_cell else (5,)
    # theta from 0.1 to 1e4, both sides of the change of formula
    log_theta = torch.from_numpy(r.uniform(np.log(0.1), np.log(1e4), shape)).requires_grad_()
    log_mu_ng = torch.from_numpy(r.normal(0, 2, (4, 5))).requires_grad_()
    logits_ng = torch.from_numpy(r.normal(0, 2, (4, 5))).requires_grad_()
    functions = {
        "poisson": lambda m, t, a: poisson_log_prob(x_ng, m),
        "nb": lambda m, t, a: nb_log_prob(x_ng, m, t),
        "zinb": lambda m, t, a: zinb_log_prob(x_ng, m, t, a),
    }
    assert torch.autograd.gradcheck(functions[likelihood], (log_mu_ng, log_theta, logits_ng), atol=1e-6)


def test_extreme_parameters_give_finite_values_and_gradients_in_float32():
    x_ng = torch.tensor([[0.0, 1.0, 60_000.0]]).expand(5, 3)
    log_mu_ng = torch.tensor([-60.0, -20.0, 0.0, 8.0, 12.0])[:, None].expand(5, 3).clone().requires_grad_()
    for value in (-12.0, 0.0, 12.0, 30.0):
        log_theta_g = torch.full((3,), value, requires_grad=True)
        logits_ng = torch.tensor([-40.0, 0.0, 40.0]).expand(5, 3).clone().requires_grad_()
        found = zinb_log_prob(x_ng, log_mu_ng, log_theta_g, logits_ng)
        found.sum().backward()
        for tensor in (found, log_mu_ng.grad, log_theta_g.grad, logits_ng.grad):
            assert torch.isfinite(tensor).all()
