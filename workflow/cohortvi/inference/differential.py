"""Genes that differ between two groups of cells, by draws from a model's posterior (Lopez et al. 2018, Methods,
"Bayesian differential expression"; the change mode and importance weights: Boyeau et al. 2019, bioRxiv 794289).

    rho(z, batch)  = expected fractions of the genes of a cell         the model's px_scale
    LFC_g          = log2(rho_g(z_a) + c) - log2(rho_g(z_b) + c),      a, b random cells of the two groups
    p_g            = P(|LFC_g| > delta)                                over cells and their posteriors

z_a comes from the cell's own posterior: draws of q(z | x), resampled with weights p(x, z) / q(z | x). Where both groups
have cells of the same batches, pairs are of one batch, so that what the batch does to a gene is on both sides. n cells,
r draws a cell, m pairs, g genes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE

PROPOSALS = 100  # draws of q for each cell, of which
KEPT = 10  # are kept
TOGETHER = 512  # pairs decoded together


class Population(NamedTuple):
    """Cells with draws of their posteriors, (n, r, k), and their covariates."""

    z_nrk: Tensor
    covariates: Covariates

    def take(self, rows: np.ndarray) -> "Population":
        """Return the cells of these numbers."""
        rows_m = torch.from_numpy(rows)
        return Population(self.z_nrk[rows_m], self.covariates.take(rows_m))


def join_populations(parts: Sequence[Population]) -> Population:
    """Return the cells of all parts, in order."""
    told = [part.covariates for part in parts]
    categories = tuple(torch.cat(codes) for codes in zip(*(one.categories for one in told), strict=True))
    continuous = None if told[0].continuous_nc is None else torch.cat([one.continuous_nc for one in told])
    batch_n = torch.cat([one.batch_n for one in told])
    return Population(torch.cat([part.z_nrk for part in parts]), Covariates(batch_n, categories, continuous))


class Changes(NamedTuple):
    """What is found of each gene, (g,): P(|LFC| > delta), mean and standard deviation of LFC, mean fractions."""

    p_g: np.ndarray
    lfc_g: np.ndarray
    sd_g: np.ndarray
    first_g: np.ndarray
    second_g: np.ndarray


@torch.no_grad()
def draw_population(vae: VAE, x: Counts, covariates: Covariates) -> Population:
    """Return draws from the posterior of each cell, by importance resampling; by torch's generators."""
    qz = vae.encode(x, covariates)
    noise_snk = torch.randn(PROPOSALS, len(covariates.batch_n), vae.n_dimensions, device=vae.device)
    z_snk, log_q_sn = qz.draw(noise_snk)
    log_joint = vae.log_joint(x, covariates)
    weights_ns = (torch.stack([log_joint(z_nk) for z_nk in z_snk]) - log_q_sn).T.softmax(1)
    picked_nr = torch.multinomial(weights_ns, KEPT, replacement=True)
    return Population(z_snk[picked_nr, torch.arange(len(picked_nr))[:, None]], covariates)


def pair_cells(
    first_n: np.ndarray, second_n: np.ndarray, n_pairs: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the numbers of the cells of n_pairs random pairs, given each group's batches, and if pairs share them.

    Batches that both groups have count by the harmonic mean of their cells. Where there is none, all pairs do.
    """
    shared = np.intersect1d(first_n, second_n)
    if not len(shared):
        return *(generator.integers(len(batches), size=n_pairs) for batches in (first_n, second_n)), False
    sizes = np.array([[(batches == batch).sum() for batch in shared] for batches in (first_n, second_n)])
    weights = 1 / (1 / sizes).sum(0)
    counts = generator.multinomial(n_pairs, weights / weights.sum())
    pairs = [
        [generator.choice(np.flatnonzero(batches == batch), count) for batch, count in zip(shared, counts, strict=True)]
        for batches in (first_n, second_n)
    ]
    return np.concatenate(pairs[0]), np.concatenate(pairs[1]), True


@torch.no_grad()
def changes(vae: VAE, first: Population, second: Population, *, delta: float, pseudocount: float, seed: int) -> Changes:
    """Return what differs between pairs of cells, the i-th of `first` and the i-th of `second`.

    `delta`: of log2; `pseudocount`: c above, in fractions of a cell's UMI.
    """
    generator, n_pairs = np.random.default_rng(seed), len(first.z_nrk)
    sums = np.zeros((5, vae.settings["n_genes"]))
    for start in range(0, n_pairs, TOGETHER):
        rows = np.arange(start, min(start + TOGETHER, n_pairs))
        rho_mg, tau_mg = (_fractions(vae, group.take(rows), generator) for group in (first, second))
        lfc_mg = (rho_mg + pseudocount).log2() - (tau_mg + pseudocount).log2()
        found = [(lfc_mg.abs() > delta).double(), lfc_mg, lfc_mg.double() ** 2, rho_mg, tau_mg]
        sums += np.stack([values.double().sum(0).cpu().numpy() for values in found])
    p_g, lfc_g, squares_g, first_g, second_g = sums / n_pairs
    return Changes(p_g, lfc_g, np.sqrt(np.maximum(squares_g - lfc_g**2, 0)), first_g, second_g)


def _fractions(vae: VAE, cells: Population, generator: np.random.Generator) -> Tensor:
    """Return rho of a random draw of each cell, (m, g)."""
    n, r, _ = cells.z_nrk.shape
    z_nk = cells.z_nrk[torch.arange(n), torch.from_numpy(generator.integers(r, size=n))]
    return vae.px_scale(z_nk, cells.covariates)


def expected_fdr(p_g: np.ndarray) -> np.ndarray:
    """Return for each gene the expected share of false ones among it and all genes with a larger p (Lopez et al. 2018).

    Genes for which it is below alpha are the largest set whose posterior expected false discovery rate is.
    """
    order = np.argsort(-p_g, kind="stable")
    found = np.empty_like(p_g)
    found[order] = np.cumsum(1 - p_g[order]) / np.arange(1, len(p_g) + 1)
    return found
