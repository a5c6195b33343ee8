"""The objectives: the ELBO and its importance-weighted form, by reparametrised draws; nats per cell.

    ELBO   = E_q[log p(x|z)] - KL(q(z|x) || p(z))
    ELBO_K = E_q[log 1/K sum_k w_k],  w = p(x|z) p(z) / q(z|x)       Burda, Grosse, Salakhutdinov 2016, equation 8

The KL weight beta of the warm-up stands before log p(z) - log q(z|x) in either. For a cell of known label y, p(x, y)
takes the place of p(x): p(z, y) that of p(z), and p(x|z) p(y|z)^alpha that of p(x|z), which makes the posterior tell
labels apart (Kingma, Mohamed, Rezende, Welling 2014, equation 9); alpha is `label_weight`. What training adds to the
loss for the prior's sake (`prior_shrinkage`) is not here but in step.py.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.inference.priors import has_closed_kl
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE


class Elbo(NamedTuple):
    """What a minibatch gives, (n,): the loss of each cell, and the two terms it is made of, never mixed in reports."""

    loss_n: Tensor  # minus the bound that is optimised, at this KL weight
    reconstruction_n: Tensor  # -log p(x | z), z ~ q(z | x)
    kl_n: Tensor  # KL(q(z | x) || p(z)): analytic, or log q(z | x) - log p(z) of the draws

    @property
    def loss(self) -> Tensor:
        """The mean over cells, a scalar."""
        return self.loss_n.mean()

    @property
    def elbo_n(self) -> Tensor:
        """The ELBO itself (KL weight 1) for each cell; at most log p(x) in expectation over z."""
        return -(self.reconstruction_n + self.kl_n)


def elbo(
    vae: VAE, x: Counts, covariates: Covariates, noise_nk: Tensor, *, kl_weight: float, label_weight: float = 0
) -> Elbo:
    """Return the negative ELBO of a minibatch with its terms; counts (n, g), standard normal noise (n, k).

    The noise is an argument, so that the bound is a deterministic, differentiable function of model, data and noise.
    """
    qz = vae.encode(x, covariates)
    if has_closed_kl(vae.prior, qz):
        z_nk, kl_n = qz.sample(noise_nk), qz.kl_to_standard_normal()
    else:
        z_nk, log_q_n = qz.draw(noise_nk)
        kl_n = log_q_n - vae.log_prior(z_nk, covariates.label_n)
    reconstruction_n = vae.reconstruction(x, z_nk, covariates)
    loss_n = reconstruction_n + kl_weight * kl_n
    if covariates.label_n is not None:
        loss_n = loss_n + label_weight * vae.label_loss(z_nk, covariates.label_n)
    return Elbo(loss_n, reconstruction_n, kl_n)


def iwelbo(
    vae: VAE, x: Counts, covariates: Covariates, noise_snk: Tensor, *, kl_weight: float, label_weight: float = 0
) -> Elbo:
    """Return the negative importance-weighted ELBO of a minibatch over s draws a cell; noise (s, n, k).

    Gradients are doubly reparametrised (Tucker, Lawson, Gu, Maddison 2019, equations 8 and 11): the parameters of q in
    log q get none, and z passes on sum_k share_k^2 d log w_k / dz, while the decoder gets sum_k share_k d log w_k.
    That is so for z of which log w_k of its own cell alone depends. With batch norm in the decoder other cells' do as
    well, and gradients are the plain ones, sum_k share_k d log w_k all through.
    """
    qz, shares, is_doubly = vae.encode(x, covariates), [], not vae.decoder_mixes_cells
    log_weights, reconstructions, kls = [], [], []
    for k, noise_nk in enumerate(noise_snk):
        z_nk, log_q_n = qz.draw(noise_nk)
        if is_doubly and z_nk.requires_grad:
            z_nk.register_hook(partial(_weigh, shares, k))
        reconstructions.append(vae.reconstruction(x, z_nk, covariates))
        log_q_n = qz.stopped_log_prob(z_nk) if is_doubly else log_q_n
        kls.append(log_q_n - vae.log_prior(z_nk, covariates.label_n))
        log_weights.append(-reconstructions[-1] - kl_weight * kls[-1])
        if covariates.label_n is not None:
            log_weights[-1] = log_weights[-1] - label_weight * vae.label_loss(z_nk, covariates.label_n)
    log_weights_sn = torch.stack(log_weights)
    shares.extend(log_weights_sn.detach().softmax(0))
    bound_n = log_weights_sn.detach().logsumexp(0) - math.log(len(noise_snk))
    surrogate_n = (torch.stack(shares) * log_weights_sn).sum(0)
    loss_n = surrogate_n.detach() - surrogate_n - bound_n  # minus the bound, with the gradient of the surrogate
    return Elbo(loss_n, torch.stack(reconstructions).mean(0), torch.stack(kls).mean(0))


def _weigh(shares: list[Tensor], k: int, gradient_nk: Tensor) -> Tensor:
    """Return the gradient of draw k times its share of the weights, known once all draws are made."""
    return gradient_nk * shares[k][:, None]
