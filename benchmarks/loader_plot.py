"""docs/loader.svg: throughput against batch size, a line a loader, dense and sparse side by side, a row a data set."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from loader_tables import label, labels, middle, of, select
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

# Ours in blue, annbatch in orange, others in green, violet and grey; markers tell them apart without colour.
LOOKS = {
    "cohortvi, float32": ("#0072b2", "o", "-", 2.4),
    "cohortvi, integers": ("#56b4e9", "o", "--", 2.4),
    "annbatch 32x256": ("#b34700", "v", ":", 1.3),
    "annbatch 512x32": ("#d55e00", "^", "-", 1.3),
    "annbatch 512x64": ("#e69f00", "s", "-", 1.3),
    "annbatch 2048x16": ("#a67300", "D", "--", 1.3),
    label("scDataset", ""): ("#009e73", "P", "-", 1.3),
    label("scvi-tools", ""): ("#8c6bb1", "X", "-", 1.3),
    "scipy, in memory": ("#6b7680", "*", "--", 1.3),
}
RC = {
    "svg.fonttype": "path",
    "svg.hashsalt": "cohortvi",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Draw the medians of a run; equal numbers give equal bytes."""
    data, outputs, sizes = list(results["data"]), results["settings"]["outputs"], results["settings"]["batch_sizes"]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9, 3.1 * len(data) + 0.9), layout="constrained")
        axes = figure.subplots(len(data), len(outputs), sharex=True, sharey="row", squeeze=False)
        for row, name in zip(axes, data, strict=True):
            facts = results["data"][name]
            for place, output in zip(row, outputs, strict=True):
                _draw(place, select(results["warm"], data=name, output=output), sizes)
                place.set_title(f"{name}, {facts['n_vars']:,} genes: {output}", loc="left", fontsize=9)
            row[0].set_ylabel("cells/s")
        for place in axes[-1]:
            place.set_xlabel("batch size")
        handles = {line.get_label(): line for place in axes.flat for line in place.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(place: Axes, records: list[dict[str, Any]], sizes: list[int]) -> None:
    for name in labels(records):
        color, marker, style, width = LOOKS[name]
        found = of(records, name)
        speeds = [middle(select(found, batch_size=size), "cells_per_s") for size in sizes]
        drawn = [(size, speed) for size, speed in zip(sizes, speeds, strict=True) if speed]
        place.plot(*zip(*drawn, strict=True), color=color, marker=marker, linestyle=style, linewidth=width, label=name)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    place.set_xticks(sizes, [f"{size:,}" for size in sizes])
    place.minorticks_off()
    place.grid(axis="y", which="both", color="#d8dde2", linewidth=0.6)
