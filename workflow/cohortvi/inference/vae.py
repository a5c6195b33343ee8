"""The model: a variational autoencoder of UMI counts (Lopez et al. 2018, Nature Methods 15:1053).

    z_n ~ N(0, I)
    rho_n = softmax(decoder(z_n, covariates_n))        expected fractions of the genes
    x_ng ~ likelihood(mean = library_n rho_ng, theta_g)
    q(z_n | x_n) = N(loc(x_n), scale(x_n)^2)           the encoder

docs/inference.md derives it. It assumes counts as they are (not normalised) and codes within the stated numbers of
categories.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cohortvi.inference.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from cohortvi.inference.networks import Covariates, Decoder, Encoder, Hidden
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.priors import StandardNormal

LIKELIHOODS = ("nb", "zinb", "poisson")
DISPERSIONS = ("gene", "gene-batch")


class VAE(nn.Module):
    """Encoder, decoder and dispersions. `settings` holds the arguments: VAE(**vae.settings) has the same shapes."""

    def __init__(  # noqa: PLR0913 - by name, and together they are the model
        self,
        n_genes: int,
        n_batches: int,
        *,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        dropout: float,
        likelihood: str,
        dispersion: str,
        n_categories: tuple[int, ...] = (),
        n_continuous: int = 0,
        encode_covariates: bool,
    ):
        super().__init__()
        _check("likelihood", likelihood, LIKELIHOODS)
        _check("dispersion", dispersion, DISPERSIONS)
        self.settings: dict[str, Any] = {
            "n_genes": n_genes,
            "n_batches": n_batches,
            "n_latent": n_latent,
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "dropout": dropout,
            "likelihood": likelihood,
            "dispersion": dispersion,
            "n_categories": tuple(n_categories),
            "n_continuous": n_continuous,
            "encode_covariates": encode_covariates,
        }
        self.likelihood, self.dispersion, self.encode_covariates = likelihood, dispersion, encode_covariates
        self.n_latent = n_latent
        self.prior = StandardNormal()
        codes = (n_batches, *n_categories)
        encoder_codes, n_encoded = (codes, n_continuous) if encode_covariates else ((), 0)
        encoder = Hidden(n_genes + n_encoded, n_hidden, n_layers, n_categories=encoder_codes, dropout=dropout)
        # No dropout in the decoder, as in scvi-tools: it would be noise on the likelihood's mean.
        decoder = Hidden(n_latent + n_continuous, n_hidden, n_layers, n_categories=codes, dropout=0.0)
        self.encoder = Encoder(n_latent, encoder)
        self.decoder = Decoder(n_genes, decoder, zero_inflated=likelihood == "zinb")
        if likelihood != "poisson":
            # N(0, 1) as in scvi-tools: genes start around theta = 1, between the over-dispersed and the Poisson-like.
            shape = (n_genes,) if dispersion == "gene" else (n_batches, n_genes)
            self.log_theta = nn.Parameter(torch.randn(shape))

    def encode(self, x_ng: Tensor, covariates: Covariates) -> DiagonalGaussian:
        """Return q(z | x), (n, k), of counts (n, g). Without encode_covariates the covariates do not matter."""
        h_nd, codes = torch.log1p(x_ng), ()
        if self.encode_covariates:
            h_nd, codes = _with_continuous(h_nd, covariates), (covariates.batch_n, *covariates.categories)
        return DiagonalGaussian(*self.encoder(h_nd, codes))

    def decode(self, z_nk: Tensor, library_n1: Tensor, covariates: Covariates) -> Likelihood:
        """Return p(x | z) of cells with `library_n1` UMI over the model's genes; z (n, k) -> parameters (n, g)."""
        codes = (covariates.batch_n, *covariates.categories)
        log_px_scale_ng, zi_logits_ng = self.decoder(_with_continuous(z_nk, covariates), codes)
        log_px_rate_ng = library_n1.log() + log_px_scale_ng
        if self.likelihood == "poisson":
            return Poisson(log_px_rate_ng)
        log_theta = self.log_theta if self.dispersion == "gene" else self.log_theta.index_select(0, covariates.batch_n)
        if zi_logits_ng is None:
            return NegativeBinomial(log_px_rate_ng, log_theta)
        return ZeroInflatedNegativeBinomial(log_px_rate_ng, log_theta, zi_logits_ng)


def observed_library(x_ng: Tensor) -> Tensor:
    """Return the UMI of each cell over the model's genes, (n, g) -> (n, 1).

    At least 1: a cell that has none of the selected genes would have mean 0 everywhere and log 0 in its likelihood.
    """
    return x_ng.sum(1, keepdim=True).clamp(min=1)


def _with_continuous(h_nd: Tensor, covariates: Covariates) -> Tensor:
    if covariates.continuous_nc is None:
        return h_nd
    return torch.cat([h_nd, covariates.continuous_nc], dim=1)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: found {value!r}; expected one of {', '.join(known)}")
