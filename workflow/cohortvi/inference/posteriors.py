"""Variational posteriors q(z | x). n cells, k latent dimensions.

`draw` makes z of standard normal noise, differentiable in the parameters (Kingma, Welling 2014, section 2.4), with
log q(z | x) beside it. Leading dimensions of noise and z beyond (n, k) are further draws of every cell.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def standard_normal_log_prob(z_nk: Tensor) -> Tensor:
    """Log-density of N(0, I) in nats, (..., k) -> (...)."""
    return -0.5 * (z_nk**2 + math.log(2 * math.pi)).sum(-1)


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(loc, diag(scale^2)), independent over the latent dimensions; fields (n, k), scale > 0."""

    loc_nk: Tensor
    scale_nk: Tensor

    def sample(self, noise_nk: Tensor) -> Tensor:
        """Return loc + scale * noise; noise ~ N(0, 1)."""
        return self.loc_nk + self.scale_nk * noise_nk

    def draw(self, noise_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, (..., n, k), and log q(z | x), (..., n)."""
        return self.sample(noise_nk), standard_normal_log_prob(noise_nk) - self.scale_nk.log().sum(-1)

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., n, k) -> (..., n)."""
        return standard_normal_log_prob((z_nk - self.loc_nk) / self.scale_nk) - self.scale_nk.log().sum(-1)

    def kl_by_dimension(self) -> Tensor:
        """KL(q || N(0, I)) of each cell and latent dimension, (n, k): 1/2 (loc^2 + scale^2 - 1 - log scale^2).

        Kingma, Welling 2014, appendix B.
        """
        variance_nk = self.scale_nk**2
        return 0.5 * (self.loc_nk**2 + variance_nk - 1 - variance_nk.log())

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q || N(0, I)) of each cell, (n,): the sum over its dimensions."""
        return self.kl_by_dimension().sum(-1)


class FullGaussian(NamedTuple):
    """q(z | x) = N(loc, L L^T); loc (n, k), L (n, k, k) lower triangular with a positive diagonal."""

    loc_nk: Tensor
    tril_nkk: Tensor

    def _log_determinant(self) -> Tensor:
        return self.tril_nkk.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def draw(self, noise_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = loc + L noise, (..., n, k), and log q(z | x), (..., n)."""
        z_nk = self.loc_nk + torch.einsum("nij,...nj->...ni", self.tril_nkk, noise_nk)
        return z_nk, standard_normal_log_prob(noise_nk) - self._log_determinant()

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., n, k) -> (..., n)."""
        away = (z_nk - self.loc_nk)[..., None]
        noise_nk = torch.linalg.solve_triangular(self.tril_nkk, away, upper=False)[..., 0]
        return standard_normal_log_prob(noise_nk) - self._log_determinant()

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q || N(0, I)) of each cell, (n,): 1/2 (|L|_F^2 + |loc|^2 - k) - sum_k log L_kk."""
        squares = (self.tril_nkk**2).sum((-2, -1)) + (self.loc_nk**2).sum(-1)
        return 0.5 * (squares - self.loc_nk.shape[-1]) - self._log_determinant()


Gaussian = DiagonalGaussian | FullGaussian
