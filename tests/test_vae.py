"""The model equals scvi-tools 1.4.2 at equal weights; its shapes and its promises hold."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cohortvi.inference.networks import Covariates, observed_library
from cohortvi.inference.objective import Elbo, elbo
from cohortvi.inference.schedule import kl_weight
from cohortvi.inference.vae import VAE

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("scvi-*.npz"))


def load_weight_names():
    spec = importlib.util.spec_from_file_location("scvi_weights", HERE.parent / "benchmarks" / "scvi_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scvi_weights = load_weight_names()


class Golden:
    """One file of tests/golden/make_scvi_golden.py, and our model with its weights."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64):
        self.arrays = dict(np.load(path))
        self.vae = VAE(**json.loads(str(self.arrays["settings"]))).to(dtype)
        weights = {name: torch.from_numpy(value) for name, value in self.under("weight/").items()}
        ours = scvi_weights.from_scvi_state(self.vae, weights | self.counters())
        self.vae.load_state_dict({name: value.to(dtype) for name, value in ours.items()})
        self.dtype = dtype

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): value for k, value in self.arrays.items() if k.startswith(prefix)}

    def counters(self) -> dict[str, torch.Tensor]:
        names = json.loads(str(self.arrays["scvi_names"]))
        return {name: torch.tensor(0) for name in names if name.endswith("num_batches_tracked")}

    def covariates(self) -> Covariates:
        get = {name: torch.from_numpy(self.arrays[name]) for name in ("batch", "category", "continuous")}
        return Covariates(get["batch"], (get["category"],), get["continuous"][:, None].to(self.dtype))

    def elbo(self) -> Elbo:
        x_ng, noise_nk = (torch.from_numpy(self.arrays[name]).to(self.dtype) for name in ("x", "noise"))
        return elbo(self.vae, x_ng, self.covariates(), noise_nk, kl_weight=float(self.arrays["kl_weight"]))


def small_vae(**changes) -> VAE:
    settings = {"n_latent": 3, "n_hidden": 8, "n_layers": 1, "dropout": 0.1, "likelihood": "nb", "dispersion": "gene"}
    torch.manual_seed(0)
    return VAE(20, 2, **settings | {"encode_covariates": False} | changes)


def counts(n_obs: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).poisson(1.0, (n_obs, 20))).float()


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """Relative L2 error; parameters whose gradient is zero (biases before batch norm) are measured against `floor`."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=floor))


def test_there_is_a_golden_file_for_every_likelihood_and_dispersion():
    expected = {"scvi-nb-gene", "scvi-nb-gene-batch", "scvi-zinb-gene", "scvi-zinb-gene-batch", "scvi-poisson"}
    assert {path.stem for path in GOLDEN} == expected


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_elbo_terms_equal_scvi_tools(path, dtype, tolerance, training):
    golden = Golden(path, dtype)
    golden.vae.train(training)
    found, prefix = golden.elbo(), "" if training else "eval_"
    for name, value in (("loss", found.loss), ("reconstruction", found.reconstruction_n), ("kl", found.kl_n)):
        np.testing.assert_allclose(value.detach().numpy(), golden.arrays[prefix + name], rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_gradients_equal_scvi_tools(path, dtype, tolerance):
    golden = Golden(path, dtype)
    golden.elbo().loss.backward()
    buffers = {scvi_weights.scvi_name(name): value for name, value in golden.vae.named_buffers()}
    expected = scvi_weights.from_scvi_state(golden.vae, buffers | golden.under("grad/"))
    whole = float(torch.cat([expected[name].flatten() for name, _ in golden.vae.named_parameters()]).norm())
    for name, parameter in golden.vae.named_parameters():
        assert relative_error(parameter.grad, expected[name], floor=1e-3 * whole) < tolerance, name
        if dtype == torch.float64:
            assert relative_error(parameter.grad, expected[name], floor=1e-8) < tolerance, name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_running_batch_statistics_equal_scvi_tools(path):
    golden = Golden(path)
    golden.elbo()
    found = scvi_weights.to_scvi_state(golden.vae)
    for name, value in golden.under("after/").items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-10)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_for_scvi_tools_are_all_that_its_loss_uses(path):
    golden = Golden(path)
    theirs = set(json.loads(str(golden.arrays["scvi_names"])))
    found = scvi_weights.to_scvi_state(golden.vae)
    unused = ("l_encoder.", "decoder.px_r_decoder.")
    if golden.vae.likelihood != "zinb":
        unused += ("decoder.px_dropout_decoder.",)
    if golden.vae.likelihood == "poisson":
        unused += ("px_r",)
    assert set(found) <= theirs
    assert {name for name in theirs if not name.startswith(unused)} == set(found)
    for name, value in golden.under("weight/").items():
        if name in found:
            np.testing.assert_array_equal(found[name].numpy(), value)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_expected_counts_of_a_cell_add_up_to_its_library(likelihood):
    vae = small_vae(likelihood=likelihood).eval()
    library_n1 = torch.tensor([[10.0], [2000.0]])
    px = vae.decode(torch.randn(2, 3), library_n1, Covariates(torch.tensor([0, 1])))
    torch.testing.assert_close(px.log_px_rate_ng.exp().sum(1, keepdim=True), library_n1)


def test_a_cell_without_counts_has_a_finite_loss_and_gradient():
    vae = small_vae(likelihood="zinb")
    x_ng = counts(5)
    x_ng[2] = 0
    found = elbo(vae, x_ng, Covariates(torch.zeros(5, dtype=torch.int64)), torch.randn(5, 3), kl_weight=1.0)
    found.loss.backward()
    assert observed_library(x_ng)[2] == 1
    assert torch.isfinite(found.reconstruction_n).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in vae.parameters())


def test_the_posterior_depends_on_the_batch_only_if_covariates_are_encoded():
    for encode_covariates in (False, True):
        vae = small_vae(encode_covariates=encode_covariates).eval()
        locs = [vae.encode(counts(4), Covariates(torch.full((4,), batch))).loc_nk for batch in (0, 1)]
        assert torch.equal(*locs) is not encode_covariates


def test_the_likelihood_depends_on_every_covariate():
    vae = small_vae(n_categories=(3,), n_continuous=1, dispersion="gene-batch").eval()
    z_nk, library_n1, zero, one = torch.randn(2, 3), torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), torch.ones(2)

    def mean(batch, category, continuous):
        covariates = Covariates(batch, (category,), continuous[:, None])
        return vae.decode(z_nk, library_n1, covariates).log_px_rate_ng

    base = mean(zero, zero, one)
    for changed in (mean(zero + 1, zero, one), mean(zero, zero + 2, one), mean(zero, zero, 2 * one)):
        assert not torch.allclose(base, changed)


def test_each_batch_has_its_own_dispersion_with_gene_batch():
    vae = small_vae(dispersion="gene-batch")
    batch_n = torch.tensor([1, 0, 1])
    px = vae.decode(torch.randn(3, 3), torch.ones(3, 1), Covariates(batch_n))
    assert torch.equal(px.log_theta, vae.log_theta[batch_n])


def test_a_covariate_with_one_category_adds_no_weights():
    assert small_vae(n_categories=(1,)).state_dict().keys() == small_vae().state_dict().keys()
    alone = VAE(**small_vae().settings | {"n_batches": 1, "n_categories": (1,)})
    assert alone.decoder.hidden.layers[0].others.weight_oh is None


def test_only_zinb_has_a_zero_inflation_head_and_poisson_no_dispersion():
    assert not any("zi_logits" in name for name in small_vae().state_dict())
    assert any("zi_logits" in name for name in small_vae(likelihood="zinb").state_dict())
    assert "log_theta" not in small_vae(likelihood="poisson").state_dict()


def test_settings_rebuild_a_model_of_the_same_shapes():
    vae = small_vae(n_layers=2, n_categories=(3, 2), n_continuous=1, likelihood="zinb", encode_covariates=True)
    again = VAE(**json.loads(json.dumps(vae.settings)))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (vae, again)]
    assert shapes[0] == shapes[1]


def test_an_unknown_likelihood_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="likelihood: found 'gamma'; expected one of nb, zinb, poisson"):
        small_vae(likelihood="gamma")


@given(planned=st.integers(1, 10_000), warmup=st.floats(0, 1))
def test_kl_weight_climbs_to_exactly_one_in_any_planned_run(planned, warmup):
    weights = [kl_weight(step, planned, warmup) for step in sorted({0, planned // 3, planned // 2, planned - 1})]
    assert weights == sorted(weights)
    assert weights[0] > 0
    assert weights[-1] == 1.0
    assert kl_weight(round(warmup * planned), planned, warmup) == 1.0


def test_kl_weight_is_linear_in_steps():
    assert [kl_weight(step, 8, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
