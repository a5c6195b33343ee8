"""Variational posteriors q(z | x). n cells, k latent dimensions.

All have `draw`, which makes z of standard normal noise, differentiable in the parameters (Kingma, Welling 2014, section
2.4), with log q(z | x) beside it; `log_prob(z)`; and `moments`. Leading dimensions of noise and z beyond (n, k) are
further draws of every cell.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


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

    def stopped_log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z, through which alone gradients pass (Roeder, Wu, Duvenaud 2017)."""
        return type(self)(*(part.detach() for part in self)).log_prob(z_nk)

    def moments(self, noise_snk: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z, (n, k) each."""
        del noise_snk  # they are known
        return self.loc_nk, self.scale_nk

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

    def sample(self, noise_nk: Tensor) -> Tensor:
        """Return loc + L noise; noise ~ N(0, 1)."""
        return self.loc_nk + (self.tril_nkk @ noise_nk[..., None])[..., 0]

    def draw(self, noise_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, (..., n, k), and log q(z | x), (..., n)."""
        return self.sample(noise_nk), standard_normal_log_prob(noise_nk) - self._log_determinant()

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., n, k) -> (..., n)."""
        away = (z_nk - self.loc_nk)[..., None]
        noise_nk = torch.linalg.solve_triangular(self.tril_nkk, away, upper=False)[..., 0]
        return standard_normal_log_prob(noise_nk) - self._log_determinant()

    def stopped_log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z, through which alone gradients pass (Roeder, Wu, Duvenaud 2017)."""
        return type(self)(*(part.detach() for part in self)).log_prob(z_nk)

    def moments(self, noise_snk: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z, (n, k) each."""
        del noise_snk  # they are known
        return self.loc_nk, self.tril_nkk.norm(dim=-1)

    def kl_to_standard_normal(self) -> Tensor:
        """KL(q || N(0, I)) of each cell, (n,): 1/2 (|L|_F^2 + |loc|^2 - k) - sum_k log L_kk."""
        squares = (self.tril_nkk**2).sum((-2, -1)) + (self.loc_nk**2).sum(-1)
        return 0.5 * (squares - self.loc_nk.shape[-1]) - self._log_determinant()


Gaussian = DiagonalGaussian | FullGaussian


class Coupling(nn.Module):
    """An affine coupling layer: one half of noise is scaled and shifted by functions of the other half and of the cell.

    e_b -> e_b exp(s(e_a, m)) + t(e_a, m), log-determinant sum s (Dinh, Sohl-Dickstein, Bengio 2017, equations 4 to 8).
    A layer scales by a factor of e at most, and is the identity to begin with. m (n, k) is the posterior's location.
    """

    def __init__(self, n_latent: int, n_hidden: int, *, first: bool):
        super().__init__()
        self.first, self.half = first, (n_latent + 1) // 2
        n_kept = self.half if first else n_latent - self.half
        self.hidden = nn.Linear(n_kept + n_latent, n_hidden)
        self.out = nn.Linear(n_hidden, 2 * (n_latent - n_kept))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _parts(self, e_nk: Tensor, loc_nk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the half that is kept and the one that changes, the logarithm of its scale, and its shift."""
        shape = torch.broadcast_shapes(e_nk.shape[:-1], loc_nk.shape[:-1])
        e_nk, loc_nk = e_nk.expand(*shape, -1), loc_nk.expand(*shape, -1)
        halves = e_nk[..., : self.half], e_nk[..., self.half :]
        kept, changing = halves if self.first else halves[::-1]
        log_scale, shift = self.out(torch.relu(self.hidden(torch.cat([kept, loc_nk], dim=-1)))).chunk(2, dim=-1)
        return kept, changing, torch.tanh(log_scale), shift

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([kept, changed] if self.first else [changed, kept], dim=-1)

    def forward(self, e_nk: Tensor, loc_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed noise, (..., n, k), and the log-determinant, (..., n)."""
        kept, changing, log_scale, shift = self._parts(e_nk, loc_nk)
        return self._join(kept, changing * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, e_nk: Tensor, loc_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` made e of, and the log-determinant of `forward` there."""
        kept, changing, log_scale, shift = self._parts(e_nk, loc_nk)
        return self._join(kept, (changing - shift) * (-log_scale).exp()), log_scale.sum(-1)


class Flow(NamedTuple):
    """z = loc + scale * F(e): a diagonal Gaussian whose noise e ~ N(0, I) goes through coupling layers F before.

    log q(z | x) = log N(e; 0, I) - sum of the layers' log-determinants - sum log scale (Rezende, Mohamed 2015, equation
    13). F begins as the identity. Behind loc + scale e instead, and told the encoder's last layer, it moved cells about
    as a deeper encoder would, and split a cell line of sc_mixology (docs/inference.md, section 13).
    """

    base: DiagonalGaussian
    layers: nn.ModuleList

    def draw(self, noise_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, (..., n, k), and log q(z | x), (..., n)."""
        log_q_n = standard_normal_log_prob(noise_nk) - self.base.scale_nk.log().sum(-1)
        for layer in self.layers:
            noise_nk, log_determinant_n = layer(noise_nk, self.base.loc_nk)
            log_q_n = log_q_n - log_determinant_n
        return self.base.sample(noise_nk), log_q_n

    def log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z in nats, (..., n, k) -> (..., n)."""
        noise_nk = (z_nk - self.base.loc_nk) / self.base.scale_nk
        log_determinants_n = self.base.scale_nk.log().sum(-1)
        for layer in reversed(self.layers):
            noise_nk, log_determinant_n = layer.inverse(noise_nk, self.base.loc_nk)
            log_determinants_n = log_determinants_n + log_determinant_n
        return standard_normal_log_prob(noise_nk) - log_determinants_n

    def stopped_log_prob(self, z_nk: Tensor) -> Tensor:
        """Log-density of z, through which alone gradients pass (Roeder, Wu, Duvenaud 2017)."""
        base = DiagonalGaussian(*(part.detach() for part in self.base))
        trained = [parameter for parameter in self.layers.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(requires_grad=False)
        try:
            return Flow(base, self.layers).log_prob(z_nk)
        finally:
            for parameter in trained:
                parameter.requires_grad_()

    def moments(self, noise_snk: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z, (n, k) each, over these draws: a flow has no closed form of them."""
        z_snk, _ = self.draw(noise_snk)
        return z_snk.mean(0), z_snk.std(0, correction=0)


Posterior = DiagonalGaussian | FullGaussian | Flow
