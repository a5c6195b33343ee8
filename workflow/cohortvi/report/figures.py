"""Figures of the cohort and of training: QC distributions, mean and variance of genes, the terms of the ELBO."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from scipy.ndimage import gaussian_filter1d

from cohortvi.report import words
from cohortvi.report.blocks import Panel
from cohortvi.report.inputs import N_BINS, Spread
from cohortvi.report.theme import ACCENT, BLUE, GREY, INK, MUTED, REMOVED, RULE, axes, drawable, to_svg

RIDGES = 20  # more samples than this are drawn as quantiles
NAMED = 60  # more samples than this bear no names
TAIL = 0.002  # share of the cells at each end that the axis may leave out
LONG_TRAINING = 5  # epochs, from which on the first is left out of the axes
BEYOND = 0.35  # of the cells' range: how far beyond it a threshold is still shown
SMOOTHING = N_BINS / 200  # standard deviation of the kernel, in bins
QC_LABELS = {
    "n_genes_by_counts": "detected genes per cell (log scale)",
    "total_counts": "UMI counts per cell (log scale)",
    "doublet_score": "doublet score (scrublet)",
}


def qc_panels(spreads: dict[str, list[Spread]]) -> list[Panel]:
    """Return a panel a metric: a ridge a sample, or with many samples their quantiles, ranked by median."""
    return [Panel(_qc_panel(metric, found), metric) for metric, found in spreads.items()]


def _qc_panel(metric: str, spreads: list[Spread]) -> Markup:
    if len(spreads) > RIDGES:
        spreads = sorted(spreads, key=lambda spread: (np.nan_to_num(spread.quantiles[2], nan=-1), spread.sample))
    n = len(spreads)
    row = 26 if n <= RIDGES else max(14 if n <= NAMED else 2, min(14, 600 / n))
    names = [drawable(spread.sample) for spread in spreads]
    left = 16 + 6.4 * min(max(map(len, names)), 16) if n <= NAMED else 34
    ax = axes(400, row * n + 62, (left, 14, 46, 8))
    ax.set_xlim(*_qc_range(spreads))
    ax.set_ylim(n - 0.4, -0.9)
    _qc_axis(ax, spreads[0], QC_LABELS.get(metric, f"{metric.removeprefix('pct_counts_')} counts (%)"))
    for i, spread in enumerate(spreads):
        if n <= RIDGES:
            _ridge(ax, i, spread)
    if n > RIDGES:
        _quantile_rows(ax, spreads)
    _bounds(ax, spreads)
    if n <= NAMED:
        ax.set_yticks(range(n), [name if len(name) <= 16 else name[:15] + "…" for name in names])
        for label, spread in zip(ax.get_yticklabels(), spreads, strict=True):
            label.set_color(REMOVED if spread.quarantined else INK)
    else:
        ax.set_yticks([])
        ax.set_ylabel(f"{n:,} samples, ranked by median")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return to_svg(ax, f"Distribution of {metric} in {words.plural(n, 'sample')}")


def _qc_range(spreads: Sequence[Spread]) -> tuple[float, float]:
    total = np.sum([spread.counts for spread in spreads], axis=0)
    reached = np.cumsum(total) / max(total.sum(), 1)
    first, last = np.searchsorted(reached, [TAIL, 1 - TAIL])
    width = spreads[0].top / N_BINS
    edges = [x for spread in spreads for x in (spread.low, spread.high) if x is not None]
    low, high = first * width, (last + 1) * width
    reach = BEYOND * (high - low)
    near = [x for x in edges if low - reach <= x <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.03 * (high - low)
    return (low - margin if spreads[0].is_log else min(-margin, low)), min(high + margin, spreads[0].top)


def _qc_axis(ax: Axes, spread: Spread, label: str) -> None:
    ax.set_xlabel(label)
    ax.grid(axis="x")
    if spread.is_log:
        values = [m * 10.0**k for k in range(7) for m in (1, 2, 5)]
        inside = [x for x in values if ax.get_xlim()[0] <= np.log10(1 + x) <= ax.get_xlim()[1]]
        if len(inside) > 8:
            inside = [x for x in inside if np.log10(x).is_integer()]
        ax.set_xticks(np.log10(1 + np.array(inside)), [words.short(x) for x in inside])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))


def _ridge(ax: Axes, i: int, spread: Spread) -> None:
    density = gaussian_filter1d(spread.counts.astype(float), SMOOTHING, mode="constant")
    if not density.any():
        ax.text(np.mean(ax.get_xlim()), i, "not scored", color=MUTED, fontsize=9, ha="center", va="center")
        return
    x = (np.arange(N_BINS) + 0.5) * spread.top / N_BINS
    shown = (x >= ax.get_xlim()[0]) & (x <= ax.get_xlim()[1])
    x, height = x[shown], i + 0.35 - 0.92 * density[shown] / density.max()
    inside = np.ones(len(x), bool)
    if spread.low is not None:
        inside &= x >= spread.low
    if spread.high is not None:
        inside &= x <= spread.high
    for where, color in ((inside, ACCENT), (~inside, REMOVED)):
        ax.fill_between(x, i + 0.35, height, where=where, color=color, alpha=0.55, linewidth=0)
    ax.plot(x, height, color=MUTED if spread.quarantined else INK, linewidth=0.8)


def _quantile_rows(ax: Axes, spreads: Sequence[Spread]) -> None:
    for ends, width in (((0, 4), 1.0), ((1, 3), 3.0)):
        segments = [[(s.quantiles[ends[0]], i), (s.quantiles[ends[1]], i)] for i, s in enumerate(spreads)]
        colors = [REMOVED if s.quarantined else ACCENT for s in spreads]
        thin = min(1.0, 300 / len(spreads))
        ax.add_collection(LineCollection(segments, colors=colors, linewidths=width * thin, alpha=0.75))
    medians = [(s.quantiles[2], i) for i, s in enumerate(spreads)]
    ax.plot(*zip(*medians, strict=True), "o", color=INK, markersize=2.4 if len(spreads) <= 2 * NAMED else 1.2)


def _bounds(ax: Axes, spreads: Sequence[Spread]) -> None:
    edges = [(x, i) for i, s in enumerate(spreads) for x in (s.low, s.high) if x is not None]
    reach = (0.6, 0.4) if len(spreads) <= RIDGES else (0.5, 0.5)
    segments = [[(x, i - reach[0]), (x, i + reach[1])] for x, i in edges]
    ax.add_collection(LineCollection(segments, colors=REMOVED, linewidths=1.6 if len(spreads) <= NAMED else 1))


def mean_variance_panel(fit: pd.DataFrame, selected: pd.Index, batch: str, width: float) -> Panel:
    """Return variance over mean of each gene of a batch, with the trend and the selected genes."""
    varying = fit[(fit["mean"] > 0) & (fit["variance"] > 0)]
    x, y = np.log10(varying["mean"]), np.log10(varying["variance"])
    chosen = varying.index.isin(selected)
    ax = axes(width, 0.7 * width + 40, (56, 12, 44, 8))
    size = float(np.clip(12_000 / max(len(x), 1), 1.5, 6))
    ax.scatter(x[~chosen], y[~chosen], s=size, c=GREY, alpha=0.5, linewidths=0, rasterized=True)
    ax.scatter(x[chosen], y[chosen], s=size, c=BLUE, alpha=0.8, linewidths=0, rasterized=True)
    ends = np.array([x.min(), x.max()]) if len(x) else np.zeros(2)
    ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if varying["fitted"].notna().any():
        order = np.argsort(x.to_numpy(), kind="stable")
        order = order[np.unique(np.linspace(0, len(order) - 1, 200).astype(int))]
        ax.plot(x.iloc[order], varying["fitted"].iloc[order], color=INK, linewidth=1.6)
    ax.set_xlabel("mean (UMI counts per cell)")
    ax.set_ylabel("variance (UMI counts²)")
    ax.grid()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = np.ceil(axis.get_view_interval()[0]), np.floor(axis.get_view_interval()[1])
        axis.set_major_locator(FixedLocator(np.arange(low, high + 1)[:: 1 if high - low < 7 else 2]))
        axis.set_major_formatter(FuncFormatter(lambda power, _: words.short(10.0**power)))
    heading = f"{batch} · {words.plural(int(fit['n_obs'].max()), 'cell')}"
    return Panel(to_svg(ax, f"Mean and variance of genes in batch {batch}"), heading)


def training_panels(history: pd.DataFrame, best_epoch: int) -> list[Panel]:
    """Return the negative ELBO, its two terms and the KL weight over the epochs; `best_epoch`: whose weights stay."""
    splits = ("train", "validation")
    reconstruction, kl = (
        history[[f"{split}_{term}" for split in splits]].to_numpy() for term in ("reconstruction", "kl")
    )
    curves = [
        ("Negative ELBO", "nats per cell", reconstruction + kl),
        ("Reconstruction term, −log p(x | z)", "nats per cell", reconstruction),
        ("KL term, KL(q(z | x) ‖ p(z))", "nats per cell", kl),
        ("Weight of the KL term in the loss", "weight", history[["kl_weight"]].to_numpy()),
    ]
    return [Panel(_curve(history, best_epoch, unit, values), heading) for heading, unit, values in curves]


def _curve(history: pd.DataFrame, best_epoch: int, unit: str, values: np.ndarray) -> Markup:
    epochs = history["epoch"].to_numpy()
    ax = axes(400, 220, (58, 12, 42, 10))
    warm = epochs[history["kl_weight"].to_numpy() < 1]
    if len(warm):
        ax.axvspan(epochs[0] - 0.5, warm[-1] + 0.5, color=RULE, alpha=0.6, linewidth=0)
    ax.axvline(best_epoch, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    for column, color in zip(values.T, (MUTED, ACCENT) if values.shape[1] == 2 else (INK,), strict=True):
        ax.plot(epochs, column, color=color, marker="o" if len(epochs) == 1 else None)
    at_best = values[epochs == best_epoch]
    if values.shape[1] == 2 and len(at_best):
        ax.plot([best_epoch], at_best[:, 1], "o", color=ACCENT, markersize=5)
    # The first epoch starts from random weights and would flatten all that follows.
    seen = values[1:] if len(values) >= LONG_TRAINING else values
    low, high = float(seen.min()), float(seen.max())
    margin = 0.06 * (high - low) or 0.5
    ax.set_ylim((0, 1.05) if unit == "weight" else (low - margin, high + margin))
    ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    ax.set_xlabel("epoch")
    ax.set_ylabel(unit)
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.short(value) if value < 1e4 else f"{value:,.0f}"))
    return to_svg(ax, f"{unit} over {len(epochs)} epochs")


def effects_panel(true: Sequence[float], estimated: Sequence[float]) -> Panel:
    """Return the decoded log fold change of each gene between two batches over the simulated one."""
    ax = axes(400, 360, (60, 14, 44, 8))
    ax.scatter(true, estimated, s=7, c=BLUE, alpha=0.8, linewidths=0, rasterized=True)
    ends = np.array([min(*true, *estimated), max(*true, *estimated)])
    ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_xlabel("simulated log fold change")
    ax.set_ylabel("decoded log fold change")
    ax.grid()
    return Panel(to_svg(ax, "Decoded over simulated effect of the batch, a point a gene"))
