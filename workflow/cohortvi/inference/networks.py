"""The two neural networks of the model: counts to posterior (encoder), latent to likelihood parameters (decoder).

The architecture is scvi-tools': hidden layers of Linear - BatchNorm - ReLU - Dropout, covariates concatenated to the
input of every hidden layer (one-hot; continuous ones to the first alone). A covariate with one category adds nothing
and takes no columns. n cells, g genes, k latent, h hidden.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_VARIANCE = 1e-4  # of the posterior, as in scvi-tools: no cell's posterior collapses to a point


class Covariates(NamedTuple):
    """What is known of the cells beside their counts."""

    batch_n: Tensor  # int64 code of the batch
    categories: tuple[Tensor, ...] = ()  # int64 codes, one (n,) for each categorical covariate
    continuous_nc: Tensor | None = None  # standardised; None where the model has none


class Hidden(nn.Module):
    """A stack of hidden layers with covariates injected into each."""

    def __init__(self, n_in: int, n_hidden: int, n_layers: int, *, n_categories: tuple[int, ...], dropout: float):
        super().__init__()
        self.n_categories = n_categories
        n_one_hot = sum(n for n in n_categories if n > 1)
        widths = [n_in] + [n_hidden] * (n_layers - 1)
        self.linears = nn.ModuleList(nn.Linear(width + n_one_hot, n_hidden) for width in widths)
        # Momentum and eps of the original TensorFlow scVI, as in scvi-tools.
        self.norms = nn.ModuleList(nn.BatchNorm1d(n_hidden, eps=1e-3, momentum=0.01) for _ in widths)
        self.dropout = dropout

    def forward(self, h_nd: Tensor, codes: tuple[Tensor, ...]) -> Tensor:
        """Return the last hidden layer, (n, d) -> (n, h); `codes` are (n,) integers, one for each of n_categories."""
        pairs = zip(codes, self.n_categories, strict=True)
        one_hot = [F.one_hot(code_n, n).to(h_nd.dtype) for code_n, n in pairs if n > 1]
        for linear, norm in zip(self.linears, self.norms, strict=True):
            h_nd = F.relu(norm(linear(torch.cat([h_nd, *one_hot], dim=1))))
            h_nd = F.dropout(h_nd, self.dropout, self.training)
        return h_nd


class Encoder(nn.Module):
    """Parameters of q(z | x) from log1p of the counts and, if it is told them, the covariates."""

    def __init__(self, n_latent: int, hidden: Hidden):
        super().__init__()
        self.hidden = hidden
        n_hidden = hidden.linears[-1].out_features
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(self, h_nd: Tensor, codes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return loc and scale, (n, k) each; variance = exp(log_variance) + 1e-4."""
        h_nh = self.hidden(h_nd, codes)
        return self.loc(h_nh), (self.log_variance(h_nh).exp() + MIN_VARIANCE).sqrt()


class Decoder(nn.Module):
    """Log expected fractions and zero-inflation logits of every gene, from the latent and the covariates."""

    def __init__(self, n_genes: int, hidden: Hidden, *, zero_inflated: bool):
        super().__init__()
        self.hidden = hidden
        n_hidden = hidden.linears[-1].out_features
        self.px_scale = nn.Linear(n_hidden, n_genes)
        # scvi-tools computes this head for every likelihood; only ZINB has a use for it.
        self.zi_logits = nn.Linear(n_hidden, n_genes) if zero_inflated else None

    def forward(self, h_nd: Tensor, codes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return log px_scale (its exponential sums to 1 over genes) and zi_logits, (n, g) each; the latter or None."""
        h_nh = self.hidden(h_nd, codes)
        log_px_scale_ng = F.log_softmax(self.px_scale(h_nh), dim=1)
        return log_px_scale_ng, None if self.zi_logits is None else self.zi_logits(h_nh)
