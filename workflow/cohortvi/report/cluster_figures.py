"""Figures of the clusters: what they are composed of, and the genes that mark them."""

from dataclasses import replace

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.collections import EllipseCollection
from matplotlib.ticker import FuncFormatter

from cohortvi.report.blocks import Panel
from cohortvi.report.theme import ACCENT, PAPER, RULE, axes, color_of, drawable, to_svg
from cohortvi.report.words import number

NAMED = 60  # more bars than this bear no names
GENES_A_PANEL = 48  # more genes than this are drawn in several panels
LARGEST_DOT = 0.82  # of the distance of two genes: all cells express the gene
PITCH = (19.0, 27.0)  # distance of two genes in pixels
WIDTH = 920.0  # that few genes fill
FAINTEST = 0.08  # of full colour: no expression
SIZES = (10, 25, 50, 75, 100)  # percent, explained under the figure


def composition_panel(counts: pd.DataFrame, heading: str, unit: str) -> Panel:
    """Return a bar a row of `counts` (rows, parts), each filled with the shares of its parts."""
    shares = counts.div(counts.sum(axis=1).replace(0, 1), axis=0).to_numpy()
    n = len(counts)
    pitch = 22 if n <= 24 else max(1.5, min(13, 700 / n))
    names = [drawable(name) for name in counts.index] if n <= NAMED else []
    left = 16 + 6.4 * min(max(map(len, names)), 16) if names else 34
    ax = axes(400, pitch * n + 50, (left, 16, 42, 4))
    is_thick = pitch > 6
    style = {"height": 0.78, "edgecolor": PAPER, "linewidth": 0.7} if is_thick else {"height": 1, "linewidth": 0}
    start = np.zeros(n)
    for i, share in enumerate(shares.T):
        ax.barh(range(n), share, left=start, color=color_of(i), **style)
        start += share
    ax.set_xlim(0, 1)
    ax.set_ylim(n - 0.4, -0.6)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    ax.set_xlabel(f"share of the cells of the {unit} (%)")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylabel("" if names else f"{n:,} {unit}s, by name")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    legend = tuple((str(name), color_of(i)) for i, name in enumerate(counts.columns))
    return Panel(to_svg(ax, heading), heading, legend)


def marker_genes(markers: pd.DataFrame, n_markers: int) -> pd.DataFrame:
    """Return the rows of the best genes of each cluster that are higher in it than in the rest."""
    return markers[(markers["rank"] < n_markers) & (markers["score"] > 0)]


def dot_panels(markers: pd.DataFrame, best: pd.DataFrame, clusters: list[str]) -> tuple[list[Panel], float]:
    """Return dots a cluster (row) and gene of `best` (column, each once), and the mean that has full colour.

    Area is the share of the cluster's cells that express the gene, colour the mean of log1p counts per 10,000. Keys to
    both stand under the last panel.
    """
    best = best.drop_duplicates("gene")
    held = markers[markers["gene"].isin(best["gene"])]
    table = held.drop_duplicates(["cluster", "gene"]).set_index(["cluster", "gene"])
    top = float(table["mean"].max())
    n_panels = -(-len(best) // GENES_A_PANEL)
    parts = [best.iloc[chosen] for chosen in np.array_split(np.arange(len(best)), n_panels)]
    pitch = float(np.clip(WIDTH / len(parts[0]), *PITCH))
    panels = [Panel(_dots(table, part, clusters, pitch)) for part in parts]
    sizes = tuple((f"{share} %", round(LARGEST_DOT * pitch * (share / 100) ** 0.5, 1)) for share in SIZES)
    scale = ("0", number(top, 2), "linear-gradient(90deg, transparent, var(--accent))")
    return [*panels[:-1], replace(panels[-1], sizes=sizes, scale=scale)], top


def _dots(table: pd.DataFrame, best: pd.DataFrame, clusters: list[str], pitch: float) -> Markup:
    genes, symbols = list(best["gene"]), [drawable(symbol)[:18] for symbol in best["symbol"]]
    names = [drawable(name) for name in clusters]
    left, bottom = 34 + 6.4 * max(map(len, names)), 14 + 6.4 * max(map(len, symbols))
    ax = axes(left + 12 + pitch * len(genes), bottom + 8 + pitch * len(clusters), (left, 12, bottom, 8))
    found = table.reindex(pd.MultiIndex.from_product([clusters, genes]))
    across = LARGEST_DOT * pitch * np.sqrt(found["pct_in"].fillna(0).to_numpy())
    shade = FAINTEST + (1 - FAINTEST) * found["mean"].fillna(0).to_numpy() / table["mean"].max()
    x, y = np.tile(np.arange(len(genes)), len(clusters)), np.repeat(np.arange(len(clusters)), len(genes))
    shown = across > 0.5
    places = {"offsets": np.column_stack([x, y])[shown], "offset_transform": ax.transData}
    dots = EllipseCollection(across[shown], across[shown], 0, units="points", **places)
    dots.set(facecolor=[(ACCENT, round(float(a), 2)) for a in shade[shown]], edgecolor=ACCENT, linewidth=0.4)
    ax.add_collection(dots)
    for edge in np.flatnonzero(best["cluster"].to_numpy()[1:] != best["cluster"].to_numpy()[:-1]):
        ax.axvline(edge + 0.5, color=RULE, linewidth=1)
    ax.set_xlim(-0.6, len(genes) - 0.4)
    ax.set_ylim(len(clusters) - 0.4, -0.6)
    ax.set_xticks(range(len(genes)), symbols, rotation=90, style="italic")
    ax.set_yticks(range(len(clusters)), names)
    ax.set_ylabel("cluster")
    ax.tick_params(length=0)
    for spine in ("left", "bottom"):
        ax.spines[spine].set_visible(False)
    return to_svg(ax, f"Expression of {len(genes)} marker genes in {len(clusters)} clusters")
