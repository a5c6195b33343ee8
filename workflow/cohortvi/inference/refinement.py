"""Posteriors of their own for cells that the encoder serves badly (Kim et al. 2018, arXiv 1802.02550)."""

from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.bounds import importance, log_weights, refine
from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian, Gaussian, Posterior
from cohortvi.inference.sparse import Counts, take_rows
from cohortvi.inference.vae import VAE

DRAWS = 20  # that the gap of a cell is estimated from


class Refined(NamedTuple):
    """Posteriors of their own: which cells have one, (m,), the posteriors, and what changed for each, (m,)."""

    rows_m: Tensor
    own: Gaussian
    gain_m: Tensor  # ELBO after minus before, nats, over the same draws
    shift_m: Tensor  # of the mean, root mean square over dimensions, in the encoder's standard deviations


def refined(
    vae: VAE, x: Counts, covariates: Covariates, qz: Posterior, start: DiagonalGaussian, *, above: float, steps: int
) -> Refined:
    """Return posteriors of their own for the cells whose inference gap is estimated at `above` or more, and that gain.

    The estimate is the importance-weighted bound of DRAWS draws minus the ELBO of the same draws, never negative: above
    0 all cells are tried. `qz`: the encoder's posteriors; `start`: their means and standard deviations. What is fitted
    is a diagonal Gaussian where the encoder's are, else one of full covariance. Random numbers are those of torch's
    generators.
    """
    noise_snk = torch.randn(DRAWS, *start.loc_nk.shape, device=vae.device)
    with torch.no_grad():
        weights_sn = log_weights(vae.log_joint(x, covariates), qz, noise_snk).double()
    tried = (importance(weights_sn, DRAWS).bound_n - weights_sn.mean(0) >= above).nonzero()[:, 0]
    if not len(tried):
        return Refined(tried, _of_cells(start, tried), tried.double(), tried.double())
    before = _of_cells(start, tried)
    log_joint = vae.log_joint(take_rows(x, tried), covariates.take(tried))
    with torch.enable_grad():
        own = refine(log_joint, before, is_full=not isinstance(qz, DiagonalGaussian), steps=steps)
    with torch.no_grad():
        gain_m = log_weights(log_joint, own, noise_snk[:, tried]).double().mean(0) - weights_sn[:, tried].mean(0)
    shift_m = ((own.loc_nk - before.loc_nk) / before.scale_nk).square().mean(1).sqrt()
    kept = gain_m > 0
    return Refined(tried[kept], _of_cells(own, kept), gain_m[kept], shift_m[kept])


def _of_cells(posterior: Gaussian, rows: Tensor) -> Gaussian:
    return type(posterior)(*(values[rows] for values in posterior))
