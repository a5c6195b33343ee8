"""The compiled loops over sparse counts equal plain torch in float64 on the dense counts, gradients and all."""

import hashlib
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortvi.inference import arithmetic, heads
from cohortvi.inference.fused import CountsProduct, Head
from cohortvi.inference.likelihoods import nb_log_prob, poisson_log_prob, zinb_log_prob
from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import elbo
from cohortvi.inference.products import product
from cohortvi.inference.sparse import Counts, SparseCounts, dense, sparse_counts, take_rows
from cohortvi.inference.vae import VAE

LOSS, GRADIENT = 1e-6, 1e-5  # relative; gradients in L2 over a tensor


def sparse(x_ng: np.ndarray) -> SparseCounts:
    rows, genes = np.nonzero(x_ng)
    ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(x_ng)))])
    arrays = (ends, genes.astype(np.int32), x_ng[rows, genes].astype(np.float32))
    return sparse_counts(*map(torch.from_numpy, arrays), x_ng.shape[1])


def draw_counts(n_obs: int, n_genes: int, seed: int, largest: int = 0) -> np.ndarray:
    """Sparse counts of unequal depth, with an empty cell and, if asked for, a huge count."""
    r = np.random.default_rng(seed)
    x_ng = r.poisson(r.gamma(0.3, 1.0, (n_obs, n_genes)) * np.exp(r.normal(0, 1, (n_obs, 1))))
    x_ng[r.integers(n_obs)] = 0
    if largest:
        x_ng[0, r.integers(n_genes)] = largest
    return x_ng


def model(likelihood: str, dispersion: str, n_genes: int, log_theta: float = 0.0, **changes: object) -> VAE:
    shape = {"n_latent": 4, "n_hidden": 24, "n_layers": 1, "dropout": 0.0, "encode_covariates": False}
    vae = VAE(n_genes, 3, likelihood=likelihood, dispersion=dispersion, **shape | changes)
    with torch.no_grad():
        vae.decoder.px_scale.weight.mul_(4)  # fractions that differ
        for layer in (*vae.encoder.hidden.layers, *vae.decoder.hidden.layers):
            layer.norm.bias.normal_()  # at 0 equal cells stand on the kink of ReLU
        if likelihood != "poisson":
            vae.log_theta.add_(log_theta)
    return vae


def terms(vae: VAE, x: Counts, covariates: Covariates, noise_nk: torch.Tensor, weights_n: torch.Tensor):
    """Return the cells' losses, and the gradients of their weighted sum by name."""
    vae.zero_grad()
    found = elbo(vae, x, covariates, noise_nk, kl_weight=0.7)
    loss_n = found.reconstruction_n + 0.7 * found.kl_n
    (loss_n * weights_n).sum().backward()
    return loss_n.detach(), {name: parameter.grad.clone() for name, parameter in vae.named_parameters()}


def check(vae: VAE, x_ng: np.ndarray, seed: int, *, weighted: bool = False) -> None:
    n_obs, generator = len(x_ng), torch.Generator().manual_seed(seed)
    n_continuous = vae.settings["n_continuous"]
    covariates = Covariates(
        torch.randint(3, (n_obs,), generator=generator),
        tuple(torch.randint(n, (n_obs,), generator=generator) for n in vae.settings["n_categories"]),
        torch.randn(n_obs, n_continuous, generator=generator) if n_continuous else None,
    )
    noise_nk = torch.randn(n_obs, 4, generator=generator)
    weights_n = torch.rand(n_obs, generator=generator) if weighted else torch.full((n_obs,), 1 / n_obs)
    found = terms(vae, sparse(x_ng), covariates, noise_nk, weights_n)
    plain = terms(vae, torch.from_numpy(x_ng).float(), covariates, noise_nk, weights_n)
    exact = covariates._replace(continuous_nc=covariates.continuous_nc.double() if n_continuous else None)
    expected = terms(vae.double(), torch.from_numpy(x_ng).double(), exact, noise_nk.double(), weights_n.double())
    rounding = LOSS + 1e-7 * x_ng.sum(1).max()  # of terms as large as the counts, whose differences losses are
    np.testing.assert_allclose(found[0].mean(), expected[0].mean(), rtol=LOSS, atol=rounding)
    np.testing.assert_allclose(found[0], expected[0], rtol=10 * LOSS, atol=10 * rounding)
    whole = float(torch.cat([value.flatten() for value in expected[1].values()]).norm())
    for name, value in expected[1].items():
        # Where single precision itself is worse (batch norm takes out what biases before it add), as plain torch.
        errors = [float((tried[1][name].double() - value).norm()) for tried in (found, plain)]
        bound = max(GRADIENT * float(value.norm()), 4 * errors[1], 1e-7 * whole, rounding)
        assert errors[0] <= bound, f"{name}: {errors}"


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_losses_and_gradients_equal_plain_torch(likelihood, dispersion, weighted):
    torch.manual_seed(1)
    changes = {"n_layers": 2, "n_categories": (3,), "n_continuous": 1, "encode_covariates": True} if weighted else {}
    check(model(likelihood, dispersion, 300, **changes), draw_counts(64, 300, 1, largest=300), 1, weighted=weighted)


@given(
    n_obs=st.integers(1, 40),
    n_genes=st.integers(1, 200),
    likelihood=st.sampled_from(["nb", "zinb", "poisson"]),
    log_theta=st.sampled_from([-12.0, -4.0, 0.0, 4.0, 12.0]),
    largest=st.sampled_from([0, 33, 999, 1_001, 70_000]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=100, deadline=None)
def test_head_of_any_shape_count_and_dispersion(n_obs, n_genes, likelihood, log_theta, largest, seed):
    torch.manual_seed(seed)
    x_ng, weights_n = draw_counts(n_obs, n_genes, seed, largest), torch.rand(n_obs)
    parts = {"h": torch.randn(n_obs, 16), "library": torch.rand(n_obs) + 2}
    if likelihood != "poisson":
        parts["theta"] = torch.randn(1, n_genes) + log_theta
    for head in ("scale", "zi")[: 1 + (likelihood == "zinb")]:
        parts |= {f"{head}.weight": torch.randn(n_genes, 16) / 2, f"{head}.bias": torch.randn(n_genes)}
    found, expected = {}, {}
    for result, dtype in ((found, torch.float32), (expected, torch.float64)):
        given = {name: value.to(dtype).clone().requires_grad_() for name, value in parts.items()}
        if dtype == torch.float32:
            h, library, theta = (given.get(name) for name in ("h", "library", "theta"))
            heads = [value for name, value in given.items() if "." in name]
            rows_n = torch.zeros(n_obs, dtype=torch.int64)
            nll_n = Head.apply(sparse(x_ng), True, rows_n, h, library, theta, *heads)
        else:
            nll_n = plain_head(torch.from_numpy(x_ng).double(), likelihood, given)
        (nll_n * weights_n).sum().backward()
        result |= {"nll": nll_n.detach()} | {name: value.grad for name, value in given.items()}
    # Of terms as large as counts and means (up to e^3), whose differences these are, times 16 hidden units of about 1.
    rounding = 4e-7 * (20 + x_ng.sum(1).max())
    for name, value in expected.items():
        tolerance = (LOSS if name == "nll" else GRADIENT) * float(value.norm()) + rounding * math.sqrt(n_obs)
        assert float((found[name].double() - value).norm()) <= tolerance, name


def plain_head(x_ng: torch.Tensor, likelihood: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return -log p(x | z), (n,), by the dense likelihoods."""
    logits_ng = given["h"] @ given["scale.weight"].T + given["scale.bias"]
    log_mu_ng = given["library"][:, None] + logits_ng.log_softmax(1)
    if likelihood == "poisson":
        return -poisson_log_prob(x_ng, log_mu_ng).sum(1)
    if likelihood == "nb":
        return -nb_log_prob(x_ng, log_mu_ng, given["theta"][0]).sum(1)
    zi_logits_ng = given["h"] @ given["zi.weight"].T + given["zi.bias"]
    return -zinb_log_prob(x_ng, log_mu_ng, given["theta"][0], zi_logits_ng).sum(1)


@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 150), st.integers(1, 300)),
    views=st.tuples(st.booleans(), st.booleans()),
    has_bias=st.booleans(),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=60, deadline=None)
def test_products_of_any_shape_and_view(shape, views, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    (n, k, m), (a_is_view, b_is_view) = shape, views
    a = torch.randn(k, n, generator=generator).T if a_is_view else torch.randn(n, k, generator=generator)
    b = torch.randn(m, k, generator=generator).T if b_is_view else torch.randn(k, m, generator=generator)
    bias = torch.randn(m, generator=generator) if has_bias else None
    with torch.no_grad():
        found, again = product(a, b, bias), product(a, b, bias)
    expected = a.double().numpy() @ b.double().numpy() + (bias.double().numpy() if has_bias else 0)
    rounding = 1e-6 * (1 + a.abs().numpy() @ b.abs().numpy())  # of terms as large as these, which may cancel
    assert (np.abs(found.numpy() - expected) <= rounding).all()
    assert torch.equal(found, again)


@given(n_obs=st.integers(1, 40), n_genes=st.integers(1, 200), n_hidden=st.integers(1, 40), seed=st.integers(0, 1_000))
@settings(max_examples=40, deadline=None)
def test_first_layer_of_any_shape(n_obs, n_genes, n_hidden, seed):
    torch.manual_seed(seed)
    x_ng = draw_counts(n_obs, n_genes, seed, largest=70_000)
    weight_gh, bias_h = torch.randn(n_genes, n_hidden, requires_grad=True), torch.randn(n_hidden, requires_grad=True)
    upstream_nh, x = torch.randn(n_obs, n_hidden), sparse(x_ng)
    out_nh = CountsProduct.apply(x, weight_gh, bias_h)
    out_nh.backward(upstream_nh)
    h_ng = np.log1p(x_ng)
    expected_nh = h_ng @ weight_gh.detach().numpy() + bias_h.detach().numpy()
    np.testing.assert_allclose(out_nh.detach(), expected_nh, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weight_gh.grad, h_ng.T @ upstream_nh.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bias_h.grad, upstream_nh.sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x.library_n, x_ng.sum(1))


@given(rows=st.lists(st.integers(0, 19), max_size=30))
@settings(max_examples=20, deadline=None)
def test_rows_taken_are_those_of_the_dense_counts(rows):
    x_ng, rows = draw_counts(20, 15, 0), torch.tensor(rows, dtype=torch.int64)
    taken = take_rows(sparse(x_ng), rows)
    np.testing.assert_array_equal(dense(taken, torch.float64), x_ng[rows.numpy()].reshape(-1, 15))
    again = sparse(x_ng[rows.numpy()].reshape(-1, 15))
    assert all(torch.equal(a, b) for a, b in zip(taken, again, strict=True) if isinstance(a, torch.Tensor))


def test_cells_without_any_count():
    torch.manual_seed(0)
    check(model("zinb", "gene", 50), np.zeros((5, 50), np.int64), 0)


@given(st.floats(-100, 100, width=32))
@settings(deadline=None)  # the first call compiles
def test_exponential(x):
    expected = math.exp(min(max(x, -87.3), 88.0))
    assert arithmetic.exp(np.float32(x)) == pytest.approx(expected, rel=3e-7)


@given(st.floats(2**-120, 2**120, width=32))
@settings(deadline=None)  # the first call compiles
def test_logarithm(x):
    assert arithmetic.log(np.float32(x)) == pytest.approx(math.log(x), rel=3e-7, abs=1e-7)


@given(st.floats(0, 2**60, width=32))
@settings(deadline=None)  # the first call compiles
def test_logarithm_of_one_and_a_bit(x):
    x = np.float32(x)
    found = arithmetic.log1p(x, np.float32(1) / (np.float32(1) + x))
    assert found == pytest.approx(math.log1p(x), rel=4e-7, abs=1e-38)


@given(st.floats(0, 80, width=32))
@settings(deadline=None)  # the first call compiles
def test_one_minus_an_exponential(t):
    found = arithmetic.decayed(np.float32(t), np.float32(math.exp(-t)))
    assert found == pytest.approx(-math.expm1(-t), rel=1e-6)


@given(st.integers(1, int(arithmetic.FEW)), st.floats(-20, 20), st.floats(1e-30, 1))
@settings(deadline=None)  # the first call compiles
def test_factors_of_few_counts(x, log_theta, p):
    theta = math.exp(log_theta)
    with mpmath.workdps(40):
        exact = mpmath.rf(mpmath.mpf(theta), x) / mpmath.factorial(x) * mpmath.mpf(p) ** x
        slope = theta * (mpmath.digamma(x + mpmath.mpf(theta)) - mpmath.digamma(theta))
    factor, found = arithmetic.few(float(x), theta, p)
    assert found == pytest.approx(float(slope), rel=1e-13)
    if arithmetic.LEAST < factor < arithmetic.MOST:  # else the head does not take it
        assert factor == pytest.approx(float(exact), rel=1e-13)
    else:
        assert not 2 * arithmetic.LEAST < exact < arithmetic.MOST / 2


@given(st.sampled_from([1, 2, 7, 8, 9, 31, 1_000, 1_001, 10**6]), st.floats(-20, 20))
@settings(deadline=None)  # the first call compiles
def test_ratios_of_gamma_functions(x, log_theta):
    theta = math.exp(log_theta)
    with mpmath.workdps(40):
        value = mpmath.loggamma(x + mpmath.mpf(theta)) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        slope = theta * (mpmath.digamma(x + mpmath.mpf(theta)) - mpmath.digamma(theta))
    found = arithmetic.rising(float(x), theta, math.log(theta))
    assert found[0] == pytest.approx(float(value), rel=1e-9, abs=1e-6)
    assert found[1] == pytest.approx(float(slope), rel=1e-7)


@given(st.integers(0, 3_000), st.integers(0, 1_000))
@settings(max_examples=20, deadline=None)
def test_sums_of_logarithms_of_any_number_of_numbers(n, seed):
    values = np.exp(np.random.default_rng(seed).uniform(-230, 230, n))
    assert arithmetic.sum_of_logs(values) == pytest.approx(math.fsum(map(math.log, values)), rel=1e-12, abs=1e-9)


def test_loops_on_disk_are_compiled_anew_when_their_arithmetic_changes():
    found = hashlib.sha256(Path(arithmetic.__file__).read_bytes()).hexdigest()[:12]
    assert found == heads.ARITHMETIC, f"heads.py: ARITHMETIC is {heads.ARITHMETIC}; expected {found}, of arithmetic.py"
