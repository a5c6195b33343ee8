"""Every pair of the model's settings together: gradients, the compiled loops, weights that are restored, densities."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from test_fused import draw_counts, sparse
from torch import Tensor, distributions

from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import elbo, iwelbo
from cohortvi.inference.posteriors import Coupling, DiagonalGaussian, Flow, FullGaussian
from cohortvi.inference.priors import GaussianMixture, VampPrior
from cohortvi.inference.vae import CHOICES, VAE

N_GENES, N_BATCHES, N_CATEGORIES, N_LABELS = 40, 3, 4, 5
OPTIONS = CHOICES | {"encode_covariates": (False, True), "n_layers": (1, 2), "n_labels": (0, N_LABELS)}
APART = [  # what does not go together
    *({("n_labels", N_LABELS), ("prior", prior)} for prior in CHOICES["prior"] if prior != "mixture"),
    *({("dispersion", "gene-label"), ("prior", prior)} for prior in CHOICES["prior"] if prior != "mixture"),
    {("dispersion", "gene-label"), ("n_labels", 0)},
]


def pairwise(options: dict[str, tuple]) -> list[dict]:
    """Return settings among which every two values of two options stand together at least once."""
    draws, names = random.Random(0), list(options)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(options[a], options[b])
        if {(a, x), (b, y)} not in APART
    }
    rows = []
    while missing:
        tried = [{name: draws.choice(options[name]) for name in names} for _ in range(400)]
        tried = [row for row in tried if not any(pair <= set(row.items()) for pair in APART)]
        best = max(tried, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        rows.append(best)
    return rows


def _pairs(row: dict) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


ROWS = pairwise(OPTIONS)
NAMES = ["-".join(str(value) for value in row.values()) for row in ROWS]


def build(row: dict, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    shape = {"n_latent": 3, "n_hidden": 12, "dropout": 0.0, "n_components": 4, "n_embedding": 2}
    vae = VAE(N_GENES, N_BATCHES, n_categories=(N_CATEGORIES,), n_continuous=1, **shape, **row)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():  # nothing at zero, no hidden unit on the kink of ReLU
            if "norm.bias" in name or not parameter.any():
                parameter.normal_(std=0.3)
        if isinstance(vae.prior, VampPrior):
            vae.prior.begin(torch.from_numpy(draw_counts(4, N_GENES, 1)).float(), covariates(4, 1, vae.n_labels))
        if vae.library == "latent":
            vae.library_loc_b.fill_(3.0)
            vae.library_scale_b.fill_(0.5)
    return vae


def covariates(n_obs: int, seed: int, n_labels: int = 0) -> Covariates:
    """Return random covariates, and labels if there are any, of which some cells have none."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randint(n, (n_obs,), generator=generator) for n in (N_BATCHES, N_CATEGORIES))
    batch_n, category_n = codes
    continuous_nc = torch.randn(n_obs, 1, generator=generator)
    label_n = torch.randint(-1, n_labels, (n_obs,), generator=generator) if n_labels else None
    return Covariates(batch_n, (category_n,), continuous_nc, label_n)


def double(known: Covariates) -> Covariates:
    return known._replace(continuous_nc=known.continuous_nc.double())


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_gradients_equal_finite_differences(row):
    vae, x_ng = build(row).double(), torch.from_numpy(draw_counts(12, N_GENES, 2)).double()
    known = double(covariates(12, 2, vae.n_labels))
    noise_nk = torch.randn(12, vae.n_dimensions, dtype=torch.float64)

    def loss() -> Tensor:
        bound = elbo(vae, x_ng, known, noise_nk, kl_weight=0.7, label_weight=3.0).loss
        return bound + 0.3 * vae.prior_divergence(noise_nk[:3])

    for module in vae.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0  # a VampPrior's pseudo-inputs see the running statistics, which are no function here
    loss().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            steps = []
            for sign in (1, -2):
                parameter.add_(direction, alpha=sign * 1e-6)
                steps.append(float(loss()))
            parameter.add_(direction, alpha=1e-6)
        slope = (steps[0] - steps[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=3e-7), name


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_sparse_counts_in_single_precision_equal_dense_ones_in_double(row):
    x_ng, results = draw_counts(64, N_GENES, 3), []
    for dtype in (torch.float32, torch.float64):
        vae = build(row).to(dtype)
        noise_nk = torch.randn(64, vae.n_dimensions, generator=torch.Generator().manual_seed(4)).to(dtype)
        x = sparse(x_ng) if dtype == torch.float32 else torch.from_numpy(x_ng).double()
        known = covariates(64, 3, vae.n_labels)
        told = known if dtype == torch.float32 else double(known)
        loss = elbo(vae, x, told, noise_nk, kl_weight=0.7, label_weight=3.0).loss
        loss.backward()
        results.append(
            (float(loss.detach()), {name: parameter.grad.double() for name, parameter in vae.named_parameters()})
        )
    (found, gradients), (expected, exact) = results
    assert found == pytest.approx(expected, rel=1e-6)
    whole = math.sqrt(sum(float(value.norm()) ** 2 for value in exact.values()))
    for name, value in exact.items():
        assert float((gradients[name] - value).norm()) < 1e-5 * float(value.norm()) + 1e-5 * whole, name


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_settings_and_weights_restore_the_model(row):
    vae, x_ng = build(row).eval(), torch.from_numpy(draw_counts(9, N_GENES, 5)).float()
    known = covariates(9, 5, vae.n_labels)
    again = VAE(**json.loads(json.dumps(vae.settings)))
    again.load_state_dict(vae.state_dict())
    noise_nk = torch.randn(9, vae.n_dimensions)
    terms = [elbo(model.eval(), x_ng, known, noise_nk, kl_weight=1.0) for model in (vae, again)]
    assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))


def mean_gradients(vae: VAE, bound, n: int) -> tuple[Tensor, Tensor]:
    """Return the mean and its standard error of the gradients of `bound(noise)` over n draws of noise."""
    rows = []
    for seed in range(n):
        noise_snk = torch.randn(
            5, 8, vae.n_dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        vae.zero_grad()
        bound(noise_snk).backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in vae.parameters()]))
    rows = torch.stack(rows)
    return rows.mean(0), rows.std(0) / math.sqrt(n)


@pytest.mark.parametrize("labels", [{}, {"n_labels": N_LABELS, "prior": "mixture"}], ids=["", "labelled"])
@pytest.mark.parametrize("posterior", ["diagonal", "full", "flow"])
def test_gradients_of_the_importance_weighted_bound_are_unbiased_and_quieter(posterior, labels):
    row = {name: values[0] for name, values in OPTIONS.items()} | {"posterior": posterior, "norm": "none"} | labels
    vae, x_ng = build(row).double(), torch.from_numpy(draw_counts(8, N_GENES, 6)).double()
    known = double(covariates(8, 6, vae.n_labels))

    def plain(noise_snk: Tensor) -> Tensor:
        qz = vae.encode(x_ng, known)
        weights = []
        for noise_nk in noise_snk:
            z_nk, log_q_n = qz.draw(noise_nk)
            log_p_n = vae.log_prior(z_nk, known.label_n) - vae.reconstruction(x_ng, z_nk, known)
            if labels:
                log_p_n = log_p_n - 2.0 * vae.label_loss(z_nk, known.label_n)
            weights.append(log_p_n - log_q_n)
        return -(torch.stack(weights).logsumexp(0) - math.log(len(noise_snk))).mean()

    noise_snk = torch.randn(5, 8, vae.n_dimensions, dtype=torch.float64)
    found = iwelbo(vae, x_ng, known, noise_snk, kl_weight=1.0, label_weight=2.0)
    assert float(found.loss.detach()) == pytest.approx(float(plain(noise_snk).detach()), rel=1e-12)
    doubly, error = mean_gradients(
        vae, lambda noise: iwelbo(vae, x_ng, known, noise, kl_weight=1.0, label_weight=2.0).loss, 80
    )
    single, other = mean_gradients(vae, plain, 80)
    away = (doubly - single).abs() / (error**2 + other**2).sqrt().clamp(min=1e-9)
    assert float((away < 4).double().mean()) > 0.995
    if posterior != "flow":  # one that is far from the true posterior
        of_encoder = torch.cat([torch.full((p.numel(),), "encoder" in name) for name, p in vae.named_parameters()])
        assert float(error[of_encoder].norm()) < float(other[of_encoder].norm())


@pytest.mark.parametrize("row", [{}, {"posterior": "flow"}, {"prior": "vamp"}], ids=str)
def test_with_batch_norm_the_importance_weighted_bound_has_plain_gradients(row):
    # z of a cell reaches the weights of others: of these, doubly reparametrised gradients have a wrong expectation.
    options = {name: values[0] for name, values in OPTIONS.items()} | row
    assert options["norm"] == "batch"
    vae, x_ng = build(options).double(), torch.from_numpy(draw_counts(8, N_GENES, 6)).double()
    known, noise_snk = double(covariates(8, 6)), torch.randn(5, 8, vae.n_dimensions, dtype=torch.float64)
    for layer in vae.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.momentum = 0.0  # or the second bound would see other running statistics (VampPrior)
    qz, weights = vae.encode(x_ng, known), []
    for noise_nk in noise_snk:
        z_nk, log_q_n = qz.draw(noise_nk)
        weights.append(vae.log_prior(z_nk) - vae.reconstruction(x_ng, z_nk, known) - log_q_n)
    loss = -(torch.stack(weights).logsumexp(0) - math.log(len(noise_snk))).mean()
    parameters = dict(vae.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()))
    found = torch.autograd.grad(iwelbo(vae, x_ng, known, noise_snk, kl_weight=1.0).loss, list(parameters.values()))
    for name, gradient, exact in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12, msg=name)


def full_gaussian(n_obs: int, k: int, seed: int) -> FullGaussian:
    generator = torch.Generator().manual_seed(seed)
    loc_nk, raw_nkk = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n_obs, k), (n_obs, k, k))
    )
    return FullGaussian(loc_nk, raw_nkk.tril(-1) + torch.diag_embed(raw_nkk.diagonal(dim1=-2, dim2=-1).exp()))


def test_a_full_gaussian_is_that_of_torch():
    qz, z_nk = full_gaussian(6, 4, 0), torch.randn(6, 4, dtype=torch.float64)
    reference = distributions.MultivariateNormal(qz.loc_nk, scale_tril=qz.tril_nkk)
    torch.testing.assert_close(qz.log_prob(z_nk), reference.log_prob(z_nk))
    standard = distributions.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    torch.testing.assert_close(qz.kl_to_standard_normal(), distributions.kl_divergence(reference, standard))
    torch.testing.assert_close(qz.moments(torch.empty(0))[1], reference.stddev)


def flow(k: int) -> Flow:
    torch.manual_seed(1)
    layers = torch.nn.ModuleList(Coupling(k, 6, first=at % 2 == 0) for at in range(4)).double()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    base = DiagonalGaussian(torch.randn(5, k, dtype=torch.float64), torch.rand(5, k, dtype=torch.float64) + 0.5)
    return Flow(base, layers)


def test_the_density_of_a_flow_is_that_of_its_draws_and_integrates_to_one():
    qz = flow(2)
    z_snk, log_q_sn = qz.draw(torch.randn(50, 5, 2, dtype=torch.float64))
    torch.testing.assert_close(qz.log_prob(z_snk), log_q_sn)
    torch.testing.assert_close(qz.stopped_log_prob(z_snk), log_q_sn)
    line = torch.linspace(-20, 20, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)[:, None].expand(-1, 5, -1)
    mass_n = qz.log_prob(grid).exp().sum(0) * float(line[1] - line[0]) ** 2
    np.testing.assert_allclose(mass_n.detach(), 1, atol=1e-3)
    mean_nk, std_nk = qz.moments(torch.randn(40_000, 5, 2, dtype=torch.float64))
    weights = qz.log_prob(grid).exp() * float(line[1] - line[0]) ** 2
    expected_nk = (weights[..., None] * grid).sum(0)
    np.testing.assert_allclose(mean_nk.detach(), expected_nk.detach(), atol=0.05)
    variance_nk = (weights[..., None] * (grid - expected_nk) ** 2).sum(0)
    np.testing.assert_allclose(std_nk.detach(), variance_nk.sqrt().detach(), rtol=0.05)


def test_gradients_of_a_stopped_density_pass_through_z_alone():
    qz = flow(3)
    z_nk = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    qz.stopped_log_prob(z_nk).sum().backward()
    assert z_nk.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in qz.layers.parameters())


def test_mixtures_equal_those_of_torch():
    torch.manual_seed(0)
    prior = GaussianMixture(4, 3).double()
    with torch.no_grad():
        prior.log_scale_ck.normal_()
        prior.logits_c.normal_()
    parts = distributions.Independent(distributions.Normal(prior.loc_ck, prior.log_scale_ck.exp()), 1)
    reference = distributions.MixtureSameFamily(distributions.Categorical(logits=prior.logits_c), parts)
    z_snk = torch.randn(7, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(prior.log_prob(z_snk), reference.log_prob(z_snk))


@pytest.mark.parametrize("posterior", ["diagonal", "full", "flow"])
def test_a_vamp_prior_is_the_mixture_of_its_pseudo_inputs_posteriors(posterior):
    row = {name: values[0] for name, values in OPTIONS.items()} | {"prior": "vamp", "posterior": posterior}
    vae = build(row).eval()
    z_nk, qz = (
        torch.randn(6, 3),
        vae.encode(torch.from_numpy(draw_counts(4, N_GENES, 1)).float(), covariates(4, 1, vae.n_labels)),
    )
    parts = torch.stack([qz.log_prob(z.expand(4, 3)) for z in z_nk])
    expected_n = (parts + vae.prior.logits_c.log_softmax(0)).logsumexp(1)
    torch.testing.assert_close(vae.log_prior(z_nk), expected_n, atol=1e-4, rtol=1e-4)
    before = {name: value.clone() for name, value in vae.named_buffers()}
    vae.train().log_prior(z_nk)
    assert all(torch.equal(value, before[name]) for name, value in vae.named_buffers())


@pytest.mark.parametrize(
    ("prior", "posterior"), [("mixture", "diagonal"), *(("vamp", posterior) for posterior in CHOICES["posterior"])]
)
def test_the_divergence_of_a_prior_is_its_components_mean_and_no_less_than_its_own(prior, posterior):
    row = {name: values[0] for name, values in OPTIONS.items()} | {"prior": prior, "posterior": posterior}
    vae, noise_sck = build(row).eval(), torch.randn(20_000, 4, 3)
    standard = distributions.Independent(distributions.Normal(torch.zeros(3), 1.0), 1)
    with torch.no_grad():
        vae.prior.logits_c.normal_()
        if prior == "vamp":
            qz = vae.encode(torch.from_numpy(draw_counts(4, N_GENES, 1)).float(), covariates(4, 1))
            z_sck, log_q_sc = qz.draw(noise_sck)
        else:
            qz = distributions.Normal(vae.prior.loc_ck, vae.prior.log_scale_ck.exp())
            z_sck = qz.loc + qz.scale * noise_sck
            log_q_sc = qz.log_prob(z_sck).sum(-1)
        draws_s = (log_q_sc - standard.log_prob(z_sck)) @ vae.prior.logits_c.softmax(0)
        found = torch.stack([vae.prior_divergence(noise_ck) for noise_ck in torch.randn(1000, 4, 3)])
        assert (found.std() > 1e-3) == (posterior == "flow")  # else it is exact
        assert float(found.mean()) == pytest.approx(float(draws_s.mean()), abs=5 * float(draws_s.std()) / 1000**0.5)
        z_nk = vae.sample_prior(20_000)
        own_n = vae.log_prior(z_nk) - standard.log_prob(z_nk)
        assert own_n.mean() - 4 * own_n.std() / len(own_n) ** 0.5 <= draws_s.mean()


def test_a_linear_decoder_is_linear_and_its_first_weights_are_loadings():
    vae = build({name: values[0] for name, values in OPTIONS.items()} | {"decoder": "linear"}).eval()
    known = covariates(2, 0, vae.n_labels)
    z_nk = torch.randn(2, 3)
    logits = vae.decoder.px_scale(vae.decoder.features(z_nk, vae.told_decoder(known)))
    moved = vae.decoder.px_scale(vae.decoder.features(z_nk + torch.eye(3)[:1], vae.told_decoder(known)))
    torch.testing.assert_close(moved - logits, vae.decoder.px_scale.weight[:, 0].expand(2, -1), atol=1e-5, rtol=1e-4)


def test_a_latent_library_is_a_dimension_of_its_own():
    vae = build(
        {name: values[0] for name, values in OPTIONS.items()} | {"library": "latent", "likelihood": "poisson"}
    ).eval()
    x_ng, known, z_nk = torch.ones(5, N_GENES), covariates(5, 0, vae.n_labels), torch.randn(5, 4)
    rate_ng = vae.decode(z_nk, (3.0 + 0.5 * z_nk[:, 3:]).exp(), known).log_px_rate_ng
    expected_n = -distributions.Poisson(rate_ng.exp()).log_prob(x_ng).sum(1)
    torch.testing.assert_close(vae.reconstruction(x_ng, z_nk, known), expected_n)
