"""Priors p(z) over the latent space. n cells, k latent dimensions."""

import math

from torch import Tensor

from cohortvi.inference.posteriors import DiagonalGaussian


class StandardNormal:
    """p(z) = N(0, I)."""

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z, (n, k) -> (n,), in nats."""
        return (-0.5 * z_nk**2 - 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, qz: DiagonalGaussian) -> Tensor:
        """KL(q || p) of each cell, (n,), in nats.

        1/2 sum_k (loc^2 + scale^2 - 1 - log scale^2)   [Kingma, Welling 2014, appendix B]
        """
        variance_nk = qz.scale_nk**2
        return 0.5 * (qz.loc_nk**2 + variance_nk - 1 - variance_nk.log()).sum(-1)
