"""Variational posteriors q(z | x). n cells, k latent dimensions; scale is a standard deviation."""

import math
from typing import NamedTuple

from torch import Tensor


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(loc, diag(scale^2)), independent over the latent dimensions; fields (n, k), scale > 0."""

    loc_nk: Tensor
    scale_nk: Tensor

    def sample(self, noise_nk: Tensor) -> Tensor:
        """Return loc + scale * noise, differentiable in both (Kingma, Welling 2014, section 2.4); noise ~ N(0, 1)."""
        return self.loc_nk + self.scale_nk * noise_nk

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z, (n, k) -> (n,), in nats."""
        noise_nk = (z_nk - self.loc_nk) / self.scale_nk
        return (-0.5 * noise_nk**2 - self.scale_nk.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
