"""Priors p(z) over the latent space. n cells, k latent dimensions, c components."""

import torch
from torch import Tensor, nn

from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian, Flow, FullGaussian, Posterior, standard_normal_log_prob


class StandardNormal(nn.Module):
    """p(z) = N(0, I)."""

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., k) -> (...)."""
        return standard_normal_log_prob(z_nk)


class GaussianMixture(nn.Module):
    """p(z) = sum_c pi_c N(loc_c, diag(scale_c^2)), all of it learnt (Dilokthanakul et al. 2016, arXiv 1611.02648).

    With labels a component is a label, p(z, y) = pi_y N(z; loc_y, diag(scale_y^2)) (Kingma et al. 2014, section 2.2).
    """

    def __init__(self, n_components: int, n_latent: int):
        super().__init__()
        self.loc_ck = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_scale_ck = nn.Parameter(torch.zeros(n_components, n_latent))
        self.logits_c = nn.Parameter(torch.zeros(n_components))

    @property
    def components(self) -> DiagonalGaussian:
        """The Gaussians, (c, k)."""
        return DiagonalGaussian(self.loc_ck, self.log_scale_ck.exp())

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., k) -> (...)."""
        return mixture_log_prob(z_nk, self.components, self.logits_c)

    def log_joint(self, z_nk: Tensor) -> Tensor:
        """log p(z, y) of every label y in nats, (..., k) -> (..., y)."""
        return mixture_log_joint(z_nk, self.components, self.logits_c)


class VampPrior(nn.Module):
    """p(z) = sum_c pi_c q(z | u_c): the encoder's own posteriors at learnt pseudo-inputs (Tomczak, Welling 2018).

    Pseudo-inputs u (c, g) stand where log1p of counts do; each bears the covariates of the cell that it was begun from.
    """

    def __init__(self, n_components: int, n_genes: int, n_categories: int, n_continuous: int):
        super().__init__()
        self.pseudo_cg = nn.Parameter(torch.zeros(n_components, n_genes))
        self.logits_c = nn.Parameter(torch.zeros(n_components))
        self.register_buffer("codes", torch.zeros(n_categories, n_components, dtype=torch.int64))
        self.register_buffer("continuous", torch.zeros(n_components, n_continuous))

    @torch.no_grad()
    def begin(self, x_cg: Tensor, covariates: Covariates) -> None:
        """Begin with these cells: counts (c, g)."""
        self.pseudo_cg.copy_(x_cg.log1p())
        if len(self.codes):
            self.codes.copy_(torch.stack([covariates.batch_n, *covariates.categories]))
        if self.continuous.shape[1]:
            self.continuous.copy_(covariates.continuous_nc)


Prior = StandardNormal | GaussianMixture | VampPrior


def mixture_log_prob(z_nk: Tensor, components: Posterior, logits_c: Tensor) -> Tensor:
    """Log-density of a mixture in nats, (..., k) -> (...)."""
    return torch.logsumexp(mixture_log_joint(z_nk, components, logits_c), dim=-1)


def mixture_log_joint(z_nk: Tensor, components: Posterior, logits_c: Tensor) -> Tensor:
    """Log-density of z and its component in nats, (..., k) -> (..., c)."""
    return logits_c.log_softmax(0) + components.log_prob(z_nk[..., None, :])


def mixture_sample(n: int, components: Posterior, logits_c: Tensor) -> Tensor:
    """Return n draws of a mixture, (n, k), by torch's generators."""
    base = components.base if isinstance(components, Flow) else components
    z_nck, _ = components.draw(torch.randn(n, *base.loc_nk.shape, device=logits_c.device))
    chosen_n = torch.multinomial(logits_c.softmax(0), n, replacement=True)
    return z_nck[torch.arange(n, device=logits_c.device), chosen_n]


def mixture_divergence(components: Posterior, logits_c: Tensor, noise_ck: Tensor) -> Tensor:
    """Return sum_c pi_c KL(component_c || N(0, I)) in nats, a scalar; KL(mixture || N(0, I)) is no more, by convexity.

    It is exact for Gaussians, and without bias for flows, by a draw of each (standard normal noise (c, k)).
    """
    if isinstance(components, Flow):
        z_ck, log_q_c = components.draw(noise_ck)
        kl_c = log_q_c - standard_normal_log_prob(z_ck)
    else:
        kl_c = components.kl_to_standard_normal()
    return (logits_c.softmax(0) * kl_c).sum()


def has_closed_kl(prior: Prior, qz: Posterior) -> bool:
    """Whether KL(q || p) is known without draws."""
    return isinstance(prior, StandardNormal) and isinstance(qz, DiagonalGaussian | FullGaussian)
