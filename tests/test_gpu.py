"""The kernels for GPUs equal plain torch in float64: on a GPU where there is one, else in Triton's interpreter."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext

import mpmath
import numpy as np
import pytest
import torch
from test_fused import GRADIENT, LOSS, draw_counts, model, plain_head, terms
from test_models import N_GENES, NAMES, ROWS, build, covariates, double
from torch.utils._python_dispatch import TorchDispatchMode

from cohortvi.inference import fused
from cohortvi.inference.device import set_precision
from cohortvi.inference.fused import Head
from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import elbo
from cohortvi.inference.sparse import DeviceCounts, dense, take_rows

HAS_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux")
import triton.language as tl  # noqa: E402

from cohortvi.inference import gpu  # noqa: E402
from cohortvi.inference.gpu_kernels import _rising  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# NumPy, which the interpreter uses, tells of lanes that are computed and not used.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
PRECISIONS = {"tf32": (1e-4, 2e-3), "bf16": (1e-3, 2e-2)}  # relative errors of the loss, of all gradients together
LIKELIHOODS = ("nb", "zinb", "poisson")


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_float32_matmul_precision("highest")  # training, of which others are tests, sets it


def on_gpu(x_ng: np.ndarray, count_type: type = np.uint32, dtype: torch.dtype = torch.float32) -> DeviceCounts:
    rows, genes = np.nonzero(x_ng)
    ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(x_ng)))])
    arrays = (ends, genes.astype(np.uint16), x_ng[rows, genes].astype(count_type))
    return gpu.densify(*(torch.from_numpy(array).to(DEVICE) for array in arrays), x_ng.shape[1], dtype)


@pytest.mark.parametrize("count_type", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize(("n_obs", "n_genes"), [(1, 1), (7, 3), (20, 130), (3, 5_000)])
def test_counts_made_dense_are_the_counts(n_obs, n_genes, count_type):
    x_ng = draw_counts(n_obs, n_genes, n_genes, largest=200)
    x = on_gpu(x_ng, count_type)
    np.testing.assert_array_equal(x.counts_ng.cpu(), x_ng)
    np.testing.assert_array_equal(dense(x, torch.float64).cpu(), x_ng)
    np.testing.assert_array_equal(x.library_n.cpu(), x_ng.sum(1))
    np.testing.assert_allclose(x.log1p_ng.cpu(), np.log1p(x_ng), rtol=5e-7)
    rows = torch.tensor([n_obs - 1, 0], device=DEVICE)
    np.testing.assert_array_equal(take_rows(x, rows).cpu(), x_ng[[n_obs - 1, 0]])
    halved = on_gpu(x_ng, count_type, torch.bfloat16)
    np.testing.assert_allclose(halved.log1p_ng.float().cpu(), np.log1p(x_ng), rtol=2**-7)  # the interpreter cuts off


def given_parts(likelihood: str, n_obs: int, n_genes: int, n_rows: int, log_theta: float) -> dict[str, torch.Tensor]:
    parts = {"h": torch.randn(n_obs, 16), "library": torch.rand(n_obs) + 2}
    if likelihood != "poisson":
        parts["theta"] = torch.randn(n_rows, n_genes) + log_theta
    for head in ("scale", "zi")[: 1 + (likelihood == "zinb")]:
        parts |= {f"{head}.weight": torch.randn(n_genes, 16) / 2, f"{head}.bias": torch.randn(n_genes)}
    return parts


def run_head(x: DeviceCounts, rows_n: torch.Tensor, parts: dict, weights_n: torch.Tensor | None) -> dict:
    """Return the losses, and the gradients of their weighted sum by name."""
    given = {name: value.to(DEVICE, copy=True).requires_grad_() for name, value in parts.items()}
    heads = [value for name, value in given.items() if "." in name]
    nll_n = Head.apply(x, True, rows_n.to(DEVICE), given["h"], given["library"], given.get("theta"), *heads)
    (nll_n.sum() if weights_n is None else (nll_n * weights_n.to(DEVICE)).sum()).backward()
    return {"nll": nll_n.detach().cpu()} | {name: value.grad.cpu() for name, value in given.items()}


def exact_head(x_ng: np.ndarray, likelihood: str, rows_n: torch.Tensor, parts: dict, weights_n) -> dict:
    """Return the same by plain torch in float64."""
    given = {name: value.double().requires_grad_() for name, value in parts.items()}
    told = given if likelihood == "poisson" else given | {"theta": given["theta"][rows_n][None]}
    nll_n = plain_head(torch.from_numpy(x_ng).double(), likelihood, told)
    (nll_n.sum() if weights_n is None else (nll_n * weights_n.double()).sum()).backward()
    return {"nll": nll_n.detach()} | {name: value.grad for name, value in given.items()}


@triton.jit
def rising_kernel(x, theta, value, slope, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    found, psi = _rising(tl.load(x + at), tl.load(theta + at))
    tl.store(value + at, found)
    tl.store(slope + at, psi)


def test_ratios_of_gamma_functions():
    counts, logs = [1, 2, 7, 8, 31, 300, 1_000, 100_000], np.linspace(-20, 20, 32)
    pairs = torch.tensor([(x, math.exp(log_theta)) for x in counts for log_theta in logs], device=DEVICE)
    x, theta = pairs.T.contiguous()
    value, slope = torch.empty_like(x), torch.empty_like(x)
    rising_kernel[(1,)](x, theta, value, slope, BLOCK=len(x))
    for at in range(len(x)):
        n, t = float(x[at]), mpmath.mpf(float(theta[at]))
        with mpmath.workdps(40):
            exact = mpmath.loggamma(n + t) - mpmath.loggamma(t) - mpmath.loggamma(n + 1)
            psi = t * (mpmath.digamma(n + t) - mpmath.digamma(t))
            size = abs(min(n, t) * mpmath.log(n + t)) + abs(mpmath.log(t)) + n  # of what is added up
        assert float(value[at]) == pytest.approx(float(exact), abs=float(5e-7 * size) + 1e-6), (n, t)
        assert float(slope[at]) == pytest.approx(float(psi), rel=2e-6), (n, t)


CASES = [  # cells, genes, rows of theta, log theta, largest count
    (1, 1, 1, 0.0, 0),
    (5, 7, 1, 0.0, 33),
    (14, 130, 1, -4.0, 999),
    (13, 200, 1, 12.0, 100_000),
    (9, 65, 1, -12.0, 100_000),
    (6, 50, 1, 16.0, 1_000),
    (6, 50, 1, -20.0, 1_000),
    (12, 300, 1, 4.0, 70_000),
    (4, 2_500, 1, 0.0, 300),
    (19, 64, 3, 1.0, 300),
    (7, 20, 9, 12.0, 1_001),
]


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("n_obs", "n_genes", "n_rows", "log_theta", "largest"), CASES)
def test_head_of_any_shape_count_and_dispersion(
    monkeypatch, n_obs, n_genes, n_rows, log_theta, largest, likelihood, weighted
):
    monkeypatch.setattr(gpu, "PROGRAMS", 6)  # several cells a program
    torch.manual_seed(n_obs)
    x_ng, parts = (
        draw_counts(n_obs, n_genes, n_obs, largest),
        given_parts(likelihood, n_obs, n_genes, n_rows, log_theta),
    )
    rows_n, weights_n = torch.randint(n_rows, (n_obs,)), torch.rand(n_obs) if weighted else None
    found = run_head(on_gpu(x_ng), rows_n, parts, weights_n)
    expected = exact_head(x_ng, likelihood, rows_n, parts, weights_n)
    # Of terms as large as counts and means (up to e^3), whose differences these are, times 16 hidden units of about 1.
    rounding = 4e-7 * (20 + x_ng.sum(1).max())
    for name, value in expected.items():
        tolerance = (LOSS if name == "nll" else GRADIENT) * float(value.norm()) + rounding * math.sqrt(n_obs)
        assert float((found[name].double() - value).norm()) <= tolerance, name


class Tf32(TorchDispatchMode):
    """Rounds the factors of products to TF32, as a GPU does: to the nearest number of 10 bits behind the first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            args = [*args[:-2], *map(self._rounded, args[-2:])]
        return func(*args, **(kwargs or {}))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def model_terms(
    likelihood: str, dispersion: str, dtype: torch.dtype, changes: dict, products=nullcontext
) -> list[tuple]:
    """Return losses and gradients of the mean over cells: by the kernels, products in this type, and in float64."""
    torch.manual_seed(1)
    x_ng, n_obs = draw_counts(64, 300, 1, largest=300), 64
    generator = torch.Generator().manual_seed(1)
    vae = model(likelihood, dispersion, 300, **changes)
    covariates = Covariates(torch.randint(3, (n_obs,), generator=generator))
    noise_nk, weights_n = torch.randn(n_obs, 4, generator=generator), torch.tensor(1 / n_obs).expand(n_obs)
    inputs = (covariates.to(DEVICE), noise_nk.to(DEVICE), weights_n.to(DEVICE))
    with products():
        found = terms(vae.to(DEVICE), on_gpu(x_ng, np.uint16, dtype), *inputs)
    exact = (torch.from_numpy(x_ng).double(), covariates, noise_nk.double(), weights_n.double())
    return [(loss_n.cpu(), {name: grad.cpu().double() for name, grad in grads.items()})
            for loss_n, grads in (found, terms(vae.double().cpu(), *exact))]  # fmt: skip


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_losses_and_gradients_of_a_model_equal_plain_torch(likelihood, dispersion):
    changes = {"n_layers": 2, "encode_covariates": True} if dispersion == "gene-batch" else {}
    (loss_n, grads), (exact_n, exact) = model_terms(likelihood, dispersion, torch.float32, changes)
    np.testing.assert_allclose(loss_n.mean(), exact_n.mean(), rtol=LOSS)
    np.testing.assert_allclose(loss_n, exact_n, rtol=10 * LOSS)
    whole = float(torch.cat([value.flatten() for value in exact.values()]).norm())
    for name, value in exact.items():  # biases before batch norm, which it takes out, have a gradient of rounding
        assert float((grads[name] - value).norm()) <= GRADIENT * float(value.norm()) + 1e-6 * whole, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_products_of_fewer_bits_are_near(likelihood, precision):
    dtype, products = torch.bfloat16 if precision == "bf16" else torch.float32, nullcontext
    if precision == "tf32" and HAS_GPU:
        set_precision(DEVICE, precision)
    elif precision == "tf32":
        products = Tf32
    (loss_n, grads), (exact_n, exact) = model_terms(likelihood, "gene", dtype, {}, products)
    bounds = PRECISIONS[precision]
    np.testing.assert_allclose(loss_n.mean(), exact_n.mean(), rtol=bounds[0])
    together, expected = (torch.cat([of[name].flatten() for name in exact]) for of in (grads, exact))
    assert float((together - expected).norm()) <= bounds[1] * float(expected.norm())


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_every_model_takes_counts_of_a_gpu(row):
    x_ng, vae = draw_counts(24, N_GENES, 3), build(row)
    known, noise_nk = covariates(24, 3, vae.n_labels), torch.randn(24, vae.n_dimensions)
    options = {"kl_weight": 0.7, "label_weight": 3.0}
    loss = elbo(vae.to(DEVICE), on_gpu(x_ng), known.to(DEVICE), noise_nk.to(DEVICE), **options).loss
    loss.backward()
    found = {name: parameter.grad.cpu().double() for name, parameter in vae.named_parameters()}
    vae = build(row).double()
    expected = elbo(vae, torch.from_numpy(x_ng).double(), double(known), noise_nk.double(), **options).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    exact = {name: parameter.grad for name, parameter in vae.named_parameters()}
    whole = math.sqrt(sum(float(value.norm()) ** 2 for value in exact.values()))
    for name, value in exact.items():
        assert float((found[name] - value).norm()) < 1e-5 * float(value.norm()) + 1e-5 * whole, name


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_gradient_of_a_mean_is_known_as_such_without_a_look(monkeypatch, likelihood):
    """As training takes it: of an even gradient the head's own is at hand, and a GPU is not waited for."""
    seen = []
    monkeypatch.setattr(fused, "_is_even", lambda dnll_n: seen.append(dnll_n.stride(0)) or True)
    torch.manual_seed(1)
    vae, noise_nk = model(likelihood, "gene", 30).to(DEVICE), torch.randn(8, 4, device=DEVICE)
    covariates = Covariates(torch.zeros(8, dtype=torch.int64, device=DEVICE))
    weight = torch.tensor(0.5, device=DEVICE)
    (elbo(vae, on_gpu(draw_counts(8, 30, 1)), covariates, noise_nk, kl_weight=weight).loss_n.sum() / 8).backward()
    assert seen == [0]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cohortvi.inference import gpu, gpu_kernels

FLAGS = {"KIND": 2, "CELLS": 4, "BLOCK": gpu.BLOCK, "IS_SORTED": True, "IS_TRAINED": True}
KERNELS = [(gpu_kernels.densify_kernel, {"BLOCK": gpu.BLOCK}), *(
    (gpu_kernels.head_kernel, FLAGS | {"KIND": kind, "IS_SORTED": kind == 2}) for kind in range(3)
)]
TYPES = {"indptr": "*i64", "ids": "*u16", "data": "*u8", "counts_ng": "*u8", "n_obs": "i32", "n_genes": "i32",
         **dict.fromkeys(("order_n", "first_p", "end_p", "row_p"), "*i64")}
for logits in ("*fp32", "*bf16"):
    for kernel, constants in KERNELS:
        types = {name: TYPES.get(name, logits if "logits" in name or "log1p" in name else "*fp32")
                 for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": gpu.WARPS})
        assert binary.asm["cubin"]
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    """For compute capability 9.0, on any machine: the interpreter takes what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
