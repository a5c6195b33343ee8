"""The two neural networks of the model: counts to posterior (encoder), latent to likelihood parameters (decoder).

The architecture is scvi-tools': hidden layers of Linear - BatchNorm - ReLU - Dropout, each told the covariates
(continuous ones the first alone). Counts come dense or, on CPUs, as sparse rows. n cells, g genes, k latent, h hidden.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohortvi.inference.fused import CountsProduct
from cohortvi.inference.sparse import Counts, SparseCounts, dense, is_fused

MIN_VARIANCE = 1e-4  # of the posterior, as in scvi-tools: no cell's posterior collapses to a point


class Covariates(NamedTuple):
    """What is known of the cells beside their counts."""

    batch_n: Tensor  # int64 code of the batch
    categories: tuple[Tensor, ...] = ()  # int64 codes, one (n,) for each categorical covariate
    continuous_nc: Tensor | None = None  # standardised; None where the model has none


class CountsLinear(nn.Module):
    """A linear layer on log1p of counts. The weights of a gene lie together, for a cell's few genes to be added up."""

    def __init__(self, n_genes: int, n_out: int):
        super().__init__()
        self.weight_gh = nn.Parameter(torch.empty(n_genes, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Counts) -> Tensor:
        """Return (n, h)."""
        if is_fused(x, self.bias):
            return CountsProduct.apply(x, self.weight_gh, self.bias)
        return torch.addmm(self.bias, torch.log1p(dense(x, self.bias.dtype)), self.weight_gh)


class Others(nn.Module):
    """What covariates add to a linear layer: a row of weights for each continuous one, and one for each category.

    The same as a product with standardised values and one-hot codes, without making these: a cohort may have thousands
    of batches. A covariate with one category adds nothing and has no row.
    """

    def __init__(self, n_categories: tuple[int, ...], n_continuous: int, n_out: int):
        super().__init__()
        self.kept = [at for at, n in enumerate(n_categories) if n > 1]
        sizes = [n_categories[at] for at in self.kept]
        self.offsets = [n_continuous + sum(sizes[:at]) for at in range(len(sizes))]
        self.n_continuous = n_continuous
        n_rows = n_continuous + sum(sizes)
        self.weight_oh = nn.Parameter(torch.empty(n_rows, n_out)) if n_rows else None

    def forward(self, out_nh: Tensor, codes: tuple[Tensor, ...], continuous_nc: Tensor | None) -> Tensor:
        """Add to (n, h) what the covariates of these cells do."""
        if self.n_continuous:
            out_nh = torch.addmm(out_nh, continuous_nc, self.weight_oh[: self.n_continuous])
        for at, offset in zip(self.kept, self.offsets, strict=True):
            out_nh = out_nh + F.embedding(codes[at] + offset, self.weight_oh)
        return out_nh


def observed_library(x: Counts) -> Tensor:
    """Return the UMI of each cell over the model's genes, (n, g) -> (n, 1).

    At least 1: a cell that has none of the selected genes would have mean 0 everywhere and log 0 in its likelihood.
    """
    total_n = x.library_n if isinstance(x, SparseCounts) else x.sum(1)
    return total_n.clamp(min=1)[:, None]


class Layer(nn.Module):
    """Linear - norm - ReLU - dropout, told covariates beside its input: counts (n, g) or values (n, d)."""

    def __init__(self, linear: CountsLinear | nn.Linear, others: Others, dropout: float):
        super().__init__()
        self.linear, self.others, self.dropout = linear, others, dropout
        n_in, n_hidden = linear.weight_gh.shape if isinstance(linear, CountsLinear) else linear.weight.T.shape
        # As nn.Linear would be drawn with the covariates among its inputs.
        bound = 1 / math.sqrt(n_in + sum(len(parameter) for parameter in others.parameters()))
        for parameter in (*linear.parameters(), *others.parameters()):
            nn.init.uniform_(parameter, -bound, bound)
        # Momentum and eps of the original TensorFlow scVI, as in scvi-tools.
        self.norm = nn.BatchNorm1d(n_hidden, eps=1e-3, momentum=0.01)

    def forward(self, h: Counts, codes: tuple[Tensor, ...], continuous_nc: Tensor | None) -> Tensor:
        """Return (n, h)."""
        h_nh = F.relu(self.norm(self.others(self.linear(h), codes, continuous_nc)))
        return h_nh * dropout_mask(h_nh, self.dropout) if self.training and self.dropout else h_nh


class Hidden(nn.Module):
    """A stack of hidden layers with covariates injected into each; the first one on `n_in` values or on counts."""

    def __init__(
        self,
        n_hidden: int,
        n_layers: int,
        *,
        n_in: int = 0,
        n_genes: int = 0,
        n_continuous: int,
        n_categories: tuple[int, ...],
        dropout: float,
    ):
        super().__init__()
        first = CountsLinear(n_genes, n_hidden) if n_genes else nn.Linear(n_in, n_hidden)
        linears = [first, *(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))]
        others = [Others(n_categories, n_continuous if linear is first else 0, n_hidden) for linear in linears]
        pairs = zip(linears, others, strict=True)
        self.layers = nn.ModuleList(Layer(linear, other, dropout) for linear, other in pairs)

    def forward(self, h: Counts, codes: tuple[Tensor, ...], continuous_nc: Tensor | None) -> Tensor:
        """Return the last hidden layer, (n, h), of counts (n, g) or values (n, d).

        `codes` are (n,) integers, one for each of n_categories.
        """
        for layer in self.layers:
            h = layer(h, codes, continuous_nc)
        return h


def dropout_mask(h_nh: Tensor, share: float) -> Tensor:
    """Return 0 for this share of the units, at random, and 1 / (1 - share) for the others.

    Of 16 random bits each, four units a random number: drawn one at a time, they are an eighth of a small step's time.
    """
    bits = torch.empty(-(-h_nh.numel() // 4), dtype=torch.int64, device=h_nh.device).random_(-(2**63), None)
    least = round(share * 2**16) - 2**15
    kept = bits.view(torch.int16)[: h_nh.numel()].view(h_nh.shape) >= least
    return kept * (1 / (1 - share))


class Encoder(nn.Module):
    """Parameters of q(z | x) from log1p of the counts and, if it is told them, the covariates."""

    def __init__(self, n_latent: int, hidden: Hidden):
        super().__init__()
        self.hidden = hidden
        n_hidden = len(hidden.layers[-1].linear.bias)
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(self, x: Counts, codes: tuple[Tensor, ...], continuous_nc: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return loc and scale, (n, k) each; variance = exp(log_variance) + 1e-4."""
        h_nh = self.hidden(x, codes, continuous_nc)
        return self.loc(h_nh), (self.log_variance(h_nh).exp() + MIN_VARIANCE).sqrt()


class Decoder(nn.Module):
    """Log expected fractions and zero-inflation logits of every gene, from the latent and the covariates."""

    def __init__(self, n_genes: int, hidden: Hidden, *, zero_inflated: bool):
        super().__init__()
        self.hidden = hidden
        n_hidden = len(hidden.layers[-1].linear.bias)
        self.px_scale = nn.Linear(n_hidden, n_genes)
        # scvi-tools computes this head for every likelihood; only ZINB has a use for it.
        self.zi_logits = nn.Linear(n_hidden, n_genes) if zero_inflated else None

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        """The linear layers that end in genes."""
        return (self.px_scale,) if self.zi_logits is None else (self.px_scale, self.zi_logits)

    def forward(self, h_nh: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log px_scale (its exponential sums to 1 over genes) and zi_logits, (n, g) each, the latter or None.

        Of the last hidden layer, (n, h).
        """
        log_px_scale_ng = F.log_softmax(self.px_scale(h_nh), dim=1)
        return log_px_scale_ng, None if self.zi_logits is None else self.zi_logits(h_nh)
