"""Maps of the cells: the layout coloured by clusters, samples, batches and any other column."""

from dataclasses import dataclass, replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cohortvi.report import words
from cohortvi.report.blocks import Panel
from cohortvi.report.theme import GREY, INK, MUTED, RULE, axes, color_of, drawable, to_svg

CONTINUOUS_VALUES = 12  # a column of numbers with more values than this gets a colour axis
VIRIDIS = (0.18, 0.92)  # the part of it that is legible on light and on dark paper
ABSENT = ("", "NA", "nan", "None", "<NA>")


@dataclass(frozen=True)
class Coloring:
    """How cells are coloured: by `codes` (n,) into `categories` (-1: absent), or by `values` (n,) if not None."""

    heading: str
    codes: np.ndarray
    categories: tuple[str, ...]
    values: np.ndarray | None = None

    @property
    def is_constant(self) -> bool:
        """Whether all cells have the same colour."""
        return self.values is None and len(np.unique(self.codes)) < 2


def categorical(heading: str, column: pd.Series) -> Coloring:
    """Return the colouring by categories: in their own order if the column has one, else in natural order.

    Categories of which no cell is left keep their colour, so that maps of some cells agree with those of all.
    """
    column = column.astype("category")
    order = [str(value) for value in column.cat.categories if str(value) not in ABSENT]
    categories = tuple(order if column.cat.ordered else sorted(order, key=words.natural))
    return Coloring(heading, pd.Categorical(column.astype(str), categories=categories).codes.astype(int), categories)


def coloring(name: str, column: pd.Series) -> Coloring:
    """Return the colouring by a column: numbers with many values are continuous, all else is categorical."""
    text = column.astype(str)
    numbers = pd.to_numeric(text.where(~text.isin(ABSENT)), errors="coerce")
    is_number = bool((numbers.notna() | text.isin(ABSENT)).all())
    if is_number and numbers.nunique() > CONTINUOUS_VALUES:
        return Coloring(name, np.zeros(len(column), int), (), numbers.to_numpy(float))
    return categorical(name, column)


def distinct(found: list[Coloring]) -> list[Coloring]:
    """Return the colourings without repeats: those that part the cells alike become one, under all their names."""
    kept: list[Coloring] = []
    for new in found:
        same = next((i for i, old in enumerate(kept) if _alike(old, new)), None)
        if same is None:
            kept.append(new)
        else:
            kept[same] = replace(kept[same], heading=f"{kept[same].heading} = {new.heading}")
    return kept


def _alike(a: Coloring, b: Coloring) -> bool:
    return a.values is None and b.values is None and a.categories == b.categories and np.array_equal(a.codes, b.codes)


def map_panel(layout: np.ndarray, shown: Coloring, *, is_labelled: bool = False) -> Panel:
    """Return the map of cells at `layout` (n, 2), in the order given; `is_labelled` writes the categories on it."""
    ax = axes(310, 300, (16, 6, 20, 4))
    size = float(np.clip(14_000 / max(len(layout), 1), 0.9, 16))
    scale, legend = None, tuple((name, color_of(i)) for i, name in enumerate(shown.categories))
    if shown.values is None:
        colors = np.array([*(color for _, color in legend), GREY])[shown.codes]
        legend += (("not known", GREY),) if (shown.codes < 0).any() else ()
    else:
        colors, scale = _continuous(shown.values)
    ax.scatter(*layout.T, s=size, c=colors, linewidths=0, alpha=0.8, rasterized=True)
    if is_labelled:
        _label(ax, layout, shown)
    _map_axes(ax)
    svg = to_svg(ax, f"Map of {len(layout):,} cells coloured by {shown.heading}")
    return Panel(svg, shown.heading, () if is_labelled else legend, scale)


def _continuous(values: np.ndarray) -> tuple[np.ndarray, tuple[str, str, str]]:
    low, high = np.quantile(values[np.isfinite(values)], [0.01, 0.99])
    place = np.clip((values - low) / ((high - low) or 1), 0, 1)
    viridis = mpl.colormaps["viridis"]
    colors = viridis(VIRIDIS[0] + (VIRIDIS[1] - VIRIDIS[0]) * np.where(np.isfinite(place), place, 0))
    colors[~np.isfinite(values)] = mpl.colors.to_rgba(GREY)
    stops = ", ".join(mpl.colors.to_hex(viridis(x)) for x in np.linspace(*VIRIDIS, 6))
    ends = (words.short(float(f"{end:.3g}")) for end in (low, high))
    return colors, (*ends, f"linear-gradient(90deg, {stops})")


def _label(ax: Axes, layout: np.ndarray, shown: Coloring) -> None:
    for i, name in enumerate(shown.categories):
        places = layout[shown.codes == i]
        if len(places):
            style = {"ha": "center", "va": "center", "color": INK, "fontsize": 11, "fontweight": "bold"}
            ax.text(*np.median(places, axis=0), drawable(name), gid=f"halo-{i}", **style)


def _map_axes(ax: Axes) -> None:
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("UMAP 1", loc="left", color=MUTED, fontsize=9)
    ax.set_ylabel("UMAP 2", loc="bottom", color=MUTED, fontsize=9)
    for spine in ("left", "bottom"):
        ax.spines[spine].set_color(RULE)
