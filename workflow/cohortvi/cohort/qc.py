"""Quality control of one sample: metrics, thresholds, doublets and the gate.

Every cell that comes in leaves with exactly one reason: "" if it is kept, else the first that removed it. Metrics have
scanpy's names and values (`scanpy.pp.calculate_qc_metrics`). Metrics are streamed; only the doublet scores hold the
counts of the sample's passing cells in memory.
"""

import re
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import median_abs_deviation

from cohortvi.cohort.readers import Raw, iter_counts
from cohortvi.config import Doublets, Gate, Qc, Threshold

KEPT = ""
# Without centring the principal axes come from the sparse matrix; with it, scanpy holds dense copies of all cells and
# simulated doublets, gigabytes for a sample of ten thousand cells. Exact neighbours need less memory than approximate
# ones, which moreover are compiled anew in every job.
SCRUBLET = {"mean_center": False, "use_approx_neighbors": False}


def qc_metrics(raw: Raw, gene_sets: dict[str, str | list[str]]) -> pd.DataFrame:
    """Return a row per cell: row (in the raw store), n_genes_by_counts, total_counts, pct_counts_NAME (percent).

    A cell without counts has pct_counts_NAME = NaN, as in scanpy.
    """
    members = {name: gene_set_mask(raw.var["symbol"], rule) for name, rule in gene_sets.items()}
    parts = {"n_genes_by_counts": [], "total_counts": [], **{name: [] for name in members}}
    for _, block in iter_counts(raw):
        parts["n_genes_by_counts"].append(np.diff(block.indptr).astype(np.int64))
        parts["total_counts"].append(row_sums(block))
        for name, mask in members.items():
            parts[name].append(row_sums(block, mask))
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    total = columns["total_counts"]
    metrics = pd.DataFrame({"row": raw.row, "n_genes_by_counts": columns["n_genes_by_counts"], "total_counts": total})
    for name in members:
        share = np.full(len(total), np.nan)
        metrics[f"pct_counts_{name}"] = np.divide(columns[name], total, out=share, where=total > 0) * 100
    return metrics.set_axis(raw.obs.index).join(raw.obs)


def row_sums(block: sp.csr_matrix, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the sum of each row over all genes, or those of the boolean `mask` (g,), as int64 (n,)."""
    data = block.data.astype(np.int64)
    if mask is not None:
        data = data * mask[block.indices]
    return np.diff(np.concatenate([[0], np.cumsum(data)])[block.indptr])


def gene_set_mask(symbols: pd.Series, rule: str | list[str]) -> np.ndarray:
    """Return which genes (g,) match a regular expression (from their first letter on) or stand in a list."""
    if isinstance(rule, str):
        return symbols.str.match(re.compile(rule)).to_numpy(bool)
    return symbols.isin(rule).to_numpy(bool)


def thresholds_of(sample: str, qc: Qc) -> dict[str, Threshold]:
    """Return the thresholds of a sample: those of all samples, with its overrides put in."""
    overrides = qc.overrides.get(sample, {})
    neutral = Threshold(above=None, below=None, mads_low=None, mads_high=None, log1p=False)
    names = [*qc.thresholds, *(name for name in overrides if name not in qc.thresholds)]
    return {name: replace(qc.thresholds.get(name, neutral), **overrides.get(name, {})) for name in names}


def bounds(values: pd.Series, threshold: Threshold) -> dict[str, float]:
    """Return the bounds that `threshold` sets on a sample's values, by the suffix of their reason.

    `low` and `high` are the fixed ones; `mad_low` and `mad_high` lie so many median absolute deviations (unscaled) from
    the median, on the log1p scale if asked, and are given on the metric's own scale.
    """
    found = {"low": threshold.above, "high": threshold.below}
    sides = {"mad_low": (threshold.mads_low, -1), "mad_high": (threshold.mads_high, 1)}
    scaled = np.log1p(values.dropna()) if threshold.log1p else values.dropna()
    for side, (n_mads, sign) in sides.items():
        if n_mads is not None and len(scaled):
            edge = np.median(scaled) + sign * n_mads * median_abs_deviation(scaled)
            found[side] = float(np.expm1(edge) if threshold.log1p else edge)
    return {side: value for side, value in found.items() if value is not None}


def reasons(metrics: pd.DataFrame, limits: dict[str, dict[str, float]]) -> pd.Series:
    """Return per cell the first bound it breaks, as METRIC_SIDE, or "".

    Fixed bounds are strict: a cell at the bound goes. A cell at a MAD bound stays. A missing value breaks every bound.
    """
    reason = pd.Series(KEPT, index=metrics.index, dtype=object)
    for metric, sides in limits.items():
        values = metrics[metric]
        passes = {
            "low": values.gt,
            "high": values.lt,
            "mad_low": values.ge,
            "mad_high": values.le,
        }
        for side, value in sides.items():
            broken = ~passes[side](value) & (reason == KEPT)
            reason[broken] = f"{metric}_{side}"
    return reason


def score_doublets(
    raw: Raw, keep: np.ndarray, doublets: Doublets, seed: int
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return scrublet's score (n,) and call (n,) for every cell, and its threshold.

    Wolock et al. 2019, by scanpy.pp.scrublet. Cells outside `keep` (sorted positions) have score NaN and no call; where
    scrublet finds no threshold between two modes of its scores (None), nothing is called.
    """
    import anndata as ad
    import scanpy as sc

    score, call = np.full(raw.obs.shape[0], np.nan), np.zeros(raw.obs.shape[0], bool)
    if not doublets.enabled or len(keep) < doublets.min_cells:
        return score, call, None
    counts = sp.vstack([block for _, block in iter_counts(raw, keep)], format="csr").astype(np.float32)
    cells = ad.AnnData(counts, obs=pd.DataFrame(index=raw.obs.index[keep]), var=pd.DataFrame(index=raw.var.index))
    sc.pp.scrublet(cells, expected_doublet_rate=doublets.expected_rate, random_state=seed, verbose=False, **SCRUBLET)
    score[keep] = cells.obs["doublet_score"]
    threshold = cells.uns["scrublet"].get("threshold")
    if threshold is not None:
        call[keep] = cells.obs["predicted_doublet"].astype(bool)
    return score, call, None if threshold is None else float(threshold)


def gate_verdict(n_kept: int, median_genes: float, gate: Gate) -> str | None:
    """Return the rule of the gate that a sample breaks, in words, or None."""
    if n_kept < gate.min_cells:
        return f"{n_kept} cells left, fewer than qc.gate.min_cells = {gate.min_cells}"
    if n_kept and median_genes < gate.min_median_genes:
        return f"median of {median_genes:g} genes, lower than qc.gate.min_median_genes = {gate.min_median_genes:g}"
    return None


def run_qc(raw: Raw, qc: Qc, seed: int) -> tuple[pd.DataFrame, dict]:
    """Return the table of a sample's cells, each with its `reason`, and the facts of the sample.

    Errors: ValueError if no cell is left and the gate does not quarantine the sample.
    """
    name = raw.sample.name
    cells = qc_metrics(raw, qc.gene_sets)
    limits = {metric: bounds(cells[metric], threshold) for metric, threshold in thresholds_of(name, qc).items()}
    cells["reason"] = reasons(cells, limits)
    passing = np.flatnonzero(cells["reason"] == KEPT)
    cells["doublet_score"], cells["predicted_doublet"], threshold = score_doublets(raw, passing, qc.doublets, seed)
    if qc.doublets.remove:
        cells.loc[cells["predicted_doublet"], "reason"] = "doublet"
    kept = cells["reason"] == KEPT
    median_genes = float(cells.loc[kept, "n_genes_by_counts"].median()) if kept.any() else 0.0
    verdict = gate_verdict(int(kept.sum()), median_genes, qc.gate)
    if verdict and name not in qc.gate.keep:
        cells.loc[kept, "reason"] = "quarantined"
    elif not kept.any():
        raise ValueError(_no_cell_left(raw, cells, limits))
    removed = cells.loc[cells["reason"] != KEPT, "reason"].value_counts().to_dict()
    facts = {
        "sample": name,
        "n_obs": len(cells),
        "n_kept": int((cells["reason"] == KEPT).sum()),
        "removed": removed,
        "quarantined": verdict if name not in qc.gate.keep else None,
        "kept_by_override": verdict if name in qc.gate.keep else None,
        "median_genes": median_genes,
        "median_counts": float(cells.loc[kept, "total_counts"].median()) if kept.any() else 0.0,
        "bounds": limits,
        "doublets": asdict(qc.doublets) | {"threshold": threshold},
        "n_vars": len(raw.var),
    }
    return cells, facts


def _no_cell_left(raw: Raw, cells: pd.DataFrame, limits: dict) -> str:
    counted = ", ".join(f"{reason} {n}" for reason, n in cells["reason"].value_counts().items())
    medians = cells.median(numeric_only=True).drop("row").round(2).to_dict()
    where = f"{raw.sample.path}: sample {raw.sample.name!r}"
    return (
        f"{where} has no cell left of {len(cells)} after QC; removed by {counted}; expected at least one. "
        f"Medians: {medians}; bounds: {limits}. Loosen qc.thresholds, for this sample under qc.overrides, "
        "or raise qc.gate.min_cells so that it is quarantined."
    )
