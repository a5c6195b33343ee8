"""Products of large matrices. On CPUs, in single precision, they are oneDNN's, which torch holds beside MKL.

MKL takes processors that are not Intel's for older ones: on a Zen 5 it does without AVX-512, and oneDNN is more than
twice as fast (`make bench-training`). torch gives it float32 by this operator alone, which its compiler uses too.
"""

import torch
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a (n, k) times b (k, m), plus bias (m,). Either may be a transposed view; no gradients are recorded.

    Errors: RuntimeError, of torch, for shapes that do not fit.
    """
    if HAS_ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
