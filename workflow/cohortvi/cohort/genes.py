"""Variability of genes from per-sample passes that merge: moments, a fit per batch, standardized variances.

seurat_v3 (Stuart et al. 2019) and Pearson residuals (Lause et al. 2021), with scanpy's values on the same cells. Sums
of counts are exact in float64 up to 2^53, so the order of samples and chunks changes no bit of them. A batch is fitted
on the genes of its own samples; the samples' genes are joined last (cohort/selection.py).
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import scipy.sparse as sp
from skmisc.loess import loess

from cohortvi.config import Genes

DENSE_ROWS = 256


def gene_moments(blocks: Iterable[sp.csr_matrix], var: pd.DataFrame) -> pd.DataFrame:
    """Return per gene n_cells (that detect it), sum and sum_sq of the counts of all blocks (n, g), and symbol.

    `var`: the genes (g,), with their symbols. `attrs["n_obs"]` is the number of cells.
    """
    n_obs, n_cells, total, total_sq = 0, np.zeros(len(var), np.int64), np.zeros(len(var)), np.zeros(len(var))
    for block in blocks:
        values = block.data.astype(np.float64)
        n_obs += block.shape[0]
        n_cells += np.bincount(block.indices, minlength=len(var))
        total += np.bincount(block.indices, values, len(var))
        total_sq += np.bincount(block.indices, values**2, len(var))
    columns = {"symbol": var["symbol"].to_numpy(), "n_cells": n_cells, "sum": total, "sum_sq": total_sq}
    table = pd.DataFrame(columns, index=var.index)
    table.attrs["n_obs"] = n_obs
    return table


def merge_moments(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return mean and variance (ddof 1) of each gene over the cells of all tables; a gene that a table lacks counts 0.

    Genes come in the order in which they first appear; `n_obs` is a column. One table is looked at at a time.
    """
    n_obs, places, sums = 0, {}, np.zeros((2, 0))
    for table in tables:
        if table.attrs["n_obs"]:
            n_obs += table.attrs["n_obs"]
            at = [places.setdefault(name, len(places)) for name in table.index]
            sums = np.pad(sums, ((0, 0), (0, len(places) - sums.shape[1])))
            sums[:, at] += table[["sum", "sum_sq"]].to_numpy().T
    # Whole numbers, so N * sum_sq - sum^2 is exact where the textbook formula cancels.
    spread = [n_obs * int(sum_sq) - int(total) ** 2 for total, sum_sq in sums.T]
    variance = np.array(spread, dtype=np.float64) / max(n_obs * (n_obs - 1), 1)
    columns = {"n_obs": n_obs, "sum": sums[0], "mean": sums[0] / max(n_obs, 1), "variance": variance}
    return pd.DataFrame(columns, index=pd.Index(list(places), dtype=object))


def fit_trend(moments: pd.DataFrame, batch: str, genes: Genes) -> pd.DataFrame:
    """Return the moments of a batch with `fitted`, the trend of log10 variance over log10 mean (seurat_v3), else NaN.

    Local quadratic regression (Cleveland's loess) over the genes that vary; genes that do not have fitted = 0.
    Errors: ValueError that names the batch, its size and the span to try, where loess fails.
    """
    fitted = np.full(len(moments), np.nan)
    if genes.flavor == "seurat_v3" and len(moments):
        varies = (moments["variance"] > 0).to_numpy()
        fitted = np.zeros(len(moments))
        x, y = (np.log10(moments.loc[varies, column].to_numpy()) for column in ("mean", "variance"))
        try:
            model = loess(x, y, span=genes.span, degree=2)
            model.fit()
        except ValueError as error:
            raise ValueError(_loess_failed(batch, moments, genes, int(varies.sum()))) from error
        fitted[varies] = model.outputs.fitted_values
        if not np.isfinite(fitted).all():
            raise ValueError(_loess_failed(batch, moments, genes, int(varies.sum())))
    return moments.assign(fitted=fitted)


def _loess_failed(batch: str, moments: pd.DataFrame, genes: Genes, n_varying: int) -> str:
    n_obs = int(moments["n_obs"].iloc[0])
    wider = min(1.0, round(genes.span + 0.2, 2))
    return (
        f"batch {batch!r}: the loess fit of variance over mean fails at genes.span = {genes.span} "
        f"({n_obs} cells, {n_varying} genes that vary); small batches have many genes of equal mean and need a wider "
        f"span. Set genes.span to {wider} in the config, or join small batches by cohort.batch_key."
    )


def standardized(blocks: Iterable[sp.csr_matrix], fit: pd.DataFrame, flavor: str, theta: float) -> pd.DataFrame:
    """Return what the cells of all blocks (n, g) add to the standardized variance of each gene in their batch.

    `fit`: the trend of their batch on the genes (g,) of the blocks. seurat_v3: sum and sum_sq of the counts below the
    clipping value, mean + sqrt(n) * fitted standard deviation, and n_clipped. pearson_residuals: mean and m2 (sum of
    squared deviations) of the residuals clipped at +-sqrt(n). `attrs["n_obs"]` is the number of cells.
    """
    n_obs, parts = _clipped_sums(blocks, fit) if flavor == "seurat_v3" else _residual_moments(blocks, fit, theta)
    table = pd.DataFrame(parts, index=fit.index)
    table.attrs["n_obs"] = n_obs
    return table


def _clip_values(fit: pd.DataFrame) -> np.ndarray:
    return (np.sqrt(10 ** fit["fitted"]) * np.sqrt(fit["n_obs"]) + fit["mean"]).to_numpy()


def _clipped_sums(blocks: Iterable[sp.csr_matrix], fit: pd.DataFrame) -> tuple[int, dict[str, np.ndarray]]:
    clip, n_vars, n_obs = _clip_values(fit), len(fit), 0
    total, total_sq, n_clipped = np.zeros(n_vars), np.zeros(n_vars), np.zeros(n_vars, np.int64)
    for block in blocks:
        n_obs += block.shape[0]
        values = block.data.astype(np.float64)
        above = values > clip[block.indices]
        n_clipped += np.bincount(block.indices[above], minlength=n_vars)
        values[above] = 0
        total += np.bincount(block.indices, values, n_vars)
        total_sq += np.bincount(block.indices, values**2, n_vars)
    return n_obs, {"sum": total, "sum_sq": total_sq, "n_clipped": n_clipped}


def _residual_moments(
    blocks: Iterable[sp.csr_matrix], fit: pd.DataFrame, theta: float
) -> tuple[int, dict[str, np.ndarray]]:
    share = (fit["sum"] / max(fit["sum"].sum(), 1)).to_numpy()
    clip = np.sqrt(fit["n_obs"].max())
    state = (0, np.zeros(len(fit)), np.zeros(len(fit)))
    for block in blocks:
        for start in range(0, block.shape[0], DENSE_ROWS):
            x = block[start : start + DENSE_ROWS].toarray().astype(np.float64)
            mu = x.sum(1, keepdims=True) * share
            scale = np.sqrt(mu + mu**2 / theta)
            residual = np.clip(np.divide(x - mu, scale, out=np.zeros_like(x), where=mu > 0), -clip, clip)
            mean = residual.mean(0)
            state = _merge(state, (len(x), mean, ((residual - mean) ** 2).sum(0)))
    return state[0], {"mean": state[1], "m2": state[2]}


def _merge(a: tuple, b: tuple) -> tuple:
    # Chan, Golub, LeVeque 1983: count, mean and sum of squared deviations of two sets of values as one.
    n = a[0] + b[0]
    delta = b[1] - a[1]
    return n, a[1] + delta * (b[0] / max(n, 1)), a[2] + b[2] + delta**2 * (a[0] * b[0] / max(n, 1))


def batch_variance(parts: Iterable[pd.DataFrame], fit: pd.DataFrame, flavor: str) -> pd.Series:
    """Return the standardized variance of each gene of a batch, from what its samples add (`standardized`).

    One table is looked at at a time.
    """
    parts = (part for part in parts if part.attrs["n_obs"])
    if flavor == "seurat_v3":
        summed = pd.DataFrame(0.0, index=fit.index, columns=["sum", "sum_sq", "n_clipped"])
        for part in parts:
            summed.loc[part.index] += part
        clip, n, mean = _clip_values(fit), fit["n_obs"], fit["mean"]
        total, total_sq = summed["sum"] + summed["n_clipped"] * clip, summed["sum_sq"] + summed["n_clipped"] * clip**2
        return (n * mean**2 + total_sq - 2 * total * mean) / ((n - 1) * 10 ** fit["fitted"])
    state = (0, np.zeros(len(fit)), np.zeros(len(fit)))
    for part in parts:
        part_full = part.reindex(fit.index, fill_value=0.0)
        state = _merge(state, (part.attrs["n_obs"], part_full["mean"].to_numpy(), part_full["m2"].to_numpy()))
    return pd.Series(state[2] / max(state[0], 1), index=fit.index)
