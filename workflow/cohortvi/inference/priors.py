"""Priors p(z) over the latent space. n cells, k latent dimensions."""

from torch import Tensor

from cohortvi.inference.posteriors import Gaussian, standard_normal_log_prob


class StandardNormal:
    """p(z) = N(0, I)."""

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., k) -> (...)."""
        return standard_normal_log_prob(z_nk)

    def kl(self, qz: Gaussian) -> Tensor:
        """KL(q || p) of each cell, (n,), in nats."""
        return qz.kl_to_standard_normal()
