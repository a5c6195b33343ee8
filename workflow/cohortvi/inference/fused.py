"""The loops of first_layer.py and heads.py as functions that torch differentiates: sparse counts, float32, on CPUs.

Each equals plain torch on the dense counts (networks.py, likelihoods.py): tests/test_fused.py holds losses to 1e-6 and
gradients to 1e-5. On GPUs the kernels of gpu.py take the place of the head's loop (tests/test_gpu.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from cohortvi.inference import first_layer
from cohortvi.inference import heads as compiled
from cohortvi.inference.products import product
from cohortvi.inference.sparse import DeviceCounts, SparseCounts, share_threads

FIRST_HEAD = 6  # argument of Head


class CountsProduct(Function):
    """log1p of sparse counts (n, g) times a matrix (g, h), plus a bias (h,)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: SparseCounts, weight_gh: Tensor, bias_h: Tensor) -> Tensor:
        """Return (n, h)."""
        out_nh = torch.empty(len(x.indptr) - 1, weight_gh.shape[1])
        share_threads()
        first_layer.spmm(*_arrays(x.indptr, x.indices, x.log1p, weight_gh, bias_h, out_nh))
        ctx.sparse, ctx.shape = (x.indptr, x.indices, x.log1p), weight_gh.shape
        return out_nh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_nh: Tensor) -> tuple[None, Tensor, Tensor]:
        """Return the gradients of weight and bias."""
        dweight_gh = torch.zeros(ctx.shape)
        first_layer.spmm_backward(*_arrays(*ctx.sparse, dout_nh.contiguous(), dweight_gh), share_threads())
        return None, dweight_gh, dout_nh.sum(0)


class Head(Function):
    """Minus the log-likelihood (n,) of sparse counts or a GPU's, out of the decoder's last hidden layer (n, h).

    One function from the hidden layer to the likelihood: the block of (n, g) logits is made once, and turned into its
    gradient where it lies. On a GPU its products are in the type of log1p of the counts.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: SparseCounts | DeviceCounts,
        is_trained: bool,
        rows_n: Tensor | None,
        h_nh: Tensor,
        log_library_n: Tensor,
        log_theta: Tensor | None,
        *heads: Tensor,
    ) -> Tensor:
        """`heads`: weight (g, h) and bias (g,) of px_scale, and those of zi_logits for a ZINB.

        log_theta (r, g), of which cell n has row rows_n[n]; None for a Poisson. `is_trained`: gradients are made.
        """
        given = (h_nh, log_library_n, log_theta, *heads)
        nll_n, *grads = _head(x, rows_n, given, h_nh.new_ones(len(h_nh)), is_trained=is_trained)
        ctx.x, ctx.rows_n = x, rows_n
        ctx.save_for_backward(*given)
        ctx.grads = grads
        return nll_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_n: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients. Those at hand are of the cells' sum; cells of unequal weight are gone through anew."""
        given = ctx.saved_tensors
        h_nh, _, _, *heads = given
        scale, logits, (dlibrary_n, dtheta) = dnll_n[0], *ctx.grads
        if not _is_even(dnll_n):
            _, logits, (dlibrary_n, dtheta) = _head(ctx.x, ctx.rows_n, given, dnll_n.contiguous(), is_trained=True)
            scale = dnll_n.new_ones(())
        dtype = logits[0].dtype
        parts, dheads = [], []
        scaled_nh = (h_nh * scale).to(dtype)
        for k, (dlogits_ng, weight_gh) in enumerate(zip(logits, heads[::2], strict=True)):
            is_fixed = not ctx.needs_input_grad[FIRST_HEAD + 2 * k]
            if is_fixed:
                dheads += [None, None]
            else:
                dweight_hg = product(scaled_nh.T, dlogits_ng)  # so, and not transposed: logits stay where they lie
                dheads += [dweight_hg.float().T, dlogits_ng.sum(0, dtype=torch.float32) * scale]
            parts.append(product(dlogits_ng, weight_gh.to(dtype)))
        dtheta = None if dtheta is None else dtheta.sum(0) * scale
        return None, None, None, sum(parts).float() * scale, dlibrary_n * scale, dtheta, *dheads


def _is_even(dnll_n: Tensor) -> bool:
    """Whether all cells have one weight; on a GPU, where to look is to wait, whether they have it of a sum or mean."""
    return dnll_n.stride(0) == 0 if dnll_n.is_cuda else torch.equal(dnll_n, dnll_n[0].expand_as(dnll_n))


def _head(
    x: SparseCounts | DeviceCounts,
    rows_n: Tensor | None,
    given: tuple[Tensor | None, ...],
    weights_n: Tensor,
    *,
    is_trained: bool,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor | None]]:
    """Return nll (n,), the gradients of the logits, and those of log_library and log_theta (parts, r, g)."""
    h_nh, log_library_n, log_theta, *heads = given
    if isinstance(x, DeviceCounts):
        return _gpu_head(x, rows_n, given, weights_n, is_trained=is_trained)
    logits = [product(h_nh, weight_gh.T, bias_g) for weight_gh, bias_g in zip(heads[::2], heads[1::2], strict=True)]
    nll_n, dlibrary_n, dtheta = torch.empty(len(h_nh)), torch.empty(len(h_nh)), None
    csr, cells = _arrays(x.indptr, x.indices, x.data), _arrays(log_library_n, weights_n)
    out, threads = _arrays(nll_n, dlibrary_n), share_threads()
    if log_theta is None:
        compiled.poisson_head(*_arrays(*logits), csr, cells, out, threads, is_trained)
    else:
        dtheta = torch.zeros(threads, *log_theta.shape)
        px_scale, zi_logits = (*_arrays(*logits), None)[:2]
        compiled.nb_head(px_scale, zi_logits, csr, cells, out, _arrays(log_theta, rows_n, dtheta), is_trained)
    return nll_n, logits, (dlibrary_n, dtheta)


def _gpu_head(
    x: DeviceCounts, rows_n: Tensor, given: tuple[Tensor | None, ...], weights_n: Tensor, *, is_trained: bool
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor | None]]:
    from cohortvi.inference import gpu  # Triton is where GPUs are

    h_nh, log_library_n, log_theta, *heads = (part if part is None else part.detach() for part in given)
    pairs, dtype = zip(heads[::2], heads[1::2], strict=True), x.log1p_ng.dtype
    logits = [torch.addmm(bias_g.to(dtype), h_nh.to(dtype), weight_gh.to(dtype).T) for weight_gh, bias_g in pairs]
    cells = (log_library_n.contiguous(), log_theta, weights_n)
    nll_n, dlibrary_n, dtheta = gpu.head(x, rows_n, logits, *cells, is_trained=is_trained)
    return nll_n, logits, (dlibrary_n, dtheta)


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple((tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors)
