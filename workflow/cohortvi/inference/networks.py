"""The two neural networks of the model: counts to posterior (encoder), latent to likelihood parameters (decoder).

The architecture is scvi-tools': hidden layers of Linear - BatchNorm - ReLU - Dropout, each told the covariates
(continuous ones the first alone). Counts come dense, as sparse rows of a CPU, or as a GPU's.
n cells, g genes, k latent, h hidden.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohortvi.inference import ranks
from cohortvi.inference.fused import CountsProduct
from cohortvi.inference.posteriors import Coupling, DiagonalGaussian, Flow, FullGaussian, Posterior
from cohortvi.inference.sparse import Counts, DeviceCounts, dense, is_fused

MIN_VARIANCE = 1e-4  # of the posterior, as in scvi-tools: no cell's posterior collapses to a point
COUPLINGS = 4  # layers of a flow


class Covariates(NamedTuple):
    """What is known of the cells beside their counts."""

    batch_n: Tensor  # int64 code of the batch
    categories: tuple[Tensor, ...] = ()  # int64 codes, one (n,) for each categorical covariate
    continuous_nc: Tensor | None = None  # standardised; None where the model has none
    label_n: Tensor | None = None  # int64 code of the label, -1 where it is not known; None: of no cell

    def take(self, rows: Tensor | slice) -> "Covariates":
        """Return those of some cells."""
        return self.each(lambda values: values[rows])

    def to(self, device: torch.device) -> "Covariates":
        """Return the same on a device."""
        return self.each(lambda values: values.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Covariates":
        """Return the same with every tensor changed."""
        continuous_nc, label_n = (None if part is None else change(part) for part in (self.continuous_nc, self.label_n))
        return Covariates(change(self.batch_n), tuple(map(change, self.categories)), continuous_nc, label_n)


class CountsLinear(nn.Module):
    """A linear layer on log1p of counts. The weights of a gene lie together, for a cell's few genes to be added up."""

    def __init__(self, n_genes: int, n_out: int):
        super().__init__()
        self.weight_gh = nn.Parameter(torch.empty(n_genes, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Counts) -> Tensor:
        """Return (n, h)."""
        if is_fused(x, self.bias):
            if isinstance(x, DeviceCounts):
                return torch.mm(x.log1p_ng, self.weight_gh.to(x.log1p_ng.dtype)).to(self.bias.dtype) + self.bias
            return CountsProduct.apply(x, self.weight_gh, self.bias)
        return torch.addmm(self.bias, torch.log1p(dense(x, self.bias.dtype)), self.weight_gh)


class Told(NamedTuple):
    """What a network is told of the cells: codes of categories, and values, of which the first layer sees more."""

    codes: tuple[Tensor, ...] = ()  # (n,) each
    first_nv: Tensor | None = None
    later_nv: Tensor | None = None


class Teller(nn.Module):
    """Turns covariates into what a network is told: categories as they are, or embedded in a few dimensions each.

    One-hot codes (`n_embedding` 0) give every category weights of its own in every layer; an embedding is a vector of
    `n_embedding` values, the same for all layers, learnt. A covariate with one category tells nothing.
    """

    def __init__(self, n_categories: tuple[int, ...], n_continuous: int, n_embedding: int):
        super().__init__()
        self.kept = [at for at, n in enumerate(n_categories) if n > 1]
        sizes = tuple(n_categories[at] for at in self.kept)
        self.tables = nn.ModuleList(nn.Embedding(n, n_embedding) for n in sizes if n_embedding)
        self.n_categories, n_embedded = (() if n_embedding else sizes), n_embedding * len(sizes)
        self.n_first, self.n_later = n_continuous + n_embedded, n_embedded

    def forward(self, covariates: Covariates) -> Told:
        """Return what is told of these cells."""
        codes = (covariates.batch_n, *covariates.categories)
        codes = tuple(codes[at] for at in self.kept)
        if not self.tables:
            return Told(codes, covariates.continuous_nc)
        embedded = torch.cat([table(code_n) for table, code_n in zip(self.tables, codes, strict=True)], dim=1)
        parts = [part for part in (covariates.continuous_nc, embedded) if part is not None]
        return Told((), torch.cat(parts, dim=1), embedded)


class Others(nn.Module):
    """What covariates add to a linear layer: a row of weights for each value, and one for each category.

    The same as a product with values and one-hot codes, without making these: a cohort may have thousands of batches.
    """

    def __init__(self, n_categories: tuple[int, ...], n_values: int, n_out: int):
        super().__init__()
        self.n_values = n_values
        self.offsets = [n_values + sum(n_categories[:at]) for at in range(len(n_categories))]
        n_rows = n_values + sum(n_categories)
        self.weight_oh = nn.Parameter(torch.empty(n_rows, n_out)) if n_rows else None

    def forward(self, out_nh: Tensor, codes: tuple[Tensor, ...], values_nv: Tensor | None) -> Tensor:
        """Add to (n, h) what the covariates of these cells do."""
        if self.n_values:
            out_nh = torch.addmm(out_nh, values_nv, self.weight_oh[: self.n_values])
        for code_n, offset in zip(codes, self.offsets, strict=True):
            out_nh = out_nh + F.embedding(code_n + offset, self.weight_oh)
        return out_nh


def observed_library(x: Counts) -> Tensor:
    """Return the UMI of each cell over the model's genes, (n, g) -> (n, 1).

    At least 1: a cell that has none of the selected genes would have mean 0 everywhere and log 0 in its likelihood.
    """
    total_n = x.sum(1) if isinstance(x, Tensor) else x.library_n
    return total_n.clamp(min=1)[:, None]


NORMS = {
    # Momentum and eps of the original TensorFlow scVI, as in scvi-tools.
    "batch": lambda n_hidden: ranks.BatchNorm(n_hidden, eps=1e-3, momentum=0.01),
    "layer": nn.LayerNorm,
    "none": lambda n_hidden: nn.Identity(),
}


class Layer(nn.Module):
    """Linear - norm - ReLU - dropout, told covariates beside its input: counts (n, g) or values (n, d)."""

    def __init__(self, linear: CountsLinear | nn.Linear, others: Others, norm: str, dropout: float):
        super().__init__()
        self.linear, self.others, self.dropout = linear, others, dropout
        n_in, n_hidden = linear.weight_gh.shape if isinstance(linear, CountsLinear) else linear.weight.T.shape
        # As nn.Linear would be drawn with the covariates among its inputs.
        bound = 1 / math.sqrt(n_in + sum(len(parameter) for parameter in others.parameters()))
        for parameter in (*linear.parameters(), *others.parameters()):
            nn.init.uniform_(parameter, -bound, bound)
        self.norm = NORMS[norm](n_hidden)

    def forward(self, h: Counts, codes: tuple[Tensor, ...], values_nv: Tensor | None) -> Tensor:
        """Return (n, h)."""
        h_nh = F.relu(self.norm(self.others(self.linear(h), codes, values_nv)))
        if not (self.training and self.dropout):
            return h_nh
        bits_nh, least, kept = dropout_bits(*h_nh.shape, self.dropout, h_nh.device)
        return h_nh * ((bits_nh >= least) * kept)


class Hidden(nn.Module):
    """A stack of hidden layers with covariates told to each; the first one on `n_in` values or on counts."""

    def __init__(
        self,
        n_hidden: int,
        n_layers: int,
        teller: Teller,
        *,
        n_in: int = 0,
        n_genes: int = 0,
        norm: str,
        dropout: float,
    ):
        super().__init__()
        first = CountsLinear(n_genes, n_hidden) if n_genes else nn.Linear(n_in, n_hidden)
        linears = [first, *(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))]
        n_values = [teller.n_first, *[teller.n_later] * (n_layers - 1)]
        others = [Others(teller.n_categories, n, n_hidden) for n in n_values]
        pairs = zip(linears, others, strict=True)
        self.layers = nn.ModuleList(Layer(linear, other, norm, dropout) for linear, other in pairs)

    def forward(self, h: Counts, told: Told) -> Tensor:
        """Return the last hidden layer, (n, h), of counts (n, g) or values (n, d)."""
        values_nv = told.first_nv
        for layer in self.layers:
            h, values_nv = layer(h, told.codes, values_nv), told.later_nv
        return h


def dropout_bits(n: int, n_hidden: int, share: float, device: torch.device) -> tuple[Tensor, int, float]:
    """Return random bits (n, h) int16, the least with which a unit is kept, and 1 / (1 - share); no bits for share 0.

    Four units a random number: drawn one at a time, they are an eighth of a small step's time.
    """
    if not share:
        return torch.empty(0, n_hidden, dtype=torch.int16, device=device), 0, 1.0
    shape = ranks.whole(n), n_hidden
    size = shape[0] * shape[1]
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    bits_nh = ranks.own(bits.view(torch.int16)[:size].view(shape))
    return bits_nh, round(share * 2**16) - 2**15, 1 / (1 - share)


class Encoder(nn.Module):
    """q(z | x) from log1p of the counts and, if it is told them, the covariates.

    `posterior`: diagonal, full (a Cholesky factor beside the means) or flow (coupling layers before the diagonal one).
    """

    def __init__(self, n_latent: int, hidden: Hidden, posterior: str):
        super().__init__()
        self.hidden = hidden
        n_hidden = len(hidden.layers[-1].linear.bias)
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)
        self.lower, self.flow = None, None
        if posterior == "full":
            self.lower = nn.Linear(n_hidden, n_latent * (n_latent - 1) // 2)
            nn.init.zeros_(self.lower.weight)
            nn.init.zeros_(self.lower.bias)
        if posterior == "flow":
            self.flow = nn.ModuleList(Coupling(n_latent, n_hidden, first=at % 2 == 0) for at in range(COUPLINGS))

    def forward(self, x: Counts, told: Told) -> Posterior:
        """Return q(z | x); variance = exp(log_variance) + 1e-4, of the full one that of the factor's diagonal."""
        h_nh = self.hidden(x, told)
        diagonal = DiagonalGaussian(self.loc(h_nh), (self.log_variance(h_nh).exp() + MIN_VARIANCE).sqrt())
        if self.flow is not None:
            return Flow(diagonal, self.flow)
        if self.lower is None:
            return diagonal
        rows, columns = torch.tril_indices(*[diagonal.loc_nk.shape[1]] * 2, -1, device=h_nh.device)
        tril_nkk = torch.diag_embed(diagonal.scale_nk)
        tril_nkk[:, rows, columns] = self.lower(h_nh)
        return FullGaussian(diagonal.loc_nk, tril_nkk)


def _to_genes(n_hidden: int, n_genes: int) -> nn.Linear:
    """Return a linear layer whose weight, (g, h), lies in memory as (h, g): so its gradient is made (fused.py)."""
    linear = nn.Linear(n_hidden, n_genes)
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    return linear


class Decoder(nn.Module):
    """What the likelihood needs of every gene, from the latent and the covariates.

    Nonlinear: hidden layers, then a linear head. Linear (Svensson et al. 2020, Bioinformatics 36:3418): the head alone,
    on the latent and the covariates' one-hot codes, so that its first columns are loadings of the latent dimensions.
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        teller: Teller,
        hidden: Hidden | None,
        *,
        zero_inflated: bool,
        own_theta: bool,
    ):
        super().__init__()
        self.hidden, self.n_categories = hidden, teller.n_categories
        n_in = n_latent + teller.n_first + sum(teller.n_categories)
        n_hidden = n_in if hidden is None else len(hidden.layers[-1].linear.bias)
        self.px_scale = _to_genes(n_hidden, n_genes)
        # scvi-tools computes this head for every likelihood; only ZINB has a use for it.
        self.zi_logits = _to_genes(n_hidden, n_genes) if zero_inflated else None
        self.log_theta = nn.Linear(n_hidden, n_genes) if own_theta else None  # of dispersion gene-cell

    @property
    def heads(self) -> tuple[nn.Linear, ...]:
        """The linear layers that the likelihood's mean and zero inflation end in."""
        return (self.px_scale,) if self.zi_logits is None else (self.px_scale, self.zi_logits)

    @property
    def head_tensors(self) -> list[Tensor]:
        """The weight (g, h) and bias (g,) of each of them, one after the other."""
        return [tensor for head in self.heads for tensor in (head.weight, head.bias)]

    def features(self, z_nk: Tensor, told: Told) -> Tensor:
        """Return what the heads see, (n, h)."""
        if self.hidden is not None:
            return self.hidden(z_nk, told)
        one_hot = (F.one_hot(code_n, n).to(z_nk.dtype) for code_n, n in zip(told.codes, self.n_categories, strict=True))
        return torch.cat([z_nk, *([] if told.first_nv is None else [told.first_nv]), *one_hot], dim=1)

    def forward(self, h_nh: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log px_scale (its exponential sums to 1 over genes), zi_logits and log_theta, (n, g) each or None."""
        zi_logits_ng, log_theta_ng = (head if head is None else head(h_nh) for head in (self.zi_logits, self.log_theta))
        return F.log_softmax(self.px_scale(h_nh), dim=1), zi_logits_ng, log_theta_ng
