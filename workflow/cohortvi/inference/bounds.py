"""Bounds on log p(x) of single cells, and posteriors fitted to each cell alone: how far a posterior can be trusted.

    log p(x) = ELBO(q) + KL(q(z | x) || p(z | x))
    inference gap      log p(x) - ELBO(encoder)         = approximation gap + amortization gap
    approximation gap  log p(x) - ELBO(the family's best for this cell)
    amortization gap   ELBO(the family's best for this cell) - ELBO(encoder)

Cremer, Li, Duvenaud 2018 (ICML, arXiv 1801.03558), equations 4 to 6. log p(x) is estimated by importance sampling. The
decoder is fixed throughout. A model is given as `log_joint`: z (n, k) -> log p(x | z) + log p(z) of the n cells, (n,),
in nats, differentiable in z. s draws, n cells, k latent dimensions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.posteriors import DiagonalGaussian, FullGaussian, Gaussian, Posterior

LogJoint = Callable[[Tensor], Tensor]

LEARNING_RATE = 0.1  # of the fit of single cells, at its start; it falls linearly to a tenth


def refine(
    log_joint: LogJoint,
    start: DiagonalGaussian,
    *,
    is_full: bool,
    steps: int,
    generator: torch.Generator | None = None,
) -> Gaussian:
    """Return the posterior of each cell that has the largest ELBO in the mean-field or the full-covariance family.

    Adam from `start` on one antithetic pair of draws a step, in units of the start's standard deviations, by gradients
    that pass through the draws alone; the mean of the last half of the steps (Polyak, Juditsky 1992). Cells do not
    depend on one another: Adam works by element.
    """
    shape_nk, scale_nk = start.loc_nk.shape, start.scale_nk.detach()
    shift_nk, log_stretch_nk = (scale_nk.new_zeros(shape_nk, requires_grad=True) for _ in range(2))
    lower_nkk = scale_nk.new_zeros(*shape_nk, shape_nk[1], requires_grad=is_full)
    parameters = [shift_nk, log_stretch_nk, lower_nkk][: 2 + is_full]
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    means, averaged = [torch.zeros_like(parameter) for parameter in parameters], max(1, steps // 2)

    def posterior() -> Gaussian:
        loc_nk = start.loc_nk.detach() + scale_nk * shift_nk
        if not is_full:
            return DiagonalGaussian(loc_nk, scale_nk * log_stretch_nk.exp())
        return FullGaussian(loc_nk, scale_nk[..., None] * (lower_nkk.tril(-1) + torch.diag_embed(log_stretch_nk.exp())))

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.9 * step / steps)
        noise_nk = torch.randn(shape_nk, generator=generator, dtype=scale_nk.dtype, device=scale_nk.device)
        optimiser.zero_grad()
        qz = posterior()
        for signed_nk in (noise_nk, -noise_nk):
            z_nk = qz.sample(signed_nk)
            (qz.stopped_log_prob(z_nk) - log_joint(z_nk)).sum().backward(retain_graph=signed_nk is noise_nk)
        optimiser.step()
        if step >= steps - averaged:
            for mean, parameter in zip(means, parameters, strict=True):
                mean += parameter.detach() / averaged
    with torch.no_grad():
        for mean, parameter in zip(means, parameters, strict=True):
            parameter.copy_(mean)
        return posterior()


def log_weights(log_joint: LogJoint, qz: Posterior, noise_snk: Tensor) -> Tensor:
    """Return the log importance weights log p(x | z) + log p(z) - log q(z | x), (s, n); their mean is the ELBO."""
    z_snk, log_q_sn = qz.draw(noise_snk)
    return torch.stack([log_joint(z_nk) for z_nk in z_snk]) - log_q_sn


class Importance(NamedTuple):
    """What importance weights say of each cell, (n,): a bound on log p(x), its Monte Carlo error, and sample size."""

    bound_n: Tensor
    error_n: Tensor
    ess_n: Tensor


def importance(log_weights_sn: Tensor, k: int) -> Importance:
    """Return the importance-weighted ELBO of k draws, of which s is a multiple (Burda et al. 2016, equation 8).

    The mean over s / k groups of the log of the mean weight; at k = s, the estimate of log p(x). error_n: its standard
    error, by the spread of the groups, or for a single one by the delta method, sd(w) / (mean(w) sqrt(s)). ess_n: the
    effective sample size of all draws, (sum w)^2 / sum w^2. Errors: ValueError if k does not divide s.
    """
    s = len(log_weights_sn)
    if s % k:
        raise ValueError(f"{s} draws cannot be dealt to groups of {k}; expected a multiple")
    groups = log_weights_sn.unflatten(0, (s // k, k)).logsumexp(1) - math.log(k)
    share_sn = log_weights_sn.softmax(0)
    ess_n = 1 / (share_sn**2).sum(0)
    delta_n = (1 / ess_n - 1 / s).clamp(min=0).sqrt()
    error_n = groups.std(0) / math.sqrt(len(groups)) if len(groups) > 1 else delta_n
    return Importance(groups.mean(0), error_n, ess_n)
