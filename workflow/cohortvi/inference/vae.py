"""The model: a variational autoencoder of UMI counts (Lopez et al. 2018, Nature Methods 15:1053).

    z_n ~ p(z)                                         standard normal, a mixture of Gaussians, or a VampPrior
    rho_n = softmax(decoder(z_n, covariates_n))        expected fractions of the genes
    x_ng ~ likelihood(mean = library_n rho_ng, theta)
    q(z_n | x_n) = the encoder's posterior             Gaussian, diagonal or of full covariance, or a flow

With a latent library, log library_n = loc + scale u_n of the cell's batch, and u_n ~ N(0, 1) is one more latent
dimension, the last. With labels, p(z) is a mixture with a component for each: p(z, y) = p(y) p(z | y), from which
p(y | z) follows by Bayes' rule. docs/inference.md derives it. It assumes counts as they are (not normalised) and codes
within the stated numbers of categories.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cohortvi.inference.fused import Head
from cohortvi.inference.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from cohortvi.inference.networks import Covariates, Decoder, Encoder, Hidden, Teller, Told, observed_library
from cohortvi.inference.posteriors import Posterior, standard_normal_log_prob
from cohortvi.inference.priors import (
    GaussianMixture,
    Prior,
    StandardNormal,
    VampPrior,
    mixture_divergence,
    mixture_log_prob,
    mixture_sample,
)
from cohortvi.inference.sparse import Counts, dense, is_fused

CHOICES = {
    "likelihood": ("nb", "zinb", "poisson"),
    "dispersion": ("gene", "gene-batch", "gene-cell", "gene-label"),
    "library": ("observed", "latent"),
    "posterior": ("diagonal", "full", "flow"),
    "prior": ("standard_normal", "mixture", "vamp"),
    "decoder": ("nonlinear", "linear"),
    "norm": ("batch", "layer", "none"),
    "coding": ("one_hot", "embedding"),
}


class VAE(nn.Module):
    """Encoder, decoder, prior and dispersions. `settings` holds the arguments: VAE(**settings) has the same shapes."""

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
        library: str = "observed",
        posterior: str = "diagonal",
        prior: str = "standard_normal",
        n_components: int = 50,
        n_labels: int = 0,
        decoder: str = "nonlinear",
        norm: str = "batch",
        coding: str = "one_hot",
        n_embedding: int = 10,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        for name, known in CHOICES.items():
            if self.settings[name] not in known:
                raise ValueError(f"{name}: found {self.settings[name]!r}; expected one of {', '.join(known)}")
        self.settings["n_categories"] = tuple(n_categories)
        if dispersion == "gene-label" and not n_labels:
            raise ValueError("dispersion: found 'gene-label' and no labels; expected another, or a model with labels")
        if n_labels and prior != "mixture":
            raise ValueError(f"prior: found {prior!r} and {n_labels} labels; expected 'mixture', a component a label")
        self.likelihood, self.dispersion, self.library = likelihood, dispersion, library
        self.encode_covariates, self.n_latent, self.n_labels = encode_covariates, n_latent, n_labels
        n_embedding = n_embedding if coding == "embedding" else 0
        codes = (n_batches, *n_categories)
        self.told_encoder = Teller(codes, n_continuous, n_embedding) if encode_covariates else Teller((), 0, 0)
        self.told_decoder = Teller(codes, n_continuous, n_embedding)
        both = {"norm": norm}
        hidden = Hidden(n_hidden, n_layers, self.told_encoder, n_genes=n_genes, dropout=dropout, **both)
        self.encoder = Encoder(self.n_dimensions, hidden, posterior)
        # No dropout in the decoder, as in scvi-tools: it would be noise on the likelihood's mean.
        nonlinear = decoder == "nonlinear"
        hidden = (
            Hidden(n_hidden, n_layers, self.told_decoder, n_in=n_latent, dropout=0.0, **both) if nonlinear else None
        )
        own = {"zero_inflated": likelihood == "zinb", "own_theta": self._has_theta and dispersion == "gene-cell"}
        self.decoder = Decoder(n_genes, n_latent, self.told_decoder, hidden, **own)
        if self._has_theta and dispersion != "gene-cell":
            # N(0, 1) as in scvi-tools: genes start around theta = 1, between the over-dispersed and the Poisson-like.
            rows = {"gene": (), "gene-batch": (n_batches,), "gene-label": (n_labels,)}[dispersion]
            self.log_theta = nn.Parameter(torch.randn(*rows, n_genes))
        self.prior: Prior = StandardNormal()
        if prior == "mixture":
            self.prior = GaussianMixture(n_labels or n_components, n_latent)
        if prior == "vamp":
            told = (len(codes), n_continuous) if encode_covariates else (0, 0)
            self.prior = VampPrior(n_components, n_genes, *told)
        if library == "latent":  # mean and standard deviation of the log library in each batch, over the training cells
            self.register_buffer("library_loc_b", torch.zeros(n_batches))
            self.register_buffer("library_scale_b", torch.ones(n_batches))

    @property
    def n_dimensions(self) -> int:
        """Latent dimensions of a cell, a latent library among them."""
        return self.n_latent + (self.library == "latent")

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.decoder.px_scale.weight.device

    @property
    def decoder_mixes_cells(self) -> bool:
        """Whether p(x | z) of a cell depends on the other cells at hand: by batch norm in the decoder, in training."""
        has_norm = self.settings["norm"] == "batch" and self.settings["decoder"] == "nonlinear"
        return has_norm and self.decoder.training

    @property
    def has_shared_theta(self) -> bool:
        """Whether no cell has dispersions of its own: those of a Poisson, which has none, of genes, or of batches."""
        return not self._has_theta or self.dispersion in ("gene", "gene-batch")

    def shared_theta(self, batch_n: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return log theta (r, g), None of a Poisson, and which of its rows each cell has, (n,)."""
        if self._has_theta and self.dispersion == "gene-batch":
            return self.log_theta, batch_n
        return self.log_theta[None] if self._has_theta else None, torch.zeros_like(batch_n)

    @property
    def _has_theta(self) -> bool:
        return self.likelihood != "poisson"

    def encode(self, x: Counts, covariates: Covariates) -> Posterior:
        """Return q(z | x) of counts (n, g); a latent library is its last dimension.

        Without encode_covariates the covariates do not matter.
        """
        return self.encoder(x, self.told_encoder(covariates) if self.encode_covariates else Told())

    def log_prior(self, z_nk: Tensor, label_n: Tensor | None = None) -> Tensor:
        """Return log p(z), or of cells with a label (code >= 0) log p(z, label), in nats, (..., k) -> (...)."""
        if isinstance(self.prior, VampPrior):
            return mixture_log_prob(z_nk, self._pseudo_posteriors(), self.prior.logits_c)
        if label_n is None:
            log_p = self.prior.log_prob(z_nk[..., : self.n_latent])
        else:
            log_p_nl = self.prior.log_joint(z_nk[..., : self.n_latent])
            log_p = torch.where(label_n < 0, log_p_nl.logsumexp(-1), _taken(log_p_nl, label_n))
        is_latent = self.library == "latent"
        return log_p + standard_normal_log_prob(z_nk[..., self.n_latent :]) if is_latent else log_p

    def prior_divergence(self, noise_nk: Tensor) -> Tensor:
        """Return the mean KL(component || N(0, I)) of a mixture or VampPrior in nats, a scalar; else 0.

        Standard normal noise (n, k), of which any number of rows will do, is for components that are flows.
        """
        if isinstance(self.prior, StandardNormal):
            return noise_nk.new_zeros(())
        rows_c = torch.arange(len(self.prior.logits_c), device=noise_nk.device) % len(noise_nk)
        is_vamp = isinstance(self.prior, VampPrior)
        components = self._pseudo_posteriors() if is_vamp else self.prior.components
        return mixture_divergence(components, self.prior.logits_c, noise_nk[rows_c])

    def log_label(self, z_nk: Tensor) -> Tensor:
        """Return log p(y | z) of every label y by Bayes' rule, in nats, (..., k) -> (..., labels)."""
        return self.prior.log_joint(z_nk[..., : self.n_latent]).log_softmax(-1)

    def label_loss(self, z_nk: Tensor, label_n: Tensor) -> Tensor:
        """Return -log p(label | z) of cells with a label, in nats, and 0 of the others; (n, k), (n,) -> (n,)."""
        return torch.where(label_n < 0, 0.0, -_taken(self.log_label(z_nk), label_n))

    def _pseudo_posteriors(self) -> Posterior:
        """Return the posteriors of the pseudo-inputs, by the statistics of the cells that were seen before."""
        prior, (batch_c, *categories) = self.prior, self.prior.codes if len(self.prior.codes) else (None,)
        training = self.encoder.training
        self.encoder.eval()
        continuous = prior.continuous if prior.continuous.shape[1] else None
        qz = self.encode(torch.expm1(prior.pseudo_cg), Covariates(batch_c, tuple(categories), continuous))
        self.encoder.train(training)
        return qz

    def decode(self, z_nk: Tensor, library_n1: Tensor, covariates: Covariates) -> Likelihood:
        """Return p(x | z) of cells with `library_n1` UMI over the model's genes; z (n, k) -> parameters (n, g)."""
        return self._likelihood(z_nk, library_n1.log(), covariates)

    def px_scale(self, z_nk: Tensor, covariates: Covariates) -> Tensor:
        """Return the expected fractions of the genes of cells with these latent values, (n, k) -> (n, g)."""
        return self.decoder(self._features(z_nk, covariates))[0].exp()

    def predict(self, x: Counts, z_nk: Tensor, covariates: Covariates) -> Likelihood:
        """Return p(x | z) of cells with these latent values, (n, k), and the library of x where it is observed."""
        return self._likelihood(z_nk, self._log_library(x, z_nk, covariates), covariates)

    def sample_prior(self, n: int) -> Tensor:
        """Return n draws of p(z), (n, k), by torch's generators."""
        z_nk = torch.randn(n, self.n_dimensions, device=self.device)
        if isinstance(self.prior, VampPrior):
            return mixture_sample(n, self._pseudo_posteriors(), self.prior.logits_c)
        if isinstance(self.prior, GaussianMixture):
            z_nk[:, : self.n_latent] = mixture_sample(n, self.prior.components, self.prior.logits_c)
        return z_nk

    def reconstruction(self, x: Counts, z_nk: Tensor, covariates: Covariates) -> Tensor:
        """Return -log p(x | z) of each cell, (n,); counts (n, g), z (n, k). An observed library is that of x."""
        if not (is_fused(x, z_nk) and self.has_shared_theta):
            return -self.predict(x, z_nk, covariates).log_prob(dense(x, z_nk.dtype)).sum(1)
        h_nh, log_library_n1 = self._features(z_nk, covariates), self._log_library(x, z_nk, covariates)
        log_theta, rows_n = self.shared_theta(covariates.batch_n)
        heads = self.decoder.head_tensors
        return Head.apply(x, torch.is_grad_enabled(), rows_n, h_nh, log_library_n1[:, 0], log_theta, *heads)

    def log_joint(self, x: Counts, covariates: Covariates) -> Callable[[Tensor], Tensor]:
        """Return a function of z: log p(x | z) + log p(z) of these cells in nats, (n, k) -> (n,)."""
        return lambda z_nk: self.log_prior(z_nk) - self.reconstruction(x, z_nk, covariates)

    def _features(self, z_nk: Tensor, covariates: Covariates) -> Tensor:
        return self.decoder.features(z_nk[:, : self.n_latent], self.told_decoder(covariates))

    def _log_library(self, x: Counts, z_nk: Tensor, covariates: Covariates) -> Tensor:
        if self.library == "observed":
            return observed_library(x).log()
        loc_n, scale_n = self.library_loc_b[covariates.batch_n], self.library_scale_b[covariates.batch_n]
        return (loc_n + scale_n * z_nk[:, self.n_latent])[:, None]

    def _likelihood(self, z_nk: Tensor, log_library_n1: Tensor, covariates: Covariates) -> Likelihood:
        log_px_scale_ng, zi_logits_ng, log_theta = self.decoder(self._features(z_nk, covariates))
        log_px_rate_ng = log_library_n1 + log_px_scale_ng
        if not self._has_theta:
            return Poisson(log_px_rate_ng)
        if self.dispersion == "gene":
            log_theta = self.log_theta
        elif self.dispersion == "gene-batch":
            log_theta = self.log_theta.index_select(0, covariates.batch_n)
        elif self.dispersion == "gene-label":  # log theta is that of the labels, by p(y | z): known or not, the same
            log_theta = self.log_label(z_nk).exp() @ self.log_theta
        if zi_logits_ng is None:
            return NegativeBinomial(log_px_rate_ng, log_theta)
        return ZeroInflatedNegativeBinomial(log_px_rate_ng, log_theta, zi_logits_ng)


def _taken(values_nl: Tensor, label_n: Tensor) -> Tensor:
    return values_nl.gather(-1, label_n.clamp(min=0)[:, None])[:, 0]
