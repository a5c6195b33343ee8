"""Simulated cohorts to measure loaders on: A, of few genes, and B, of many.

Counts are negative binomial. A cell's mean of a gene is its depth, times the gene's share in its type, times the
gene's shift in its batch; types are not equally frequent in all batches, and cells lie sorted by batch: the worst case
for a loader that mixes neighbours. A block of cells is drawn from a stream of its own, [seed, block], so that what is
drawn depends neither on the number of threads nor on the size of the other blocks.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.optimize import brentq

from cohortvi.files import replacing
from cohortvi.store.layout import Rows

TYPES = 30
BLOCK = 500  # cells drawn together


class Preset(NamedTuple):
    """A data set; `density`: share of counts above zero."""

    n_obs: int
    n_vars: int
    density: float
    n_batches: int
    seed: int


PRESETS = {"A": Preset(500_000, 2_000, 0.10, 100, 1), "B": Preset(100_000, 20_000, 0.05, 40, 2)}


class Truth(NamedTuple):
    """What counts are drawn from: a type's means at depth 1, a batch's shifts, theta, shares of types in a batch."""

    mean_tg: np.ndarray
    shift_bg: np.ndarray
    theta_g: np.ndarray
    share_bt: np.ndarray


class Cells(NamedTuple):
    """Batch and type as codes, and depth, of cells; each (n,)."""

    batch_n: np.ndarray
    type_n: np.ndarray
    depth_n: np.ndarray


def draw_truth(preset: Preset) -> Truth:
    """Return the truth of a data set, means scaled so that its counts have its density."""
    rng, g = np.random.default_rng([preset.seed, 0]), preset.n_vars
    mean_tg = np.exp(rng.normal(0, 1.6, g) + rng.normal(0, 0.7, (TYPES, g)))
    theta_g, depths = np.exp(rng.normal(0, 0.5, g)), np.exp(rng.normal(0, 0.4, 50))

    def density(log_scale: float) -> float:
        means = (np.exp(log_scale) * depth * mean_tg for depth in depths)
        return float(np.mean([1 - np.exp(-theta_g * np.log1p(mean / theta_g)).mean() for mean in means]))

    mean_tg *= np.exp(brentq(lambda log_scale: density(log_scale) - preset.density, -20, 10))
    shift_bg = np.exp(rng.normal(0, 0.2, (preset.n_batches, g)))
    return Truth(mean_tg, shift_bg, theta_g, rng.dirichlet(np.ones(TYPES), preset.n_batches))


def draw_cells(preset: Preset, truth: Truth) -> Cells:
    """Return the cells of a data set, sorted by batch."""
    rng, n = np.random.default_rng([preset.seed, 1]), preset.n_obs
    batch_n = np.sort(rng.integers(0, preset.n_batches, n))
    ends_bt = np.cumsum(truth.share_bt, axis=1)
    type_n = (rng.random((n, 1)) > ends_bt[batch_n, :-1]).sum(axis=1)
    return Cells(batch_n, type_n, np.exp(rng.normal(0, 0.4, n)))


@numba.njit(nogil=True, cache=True)
def _invert(
    u_ng: np.ndarray, cells: Cells, truth: Truth, indices: np.ndarray, data: np.ndarray, indptr: np.ndarray
) -> None:
    """Write the counts whose distribution functions first exceed u as CSR rows."""
    filled = 0
    for n in range(len(u_ng)):
        mean_g, shift_g = truth.mean_tg[cells.type_n[n]], truth.shift_bg[cells.batch_n[n]]
        for g in range(u_ng.shape[1]):
            mean, theta, u = cells.depth_n[n] * mean_g[g] * shift_g[g], truth.theta_g[g], u_ng[n, g]
            p = np.exp(-theta * np.log1p(mean / theta))
            if u < p:
                continue
            count, below, step = 0, p, mean / (mean + theta)
            while u >= below and (p > 1e-12 or count < mean):
                p *= step * (theta + count) / (count + 1)
                below += p
                count += 1
            indices[filled], data[filled] = g, count
            filled += 1
        indptr[n + 1] = filled


def draw_counts(preset: Preset, truth: Truth, cells: Cells, block: int) -> Rows:
    """Return the counts of cells, with the random numbers of a block."""
    n, g = len(cells.batch_n), preset.n_vars
    u_ng = np.random.default_rng([preset.seed, 2, block]).random((n, g), np.float32)
    rows = Rows(np.zeros(n + 1, np.int64), np.empty(n * g, np.uint16), np.empty(n * g, np.uint16))
    _invert(u_ng, cells, truth, rows.indices, rows.data, rows.indptr)
    return Rows(rows.indptr, *(array[: rows.indptr[-1]].copy() for array in rows[1:]))


def draw_blocks(preset: Preset, truth: Truth, cells: Cells) -> Iterator[Rows]:
    """Yield the counts of cells in order, blocks drawn by as many threads as there are cores."""

    def draw(block: int) -> Rows:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        return draw_counts(preset, truth, Cells(*(array[part] for array in cells)), block)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(draw, range(-(-len(cells.batch_n) // BLOCK)))


def joined(blocks: list[Rows]) -> Rows:
    """Return rows one after the other."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(block.indptr) for block in blocks)])
    arrays = (np.concatenate([block[part] for block in blocks]) for part in (1, 2))
    return Rows(np.cumsum(lengths), *arrays)


def obs_of(preset: Preset, cells: Cells, names: pd.Index) -> pd.DataFrame:
    """Return the table of cells: batch and cell_type."""
    columns = {"batch": (cells.batch_n, preset.n_batches), "cell_type": (cells.type_n, TYPES)}
    codes = {
        name: pd.Categorical.from_codes(codes, [f"{name}{i:03d}" for i in range(size)])
        for name, (codes, size) in columns.items()
    }
    return pd.DataFrame(codes, index=names)


def var_of(preset: Preset) -> pd.DataFrame:
    """Return the table of genes, which holds their names alone."""
    return pd.DataFrame(index=[f"gene{i:05d}" for i in range(preset.n_vars)])


def simulate(preset: Preset) -> ad.AnnData:
    """Return a data set as others expect it: float32 counts and int32 ids as CSR."""
    truth = draw_truth(preset)
    cells = draw_cells(preset, truth)
    indptr, indices, data = joined(list(draw_blocks(preset, truth, cells)))
    arrays = (data.astype(np.float32), indices.astype(np.int32), indptr)
    x = sp.csr_matrix(arrays, shape=(preset.n_obs, preset.n_vars))
    obs = obs_of(preset, cells, pd.RangeIndex(preset.n_obs).astype(str))
    return ad.AnnData(x, obs=obs, var=var_of(preset))


def write_h5ad(preset: Preset, path: Path) -> None:
    """Write a data set, not compressed. Held in memory."""
    with replacing(path) as partial:
        simulate(preset).write_h5ad(partial)
