"""Likelihoods p(x | z) of UMI counts, given what the decoder says of each cell and gene.

Everything is computed from log mu and log theta, so that no mean underflows to zero and no logarithm needs a small
constant beside it. lgamma and its derivative are taken on non-zero counts alone: at x = 0 their terms cancel.
n cells, g genes; log-probabilities are in nats.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STIRLING = 32.0  # from here on three terms of Stirling's series are exact to 1e-13


def poisson_log_prob(x_ng: Tensor, log_mu_ng: Tensor) -> Tensor:
    """Log-probability of counts under a Poisson with mean mu.

    x log mu - mu - log x!
    Shapes (n, g), (n, g) -> (n, g).
    """
    at = x_ng.nonzero(as_tuple=True)
    factorials = torch.zeros_like(x_ng).index_put(at, torch.lgamma(x_ng[at] + 1))
    return x_ng * log_mu_ng - log_mu_ng.exp() - factorials


def nb_log_prob(x_ng: Tensor, log_mu_ng: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability of counts under a negative binomial with mean mu and inverse dispersion theta.

    log G(x+theta) - log G(theta) - log x! + theta log(theta/(theta+mu)) + x log(mu/(theta+mu)), where with
    d = log mu - log theta the last two are -theta softplus(d) and x (d - softplus(d)).
    Variance mu + mu^2/theta; Poisson as theta -> inf. Lopez et al. 2018 (Nature Methods 15:1053), equation 5.
    Shapes (n, g), (n, g), (g,) or (n, g) -> (n, g).
    """
    d_ng = log_mu_ng - log_theta
    dense_ng = x_ng * d_ng - (x_ng + log_theta.exp()) * F.softplus(d_ng)
    return dense_ng + _gamma_terms(x_ng, log_theta)


def zinb_log_prob(x_ng: Tensor, log_mu_ng: Tensor, log_theta: Tensor, zi_logits_ng: Tensor) -> Tensor:
    """Log-probability of counts under a negative binomial that is replaced by zero with probability pi.

    log(pi [x = 0] + (1 - pi) NB(x)); with logit pi = a this is logaddexp(a, log NB(0)) - softplus(a) at zero and
    log NB(x) - softplus(a) elsewhere. Shapes as in `nb_log_prob`, logits (n, g) -> (n, g).
    """
    nb_ng = nb_log_prob(x_ng, log_mu_ng, log_theta)
    return torch.where(x_ng == 0, torch.logaddexp(zi_logits_ng, nb_ng), nb_ng) - F.softplus(zi_logits_ng)


def _gamma_terms(x_ng: Tensor, log_theta: Tensor) -> Tensor:
    """log G(x+theta) - log G(theta) - log x!, which is 0 where x is 0; (n, g), (g,) or (n, g) -> (n, g)."""
    at = x_ng.nonzero(as_tuple=True)
    x = x_ng[at]
    # index_select on the flat parameter: its gradient adds in a fixed order, that of x[at] with repeats does not.
    flat = at[1] if log_theta.ndim == 1 else at[0] * x_ng.shape[1] + at[1]
    log_theta = log_theta.reshape(-1).index_select(0, flat)
    return torch.zeros_like(x_ng).index_put(at, log_rising(x, log_theta) - torch.lgamma(x + 1))


def log_rising(x: Tensor, log_theta: Tensor) -> Tensor:
    """log G(x+theta) - log G(theta) for x > 0, exact to rounding for every theta; equal shapes.

    Two lgamma of a large theta cancel all digits of their difference in float32 (log G(1e6) is 1.3e7, its last digit
    1); there Stirling's series is subtracted term by term: with a = theta and b = a + x,
    (b - 1/2) log(1 + x/a) + x log a - x + s(b) - s(a), s(a) = 1/12a - 1/360a^3 + 1/1260a^5.
    """
    theta = log_theta.exp()
    # The branch not taken sees a harmless value: torch.where passes 0 times its gradient, and 0 times inf is nan.
    small = theta.clamp(max=STIRLING)
    a = theta.clamp(min=STIRLING)
    b = a + x
    series = (b - 0.5) * torch.log1p(x / a) + x * (a.log() - 1) + _stirling(b) - _stirling(a)
    return torch.where(theta < STIRLING, torch.lgamma(x + small) - torch.lgamma(small), series)


def _stirling(a: Tensor) -> Tensor:
    inverse = 1 / a
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


class Poisson(NamedTuple):
    """Poisson counts; fields (n, g)."""

    log_px_rate_ng: Tensor

    def log_prob(self, x_ng: Tensor) -> Tensor:
        """Log-probability of each count, (n, g) -> (n, g)."""
        return poisson_log_prob(x_ng, self.log_px_rate_ng)

    def sample(self) -> Tensor:
        """Return counts, (n, g), by torch's generators."""
        return torch.poisson(self.log_px_rate_ng.exp())


class NegativeBinomial(NamedTuple):
    """Negative binomial counts; log_px_rate (n, g), log_theta (g,) or (n, g)."""

    log_px_rate_ng: Tensor
    log_theta: Tensor

    def log_prob(self, x_ng: Tensor) -> Tensor:
        """Log-probability of each count, (n, g) -> (n, g)."""
        return nb_log_prob(x_ng, self.log_px_rate_ng, self.log_theta)

    def sample(self) -> Tensor:
        """Return counts, (n, g), by torch's generators: Poisson counts whose rates are gamma distributed."""
        theta_ng = self.log_theta.exp().expand_as(self.log_px_rate_ng)
        return torch.poisson(torch._standard_gamma(theta_ng) * (self.log_px_rate_ng - self.log_theta).exp())


class ZeroInflatedNegativeBinomial(NamedTuple):
    """Zero-inflated negative binomial counts; log_px_rate and zi_logits (n, g), log_theta (g,) or (n, g)."""

    log_px_rate_ng: Tensor
    log_theta: Tensor
    zi_logits_ng: Tensor

    def log_prob(self, x_ng: Tensor) -> Tensor:
        """Log-probability of each count, (n, g) -> (n, g)."""
        return zinb_log_prob(x_ng, self.log_px_rate_ng, self.log_theta, self.zi_logits_ng)

    def sample(self) -> Tensor:
        """Return counts, (n, g), by torch's generators."""
        counts_ng = NegativeBinomial(self.log_px_rate_ng, self.log_theta).sample()
        return counts_ng * torch.bernoulli(torch.sigmoid(-self.zi_logits_ng))


Likelihood = Poisson | NegativeBinomial | ZeroInflatedNegativeBinomial
