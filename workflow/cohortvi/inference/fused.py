"""The loops of first_layer.py and heads.py as functions that torch differentiates: sparse counts, float32, on CPUs.

Each equals plain torch on the dense counts (networks.py, likelihoods.py): tests/test_fused.py holds losses to 1e-6 and
gradients to 1e-5. On GPUs the kernels of gpu.py take the place of the head's loop (tests/test_gpu.py).
"""

from collections.abc import Sequence
from functools import reduce
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
        ctx.x, ctx.n_genes = x, len(weight_gh)
        return counts_product(x, weight_gh, bias_h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_nh: Tensor) -> tuple[None, Tensor, Tensor]:
        """Return the gradients of weight and bias."""
        return None, counts_gradient(ctx.x, dout_nh.contiguous(), ctx.n_genes), dout_nh.sum(0)


def counts_product(x: SparseCounts, weight_gh: Tensor, bias_h: Tensor) -> Tensor:
    """Return log1p of the counts times weight, plus bias, (n, h)."""
    out_nh = torch.empty(len(x.indptr) - 1, weight_gh.shape[1])
    share_threads()
    first_layer.spmm(*arrays(x.indptr, x.indices, x.log1p, weight_gh, bias_h, out_nh))
    return out_nh


def counts_gradient(x: SparseCounts, dout_nh: Tensor, n_genes: int) -> Tensor:
    """Return the gradient by the weight of `counts_product`, (g, h)."""
    dweight_gh = torch.zeros(n_genes, dout_nh.shape[1])
    first_layer.spmm_backward(*arrays(x.indptr, x.indices, x.log1p, dout_nh, dweight_gh), share_threads())
    return dweight_gh


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
        nll_n, *grads = head(x, rows_n, given, h_nh.new_ones(len(h_nh)), is_trained=is_trained)
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
            _, logits, (dlibrary_n, dtheta) = head(ctx.x, ctx.rows_n, given, dnll_n.contiguous(), is_trained=True)
            scale = dnll_n.new_ones(())
        is_fixed = [not needed for needed in ctx.needs_input_grad[FIRST_HEAD::2]]
        dh_nh, dheads = head_gradients(h_nh * scale, heads[::2], logits, is_fixed)
        dheads[1::2] = [None if dbias_g is None else dbias_g * scale for dbias_g in dheads[1::2]]
        dtheta = None if dtheta is None else dtheta.sum(0) * scale
        return None, None, None, dh_nh * scale, dlibrary_n * scale, dtheta, *dheads


def head_gradients(
    h_nh: Tensor, weights: Sequence[Tensor], logits: Sequence[Tensor], is_fixed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients by the hidden layer, (n, h), and by weight (g, h) and bias (g,) of each head, one by one.

    None of a head that is fixed. `logits`: their gradients (n, g), that `head` gave.
    """
    dtype = logits[0].dtype
    parts, dheads = [], []
    for dlogits_ng, weight_gh, fixed in zip(logits, weights, is_fixed, strict=True):
        if fixed:
            dheads += [None, None]
        else:
            dweight_hg = product(h_nh.to(dtype).T, dlogits_ng)  # so, and not transposed: logits stay where they lie
            dheads += [dweight_hg.float().T, dlogits_ng.sum(0, dtype=torch.float32)]
        parts.append(product(dlogits_ng, weight_gh.to(dtype)))
    return reduce(torch.add, parts).float(), dheads


def _is_even(dnll_n: Tensor) -> bool:
    """Whether all cells have one weight; on a GPU, where to look is to wait, whether they have it of a sum or mean."""
    return dnll_n.stride(0) == 0 if dnll_n.is_cuda else torch.equal(dnll_n, dnll_n[0].expand_as(dnll_n))


def head(
    x: SparseCounts | DeviceCounts,
    rows_n: Tensor | None,
    given: tuple[Tensor | None, ...],
    weights_n: Tensor,
    *,
    is_trained: bool,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor | None]]:
    """Return nll (n,), the gradients of the logits (n, g), and those of log_library (n,) and log_theta (parts, r, g).

    given: as Head's, h, log_library, log_theta, heads. The gradients are those of sum_n weights_n nll_n, and of no use
    where `is_trained` is false.
    """
    h_nh, log_library_n, log_theta, *heads = given
    if isinstance(x, DeviceCounts):
        return _gpu_head(x, rows_n, given, weights_n, is_trained=is_trained)
    logits = [product(h_nh, weight_gh.T, bias_g) for weight_gh, bias_g in zip(heads[::2], heads[1::2], strict=True)]
    nll_n, dlibrary_n, dtheta = torch.empty(len(h_nh)), torch.empty(len(h_nh)), None
    csr, cells = arrays(x.indptr, x.indices, x.data), arrays(log_library_n, weights_n)
    out, threads = arrays(nll_n, dlibrary_n), share_threads()
    if log_theta is None:
        compiled.poisson_head(*arrays(*logits), csr, cells, out, threads, is_trained)
    else:
        dtheta = torch.zeros(threads, *log_theta.shape)
        px_scale, zi_logits = (*arrays(*logits), None)[:2]
        compiled.nb_head(px_scale, zi_logits, csr, cells, out, arrays(log_theta, rows_n, dtheta), is_trained)
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


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """Return the memory of tensors of a CPU."""
    return tuple((tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in tensors)
