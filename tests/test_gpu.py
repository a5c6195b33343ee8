"""The kernels for GPUs equal plain torch in float64: on a GPU where there is one, else in Triton's interpreter."""

import math
import os

import numpy as np
import pytest
import torch
from test_fused import GRADIENT, LOSS, draw_counts, model, plain_head, terms

from cohortvi.inference.fused import Head
from cohortvi.inference.likelihoods import nb_log_prob, zinb_log_prob
from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import DeviceCounts, dense, take_rows

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # is looked at when Triton is imported, here for the first time
pytest.importorskip("triton", reason="needs Triton, which is for Linux")
from cohortvi.inference import gpu  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
# NumPy, which the interpreter uses, tells of lanes that are computed and not used.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
LIKELIHOODS = ("nb", "zinb", "poisson")


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


CASES = [  # cells, genes, rows of theta, log theta, largest count
    (1, 1, 1, 0.0, 0),
    (5, 7, 1, 0.0, 33),
    (33, 130, 1, -4.0, 999),
    (40, 200, 1, 12.0, 100_000),
    (9, 65, 1, -12.0, 100_000),
    (12, 300, 1, 4.0, 70_000),
    (4, 2_500, 1, 0.0, 300),
    (40, 64, 3, 1.0, 300),
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
    x_ng, parts = draw_counts(n_obs, n_genes, n_obs, largest), given_parts(likelihood, n_obs, n_genes, n_rows, log_theta)
    rows_n, weights_n = torch.randint(n_rows, (n_obs,)), torch.rand(n_obs) if weighted else None
    found = run_head(on_gpu(x_ng), rows_n, parts, weights_n)
    expected = exact_head(x_ng, likelihood, rows_n, parts, weights_n)
    # Of terms as large as counts and means (up to e^3), whose differences these are, times 16 hidden units of about 1.
    rounding = 4e-7 * (20 + x_ng.sum(1).max())
    for name, value in expected.items():
        tolerance = (LOSS if name == "nll" else GRADIENT) * float(value.norm()) + rounding * math.sqrt(n_obs)
        assert float((found[name].double() - value).norm()) <= tolerance, name
