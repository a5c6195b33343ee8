"""How far a model's posterior can be trusted: the section that shows what rule gap found."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from cohortvi.files import read_json, read_table
from cohortvi.report import captions, words
from cohortvi.report.blocks import Block, Figure, Panel, Section, Table, Text
from cohortvi.report.inputs import ModelFiles
from cohortvi.report.theme import ACCENT, INK, MUTED, RULE, VARIABLES, axes, to_svg
from cohortvi.report.words import number, percent

QUANTITIES = {  # column of gap.parquet: what it is called
    "elbo": "ELBO, encoder",
    "elbo_mean_field": "ELBO, best diagonal",
    "elbo_full": "ELBO, best full",
    "log_p": "log p(x)",
    "amortization_gap": "amortization gap",
    "approximation_gap": "approximation gap",
    "approximation_gap_full": "approximation gap, full",
    "inference_gap": "inference gap",
    "ess_encoder": "sample size, encoder",
    "ess": "sample size, refined",
}
SPLITS = (("validation", ACCENT, "held out"), ("train", MUTED, "training"))
LIMITS = {
    "amortization_gap": "Amortization gap, mean",
    "amortization_gap_p99": "Amortization gap, 99th percentile",
    "encoder_overfit": "Held-out minus training gap",
    "unreliable_share": "Cells with k-hat above 0.7",
    "group_excess": "Excess gap of the oddest group",
}
GROUPS = 12  # groups told, those of the largest gap
BATCHES = 5  # whose checks are told, those furthest off
CHECKS = {
    "zero_fraction": ("share of zeros", 3),
    "library_mean": ("UMI per cell, mean", 0),
    "library_sd": ("UMI per cell, s.d. of log", 3),
    "variance_over_mean": ("variance over mean, median gene", 2),
}
BINS = 40


def trust_section(name: str, files: ModelFiles) -> Section:
    """Return the section of model `name`."""
    facts, cells = read_json(files.gap), read_table(files.gap_cells)
    blocks: list[Block] = [_gaps(facts), _figure(facts, cells), _limits(facts)]
    blocks += [_groups(facts["groups"])] if facts["groups"] else []
    blocks += _labels(facts["labels"]) if facts.get("labels") else []
    blocks += [_checks(facts["predictive"])] if facts["predictive"] else []  # no batch has two of the cells
    blocks.append(_calibration(facts["calibration"]))
    return Section(f"trust-{name}", "How far the posterior can be trusted", blocks, level=3)


def _gaps(facts: Mapping[str, Any]) -> Table:
    held_out, trained = facts["splits"]["validation"], facts["splits"]["train"]
    rows = []
    for column, label in QUANTITIES.items():
        digits = 0 if column.startswith("ess") else 2
        of_held = [held_out[column][key] for key in ("mean", "se", "p50", "p90", "p99")]
        rows.append([label, *(number(value, digits) for value in (*of_held, trained[column]["mean"]))])
    header = ["nats per cell", "held out, mean", "± s.e.", "median", "90 %", "99 %", "training, mean"]
    counts = {"held": number(held_out["cells"]), "trained": number(trained["cells"])}
    return Table("Bounds and gaps.", captions.GAPS.format(**counts), header, "lrrrrrr", rows)


def _figure(facts: Mapping[str, Any], cells: pd.DataFrame) -> Figure:
    latent = facts["latent"]
    panels = [
        Panel(_bounds_panel(pd.DataFrame(facts["bounds"])), "Bound on log p(x) by number of draws, held out"),
        Panel(_gap_panel(cells), "Amortization gap of the cells"),
        Panel(_latent_panel(latent["kl"]), "KL of each latent dimension"),
    ]
    active = f"{latent['active_units']} of {words.plural(len(latent['kl']), 'dimension')}"
    legend = tuple((label, f"var(--{VARIABLES[color]})") for _, color, label in SPLITS)
    return Figure("Bounds and gaps of single cells.", captions.GAP_FIGURE.format(active=active), panels, legend)


def _bounds_panel(bounds: pd.DataFrame) -> Markup:
    ax = axes(400, 240, (70, 12, 44, 10))
    held_out = bounds[bounds["split"] == "validation"]
    for proposal, style in (("refined", "-"), ("encoder", "--")):
        curve = held_out[held_out["proposal"] == proposal]
        ax.plot(np.log10(curve["draws"]), curve["bound"], style, color=ACCENT, marker="o", markersize=4)
        ax.annotate(proposal, (np.log10(curve["draws"].iloc[0]), curve["bound"].iloc[0]), (6, -3), color=INK,
                    textcoords="offset points", fontsize=9, va="top")  # fmt: skip
    draws = sorted(held_out["draws"].unique())
    ax.xaxis.set_major_locator(FixedLocator(np.log10(draws)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{round(10**power):,}"))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.margins(0.08, 0.12)
    ax.set_xlabel("draws")
    ax.set_ylabel("nats per cell")
    ax.grid(axis="y")
    return to_svg(ax, "Importance-weighted bounds by number of draws")


def _gap_panel(cells: pd.DataFrame) -> Markup:
    ax = axes(400, 240, (50, 12, 44, 10))
    top = max(float(cells["amortization_gap"].quantile(0.995)), 1e-3)
    edges = np.linspace(min(float(cells["amortization_gap"].quantile(0.005)), 0.0), top, BINS + 1)
    for split, color, _ in reversed(SPLITS):
        gaps = cells.loc[cells["split"] == split, "amortization_gap"].clip(edges[0], edges[-1])
        share = np.histogram(gaps, edges)[0] / max(len(gaps), 1)
        ax.stairs(100 * share, edges, color=color, fill=split == "train", alpha=0.5 if split == "train" else 1)
    ax.set_xlabel("ELBO of the cell's best Gaussian − ELBO (nats)")
    ax.set_ylabel("% of cells")
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y")
    return to_svg(ax, "Histogram of the amortization gap of held-out and of training cells")


def _latent_panel(kl: list[float]) -> Markup:
    ax = axes(400, 240, (50, 12, 44, 10))
    order = np.argsort(kl)[::-1]
    ax.bar(range(len(kl)), np.array(kl)[order], color=ACCENT, width=0.7)
    ax.xaxis.set_major_locator(FixedLocator(range(len(kl))) if len(kl) <= BINS else NullLocator())
    ax.set_xticklabels([str(at + 1) for at in order] if len(kl) <= BINS else [])
    ax.set_xlabel("latent dimension, by KL")
    ax.set_ylabel("nats per cell")
    ax.grid(axis="y")
    return to_svg(ax, "Mean KL of each latent dimension")


def _limits(facts: Mapping[str, Any]) -> Table:
    def shown(limit: Mapping[str, Any], key: str) -> str:
        value = limit[key]
        is_share = limit["name"].endswith("share")
        return "" if value is None else percent(value) if is_share else number(value, 2)

    words_of = {"ok": "within", "warn": "beyond warn", "fail": "beyond fail"}
    rows = [
        [LIMITS[limit["name"]], *(shown(limit, key) for key in ("found", "warn", "fail")), words_of[limit["verdict"]]]
        for limit in facts["limits"]
    ]
    return Table("Limits.", captions.LIMITS, ["held-out cells", "found", "warn", "fail", "verdict"], "lrrrl", rows)


def _groups(groups: list[dict[str, Any]]) -> Table:
    table = pd.DataFrame(groups)
    held_out = table[table["split"] == "validation"] if (table["split"] == "validation").any() else table
    shown = held_out.sort_values("amortization_gap", ascending=False, kind="stable").head(GROUPS)
    gaps = ("amortization_gap", "excess_gap", "approximation_gap")
    rows = []
    for row in shown.to_dict("records"):
        found = [number(row[name], 2) for name in gaps]
        share = percent(row["unreliable_share"])
        rows.append([row["column"], row["value"], number(row["cells"]), *found, number(row["ess"]), share])
    header = [
        "column",
        "value",
        "cells",
        "amortization gap",
        "excess",
        "approximation gap",
        "effective sample size",
        "k-hat > 0.7",
    ]
    return Table("Groups with the largest gaps.", captions.GAP_GROUPS, header, "llrrrrrr", rows)


def _labels(facts: Mapping[str, Any]) -> list[Block]:
    """Return how the predictions agree with the labels of held-out cells, or that none has one."""
    if not facts["cells"]:
        return [Text(captions.NO_LABELS.format(column=facts["column"]))]
    ax = axes(400, 240, (50, 12, 44, 10))
    bins = pd.DataFrame(facts["bins"])
    ax.plot([0, 1], [0, 1], color=RULE)
    ax.scatter(
        bins["confidence"], bins["accuracy"], s=8 + 200 * bins["cells"] / facts["cells"], color=ACCENT, alpha=0.8
    )
    ax.set_xlabel("probability of the likeliest label")
    ax.set_ylabel("share of cells that have it")
    ax.grid(axis="y")
    panel = Panel(to_svg(ax, "Accuracy by the probability of the likeliest label"), "Accuracy by probability")
    words_of = {"column": facts["column"], "cells": number(facts["cells"]), "accuracy": percent(facts["accuracy"])}
    words_of |= {"confidence": percent(facts["confidence"]), "error": number(facts["error"], 3)}
    rows = [
        [row["label"], number(row["cells"]), number(row["predicted"]), number(row["found"])] for row in facts["labels"]
    ]
    header = ["label", "cells", "predicted", "of these, right"]
    return [
        Figure("Labels of held-out cells.", captions.LABELS.format(**words_of), [panel]),
        Table("Held-out cells by label.", captions.LABEL_TABLE, header, "lrrr", rows),
    ]


def _checks(checks: list[dict[str, Any]]) -> Table:
    """Return the checks of the batches that are furthest off in any statistic, all of theirs."""
    table = pd.DataFrame(checks)
    width = (table["high"] - table["low"]).clip(lower=1e-9)
    table["off"] = (table["observed"] - table["replicated"]).abs() / width
    worst = table.groupby("batch", sort=False)["off"].max().sort_values(ascending=False, kind="stable").index
    shown = table[table["batch"].isin(worst[:BATCHES])]
    rows = []
    for row in shown.to_dict("records"):
        label, digits = CHECKS[row["statistic"]]
        values = [number(row[key], digits) for key in ("observed", "replicated", "low", "high")]
        inside = "yes" if row["low"] <= row["observed"] <= row["high"] else "no"
        rows.append([row["batch"], label, *values, inside])
    header = ["batch", "statistic", "observed", "simulated", "5 %", "95 %", "within"]
    return Table("Posterior predictive checks.", captions.CHECKS, header, "llrrrrl", rows)


def _calibration(facts: Mapping[str, Any]) -> Figure:
    counts = np.array(facts["histogram"], float)
    n, bins = counts[0].sum(), counts.shape[1]
    ax = axes(400, 240, (50, 12, 44, 10))
    spread = 1.96 * np.sqrt((1 - 1 / bins) / (n / bins))
    ax.axhspan(1 - spread, 1 + spread, color=RULE, linewidth=0)
    edges = np.linspace(0, 100, bins + 1)
    for rank in counts:
        ax.stairs(rank / (n / bins), edges, color=ACCENT, alpha=0.6, baseline=None)
    ax.set_xlabel("rank of the simulated value among draws of its posterior (%)")
    ax.set_ylabel("cells over those expected")
    ax.set_ylim(0, None)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y")
    label = "Ranks of simulated latent values, a line for each latent dimension"
    covered = {level: f"{percent(min(of))} to {percent(max(of))}" for level, of in facts["coverage"].items()}
    caption = captions.CALIBRATION.format(half=covered["0.5"], most=covered["0.9"])
    return Figure("Calibration of the posterior.", caption, [Panel(to_svg(ax, label), "Ranks of simulated values")])
