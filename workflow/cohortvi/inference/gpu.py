"""What a GPU does in the place of the compiled loops of CPUs: gpu_kernels.py on torch's tensors."""

import torch
from torch import Tensor

from cohortvi.inference import gpu_kernels
from cohortvi.inference.sparse import DeviceCounts

BLOCK, WARPS = 512, 4  # genes at a time, and warps of 32 threads that share them: about 110 registers a thread
PROGRAMS, MOST_CELLS = 512, 32  # about four programs to each multiprocessor; cells one after the other in each


def densify(indptr: Tensor, indices: Tensor, data: Tensor, n_genes: int, dtype: torch.dtype) -> DeviceCounts:
    """Return counts of a CSR matrix on their GPU: counts in the type of `data`, log1p in `dtype`."""
    n_obs, device = len(indptr) - 1, data.device
    counts_ng = torch.empty(n_obs, n_genes, dtype=data.dtype, device=device)
    log1p_ng = torch.empty(n_obs, n_genes, dtype=dtype, device=device)
    library_n = torch.empty(n_obs, device=device)
    given = (indptr, indices, data, counts_ng, log1p_ng, library_n, n_genes)
    gpu_kernels.densify_kernel[(n_obs,)](*given, BLOCK=_block(n_genes), num_warps=WARPS)
    return DeviceCounts(counts_ng, log1p_ng, library_n)


def head(
    x: DeviceCounts,
    rows_n: Tensor,
    logits: list[Tensor],
    log_library_n: Tensor,
    log_theta: Tensor | None,
    weights_n: Tensor,
    *,
    is_trained: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return minus the log-likelihood (n,), and the gradients of its weighted sum by log library (n,) and log_theta.

    `logits` (n, g), of px_scale and for a ZINB of zero inflation, are overwritten by their gradients if `is_trained`.
    log_theta (r, g), of which cell n has row rows_n[n]; None for a Poisson. Its gradient comes in parts, (p, r, g),
    whose sum it is.
    """
    n_obs, n_genes = logits[0].shape
    cells = min(max(1, n_obs // PROGRAMS), MOST_CELLS)
    nll_n, dlibrary_n = torch.empty_like(weights_n), torch.empty_like(weights_n)
    is_sorted = log_theta is not None and len(log_theta) > 1
    dealt = _dealt(rows_n, len(log_theta), cells) if is_sorted else (rows_n,) * 4
    n_programs = len(dealt[1]) if is_sorted else -(-n_obs // cells)
    dtheta_pg = weights_n.new_zeros(n_programs, n_genes) if log_theta is not None and is_trained else weights_n
    gpu_kernels.head_kernel[(n_programs,)](
        *(logits[0], logits[-1], x.counts_ng, log_library_n, weights_n),
        *(weights_n if log_theta is None else log_theta, *dealt, nll_n, dlibrary_n, dtheta_pg, n_obs, n_genes),
        KIND=0 if log_theta is None else len(logits),
        CELLS=cells,
        BLOCK=_block(n_genes),
        IS_SORTED=is_sorted,
        IS_TRAINED=is_trained,
        num_warps=WARPS,
    )
    if log_theta is None or not is_trained:
        return nll_n, dlibrary_n, None
    if not is_sorted:
        return nll_n, dlibrary_n, dtheta_pg[:, None]
    # A product, since adding parts to rows at random has no fixed order; in double precision, for others may be TF32.
    of_row_rp = (torch.arange(len(log_theta), device=rows_n.device)[:, None] == dealt[3]).double()
    return nll_n, dlibrary_n, (of_row_rp @ dtheta_pg.double()).float()[None]


def _dealt(rows_n: Tensor, n_rows: int, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deal cells to programs, each of one row of log_theta and at most `cells` of them, without a look at the device.

    Return the cells sorted by row, (n,), and of every program its first cell among these, its end and its row, (p,).
    """
    rows_n, order_n = rows_n.sort(stable=True)
    rows_r = torch.arange(n_rows, device=rows_n.device)
    first_r, end_r = torch.searchsorted(rows_n, rows_r), torch.searchsorted(rows_n, rows_r, right=True)
    programs_r = (end_r - first_r + cells - 1).div(cells, rounding_mode="floor")
    ends_r = programs_r.cumsum(0)
    # More than these can't be needed: each row has but one program that is not full.
    at_p = torch.arange(-(-len(rows_n) // cells) + n_rows, device=rows_n.device)
    row_p = torch.searchsorted(ends_r, at_p, right=True).clamp(max=n_rows - 1)
    first_p = first_r[row_p] + (at_p - (ends_r - programs_r)[row_p]) * cells
    return order_n, first_p, torch.minimum(first_p + cells, end_r[row_p]), row_p


def _block(n_genes: int) -> int:
    return min(BLOCK, 1 << (n_genes - 1).bit_length()) if n_genes > 1 else 1
