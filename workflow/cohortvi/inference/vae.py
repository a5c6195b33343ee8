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

from cohortvi.inference.fused import Head
from cohortvi.inference.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from cohortvi.inference.networks import Covariates, Decoder, Encoder, Hidden, observed_library
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.priors import StandardNormal
from cohortvi.inference.sparse import Counts, dense, is_fused

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
        told = {"n_categories": codes, "n_continuous": n_continuous}
        encoded = told if encode_covariates else {"n_categories": (), "n_continuous": 0}
        encoder = Hidden(n_hidden, n_layers, n_genes=n_genes, dropout=dropout, **encoded)
        # No dropout in the decoder, as in scvi-tools: it would be noise on the likelihood's mean.
        decoder = Hidden(n_hidden, n_layers, n_in=n_latent, dropout=0.0, **told)
        self.encoder = Encoder(n_latent, encoder)
        self.decoder = Decoder(n_genes, decoder, zero_inflated=likelihood == "zinb")
        if likelihood != "poisson":
            # N(0, 1) as in scvi-tools: genes start around theta = 1, between the over-dispersed and the Poisson-like.
            shape = (n_genes,) if dispersion == "gene" else (n_batches, n_genes)
            self.log_theta = nn.Parameter(torch.randn(shape))

    def encode(self, x: Counts, covariates: Covariates) -> DiagonalGaussian:
        """Return q(z | x), (n, k), of counts (n, g). Without encode_covariates the covariates do not matter."""
        if self.encode_covariates:
            return DiagonalGaussian(*self.encoder(x, _codes(covariates), covariates.continuous_nc))
        return DiagonalGaussian(*self.encoder(x, (), None))

    def decode(self, z_nk: Tensor, library_n1: Tensor, covariates: Covariates) -> Likelihood:
        """Return p(x | z) of cells with `library_n1` UMI over the model's genes; z (n, k) -> parameters (n, g)."""
        log_px_scale_ng, zi_logits_ng = self.decoder(self._hidden(z_nk, covariates))
        log_px_rate_ng = library_n1.log() + log_px_scale_ng
        if self.likelihood == "poisson":
            return Poisson(log_px_rate_ng)
        log_theta = self.log_theta if self.dispersion == "gene" else self.log_theta.index_select(0, covariates.batch_n)
        if zi_logits_ng is None:
            return NegativeBinomial(log_px_rate_ng, log_theta)
        return ZeroInflatedNegativeBinomial(log_px_rate_ng, log_theta, zi_logits_ng)

    def reconstruction(self, x: Counts, z_nk: Tensor, covariates: Covariates) -> Tensor:
        """Return -log p(x | z) of each cell, (n,), at its observed library; counts (n, g), z (n, k)."""
        library_n1 = observed_library(x)
        if not is_fused(x, z_nk):
            return -self.decode(z_nk, library_n1, covariates).log_prob(dense(x, z_nk.dtype)).sum(1)
        log_theta, rows_n = None, covariates.batch_n
        if self.likelihood != "poisson":
            log_theta = self.log_theta if self.dispersion == "gene-batch" else self.log_theta[None]
            rows_n = rows_n if self.dispersion == "gene-batch" else torch.zeros_like(rows_n)
        heads = [tensor for head in self.decoder.heads for tensor in (head.weight, head.bias)]
        h_nh = self._hidden(z_nk, covariates)
        return Head.apply(x, torch.is_grad_enabled(), rows_n, h_nh, library_n1[:, 0].log(), log_theta, *heads)

    def _hidden(self, z_nk: Tensor, covariates: Covariates) -> Tensor:
        return self.decoder.hidden(z_nk, _codes(covariates), covariates.continuous_nc)


def _codes(covariates: Covariates) -> tuple[Tensor, ...]:
    return (covariates.batch_n, *covariates.categories)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: found {value!r}; expected one of {', '.join(known)}")
