"""The objective: ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)), by one reparametrised sample a cell; nats per cell."""

from typing import NamedTuple

from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE


class Elbo(NamedTuple):
    """What a minibatch gives: the loss, and the two terms it is made of, which are never mixed in reports."""

    loss: Tensor  # scalar: mean over cells of reconstruction + kl_weight * kl
    reconstruction_n: Tensor  # -log p(x | z), z ~ q(z | x)
    kl_n: Tensor  # KL(q(z | x) || p(z)), analytic

    @property
    def elbo_n(self) -> Tensor:
        """The bound itself (KL weight 1) for each cell; at most log p(x) in expectation over z."""
        return -(self.reconstruction_n + self.kl_n)


def elbo(vae: VAE, x: Counts, covariates: Covariates, noise_nk: Tensor, *, kl_weight: float) -> Elbo:
    """Return the negative ELBO of a minibatch with its terms; counts (n, g), standard normal noise (n, k).

    The noise is an argument, so that the bound is a deterministic, differentiable function of model, data and noise.
    """
    qz = vae.encode(x, covariates)
    reconstruction_n = vae.reconstruction(x, qz.sample(noise_nk), covariates)
    kl_n = vae.prior.kl(qz)
    return Elbo((reconstruction_n + kl_weight * kl_n).mean(), reconstruction_n, kl_n)


def kl_weight(step: int, planned_steps: int, warmup: float) -> float:
    """Return the weight of the KL term at `step` (counted from 0) of a run planned to take `planned_steps`.

    It climbs linearly over the first `warmup` (a share of the steps) and is exactly 1 from there on; the last planned
    step has weight 1 whatever the length of the run. (Warm-up by a fixed number of epochs, as in scvi-tools, leaves
    large cohorts with a weight far below 1 at their end, hence with an autoencoder.)
    """
    return min(1.0, (step + 1) / max(1, round(warmup * planned_steps)))
