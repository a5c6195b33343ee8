"""Posteriors of their own for cells that the encoder serves badly (Kim et al. 2018, arXiv 1802.02550)."""

from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.bounds import importance, log_weights, refine
from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.sparse import Counts, take_rows
from cohortvi.inference.vae import VAE

DRAWS = 20  # that the gap of a cell is estimated from


class Refined(NamedTuple):
    """What became of some cells: mean and standard deviation, (n, k), and which were refined and what changed, (m,)."""

    loc_nk: Tensor
    scale_nk: Tensor
    rows_m: Tensor
    gain_m: Tensor  # ELBO after minus before, nats
    shift_m: Tensor  # of the mean, root mean square over dimensions, in the encoder's standard deviations


def refined(vae: VAE, x: Counts, covariates: Covariates, start: DiagonalGaussian, above: float, steps: int) -> Refined:
    """Return posteriors by the encoder, or of their own for cells whose inference gap is estimated at `above` or more.

    The estimate is the importance-weighted bound of DRAWS draws minus the ELBO of the same draws, never negative: above
    0 all cells are refined. `start`: the encoder's posteriors. Random numbers are those of torch's generators.
    """
    noise_snk = torch.randn(DRAWS, *start.loc_nk.shape, device=vae.device)
    with torch.no_grad():
        weights_sn = log_weights(vae.log_joint(x, covariates), start, noise_snk).double()
    chosen = (importance(weights_sn, DRAWS).bound_n - weights_sn.mean(0) >= above).nonzero()[:, 0]
    if not len(chosen):
        return Refined(*start, chosen, chosen.float(), chosen.float())
    before = DiagonalGaussian(*(value[chosen] for value in start))
    log_joint = vae.log_joint(take_rows(x, chosen), covariates.take(chosen))
    with torch.enable_grad():
        after = refine(log_joint, before, is_full=False, steps=steps)
    with torch.no_grad():
        gain_m = log_weights(log_joint, after, noise_snk[:, chosen]).mean(0) - weights_sn[:, chosen].mean(0)
    shift_m = ((after.loc_nk - before.loc_nk) / before.scale_nk).square().mean(1).sqrt()
    moments = (whole.index_copy(0, chosen, own) for whole, own in zip(start, after, strict=True))
    return Refined(*moments, chosen, gain_m, shift_m)
