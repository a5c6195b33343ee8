"""Denoised expression: what a model expects of each gene of a cell, and how sure it is of that (Lopez et al. 2018).

    rho(z, s)   expected fractions of the genes of a cell with latent value z in batch s       the model's px_scale
    E_q[1/B sum_s rho_g(z, s)]   over draws of z from q(z | x), and the standard deviation of the same

The batches s are the cell's own, or some of the model's, the same for all cells: as if they were of these batches.
n cells, g genes, s draws, k latent dimensions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE


class Denoised(NamedTuple):
    """Mean and standard deviation over the posterior of each cell's expected fractions of some genes, (n, g) float64.

    The fractions are of all genes of the model.
    """

    mean_ng: Tensor
    std_ng: Tensor


@torch.no_grad()
def denoised(
    vae: VAE, x: Counts, covariates: Covariates, noise_snk: Tensor, genes: Tensor, batches: Sequence[int] = ()
) -> Denoised:
    """Return the denoised expression of these cells, by the draws that the noise makes; two at least.

    `genes`: numbers of the genes wanted; `batches`: codes of those that the cells are taken to be of; none: their own.
    """
    told = [covariates._replace(batch_n=torch.full_like(covariates.batch_n, code)) for code in batches] or [covariates]
    z_snk, _ = vae.encode(x, covariates).draw(noise_snk)
    mean_ng = squares_ng = torch.zeros((), dtype=torch.float64, device=vae.device)
    for drawn, z_nk in enumerate(z_snk, 1):  # Welford 1962
        fractions = [vae.px_scale(z_nk, one).index_select(1, genes).double() for one in told]
        rho_ng = torch.stack(fractions).mean(0)
        away_ng = rho_ng - mean_ng
        mean_ng = mean_ng + away_ng / drawn
        squares_ng = squares_ng + away_ng * (rho_ng - mean_ng)
    return Denoised(mean_ng, (squares_ng / (len(z_snk) - 1)).sqrt())


class GroupMoments:
    """Mean and standard deviation of expression in groups of cells whose cells come in parts; (groups, g) float64.

    Of a draw of a random cell of the group: what differs between its cells and what is not known of each (law of total
    variance). Parts are merged by their moments (Chan, Golub, LeVeque 1983).
    """

    def __init__(self, n_groups: int, n_genes: int, draws: int):
        """`draws`: of each cell, that its mean and standard deviation are of."""
        self.cells = np.zeros(n_groups, np.int64)
        self.mean, self.squares = np.zeros((n_groups, n_genes)), np.zeros((n_groups, n_genes))
        self.within = (draws - 1) / draws

    def add(self, codes_n: np.ndarray, mean_ng: np.ndarray, std_ng: np.ndarray) -> None:
        """Take in cells: their groups, and mean and standard deviation over the draws of each."""
        for code in np.unique(codes_n):
            here = codes_n == code
            n, before = here.sum(), self.cells[code]
            mean_g = mean_ng[here].mean(0)
            squares_g = ((mean_ng[here] - mean_g) ** 2).sum(0) + self.within * (std_ng[here] ** 2).sum(0)
            away_g = mean_g - self.mean[code]
            self.cells[code] = before + n
            self.mean[code] += away_g * n / (before + n)
            self.squares[code] += squares_g + away_g**2 * before * n / (before + n)

    @property
    def sd(self) -> np.ndarray:
        """The standard deviations, (groups, g)."""
        return np.sqrt(self.squares / np.maximum(self.cells, 1)[:, None])
