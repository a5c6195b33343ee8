"""Whether a model's own simulations look like the cells, and whether its posterior finds what they were made of.

Posterior predictive checks (Gelman, Meng, Stern 1996): counts drawn anew for each cell from p(x | z), z ~ q(z | x),
beside those observed. Simulation-based calibration (Talts et al. 2018; of variational posteriors, Yao et al. 2018):
z* ~ p(z), x* ~ p(x | z*); among draws of q(z | x*) the rank of z* is uniform if q is the true posterior. n cells,
g genes, s draws.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import Counts, dense
from cohortvi.inference.vae import VAE

EXPRESSED = 0.05  # mean count from which on a gene's variance is looked at
LEVELS = (0.5, 0.9)  # of central intervals


class Statistics(NamedTuple):
    """What is looked at of counts (n, g): scalars."""

    zero_fraction: Tensor
    library_mean: Tensor
    library_sd: Tensor  # of its logarithm
    variance_over_mean: Tensor  # median over genes of mean EXPRESSED or more


def statistics(x_ng: Tensor) -> Statistics:
    """Return the statistics of counts (n, g), n >= 2."""
    library_n, mean_g = x_ng.sum(1), x_ng.mean(0)
    ratio_g = x_ng.var(0) / mean_g.clamp(min=1e-30)
    chosen = ratio_g[mean_g >= EXPRESSED]
    ratio = chosen.median() if len(chosen) else x_ng.new_full((), torch.nan)
    return Statistics((x_ng == 0).to(x_ng.dtype).mean(), library_n.mean(), library_n.clamp(min=1).log().std(), ratio)


@torch.no_grad()
def replicates(vae: VAE, x: Counts, covariates: Covariates, n: int) -> Iterator[Tensor]:
    """Yield n times counts (n, g) drawn anew for the same cells."""
    qz = vae.encode(x, covariates)
    for _ in range(n):
        z_nk, _ = qz.draw(torch.randn(len(covariates.batch_n), vae.n_dimensions, device=vae.device))
        yield vae.predict(x, z_nk, covariates).sample()


@torch.no_grad()
def calibration_ranks(vae: VAE, x: Counts, covariates: Covariates, draws: int) -> Tensor:
    """Return the rank, 0 to `draws`, of each simulated latent value among draws of its posterior, (n, k).

    Simulated cells have the covariates of these cells, and their library where it is observed.
    """
    z_nk = vae.sample_prior(len(covariates.batch_n))
    x_ng = vae.predict(x, z_nk, covariates).sample()
    qz = vae.encode(x_ng, covariates)
    noise_snk = torch.randn(draws, *z_nk.shape, device=vae.device)
    return (qz.draw(noise_snk)[0] < z_nk).sum(0)


def coverage(ranks_nk: Tensor, draws: int) -> dict[float, list[float]]:
    """Return the share of ranks within the central interval of each level, by dimension."""
    share_nk = (ranks_nk + 0.5) / (draws + 1)
    return {level: ((share_nk - 0.5).abs() < level / 2).double().mean(0).tolist() for level in LEVELS}


def by_batch(x: Counts, batch_n: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (code, cells (m,), their counts (m, g)) of every batch with two cells or more."""
    x_ng = dense(x, torch.float32)
    for code in batch_n.unique().tolist():
        rows = (batch_n == code).nonzero()[:, 0]
        if len(rows) > 1:
            yield code, rows, x_ng[rows]
