"""Tables of the page: the cohort, the ledger, models, clusters, markers, resources."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cohortvi.report import captions, words
from cohortvi.report.blocks import Table, heat, stack
from cohortvi.report.theme import PALETTE
from cohortvi.report.words import number, percent

TOP_CHANGES = 10  # genes of each comparison that are shown
KEPT_COLOR = "var(--accent)"
REASON_COLORS = [PALETTE[i] for i in (1, 3, 2, 5, 7, 6, 11, 8, 9, 13, 14, 16, 17, 19)]  # no blue, which means kept
FACTS = ("cells_in", "kept", "quarantined", "counts", "train", "validation")


def cohort_table(sheet: Mapping[str, Mapping[str, str]], facts: Mapping[str, dict]) -> Table:
    """Return a row a sample: what came in, what is left, the gate's verdict, and what the sheet says of it."""
    columns = list(dict.fromkeys(column for row in sheet.values() for column in row))
    rows = []
    for name, found in facts.items():
        medians = [number(found["median_genes"]), number(found["median_counts"])]
        said = [sheet[name].get(column, "") for column in columns]
        rows.append([name, *_kept(found["n_obs"], found["n_kept"]), *medians, _status(found), *said])
    total = [sum(found[key] for found in facts.values()) for key in ("n_obs", "n_kept")]
    return Table(
        "The samples.",
        captions.SAMPLES,
        ["sample", "cells in", "kept", "share", "median genes", "median counts", "gate", *columns],
        "lrrrrrl" + "l" * len(columns),
        rows,
        ["all", *_kept(*total), *[""] * (3 + len(columns))],
    )


def _kept(n_obs: int, n_kept: int) -> list[str]:
    return [number(n_obs), number(n_kept), percent(n_kept, n_obs)]


def _status(facts: dict) -> str:
    if facts["quarantined"]:
        return f"quarantined: {facts['quarantined']}"
    if facts["kept_by_override"]:
        return f"kept by qc.gate.keep, although: {facts['kept_by_override']}"
    return "passed"


def ledger_table(ledger: pd.DataFrame) -> Table:
    """Return the account of every cell, with its totals."""
    reasons = [column for column in ledger if column.startswith("removed_")]
    stages = [column for column in ledger if column not in {"sample", *FACTS[:3], *reasons}]
    counted = ["cells_in", *reasons, "kept", *stages]
    colors = {reason: REASON_COLORS[i % len(REASON_COLORS)] for i, reason in enumerate(reasons)}
    rows = [_ledger_row(row["sample"], row, counted, colors) for _, row in ledger.iterrows()]
    labels = {reason: words.reason(reason.removeprefix("removed_")) for reason in reasons}
    names = {"cells_in": "cells in", "counts": "stored", "train": "to train", "validation": "held out", **labels}
    names |= {stage: stage.replace("_", ", ", 1) for stage in stages if stage not in FACTS}
    hints = {labels[reason]: f"removed: {reason.removeprefix('removed_')}" for reason in reasons}
    return Table(
        "The account of every cell.",
        captions.LEDGER,
        ["sample", "where they went", *(names.get(column, column) for column in counted)],
        "ll" + "r" * len(counted),
        rows,
        _ledger_row("all", ledger[counted].sum(), counted, colors),
        hints,
        (("kept", KEPT_COLOR), *((labels[reason], colors[reason]) for reason in reasons)),
    )


def _ledger_row(name: str, row: pd.Series, counted: Sequence[str], colors: Mapping[str, str]) -> list[str]:
    parts = [(row["kept"], KEPT_COLOR), *((row[reason], color) for reason, color in colors.items())]
    return [name, stack(parts), *(number(row[column]) for column in counted)]


def comparison_table(models: Mapping[str, tuple[dict, dict]], shown: str) -> Table:
    """Return a row a model, out of its facts and metrics; `shown`: the column of clusters that the page shows."""
    header = ["model", "likelihood", "latent dimensions", "parameters", "epochs", "held-out ELBO"]
    labels = _labels(models, shown)
    rows = []
    for name, (facts, metrics) in models.items():
        settings, found = facts["settings"], metrics["clusters"][shown]
        shape = [settings["likelihood"], number(settings["n_latent"]), number(facts["n_parameters"])]
        elbo = number(facts["best_validation_elbo"], 2)
        fitted = [number(facts["n_epochs"]), f"{elbo} (new cells)" if facts.get("reference") else elbo]
        clusters = [number(found["n_clusters"]), number(found["silhouette"], 3)]
        mixing = number(metrics["batch_mixing"], 3)
        rows.append([name, *shape, *fitted, *clusters, *_agreement(found["labels"], labels), mixing])
    header += ["clusters", "silhouette", *_agreement_header(labels), "batch mixing"]
    return Table(
        "The models side by side.",
        captions.COMPARISON.format(shown=shown),
        header,
        "ll" + "r" * (len(header) - 2),
        rows,
    )


def _labels(models: Mapping[str, tuple[dict, dict]], shown: str) -> list[str]:
    return sorted({label for _, metrics in models.values() for label in metrics["clusters"][shown]["labels"]})


def _agreement_header(labels: Sequence[str]) -> list[str]:
    return [f"{key}, {label}" for label in labels for key in ("ARI", "NMI")]


def _agreement(found: Mapping[str, dict], labels: Sequence[str]) -> list[str]:
    return [number(found.get(label, {}).get(key), 3) for label in labels for key in ("ari", "nmi")]


def resolution_table(metrics: dict, shown: str) -> Table:
    """Return a row a resolution: clusters, their separation and agreement with labels."""
    labels = sorted({label for found in metrics["clusters"].values() for label in found["labels"]})
    rows = []
    for name, found in metrics["clusters"].items():
        numbers = [number(found["n_clusters"]), number(found["silhouette"], 3)]
        rows.append([name, *numbers, *_agreement(found["labels"], labels)])
    header = ["clusters", "how many", "silhouette", *_agreement_header(labels)]
    return Table(
        "Clusters at each resolution.",
        captions.RESOLUTIONS.format(shown=shown),
        header,
        "l" + "r" * (len(header) - 1),
        rows,
    )


def composition_table(counts: pd.DataFrame) -> Table:
    """Return the cells of each sample (row) in each cluster (column), darker the larger the share of the sample."""
    totals = counts.sum(axis=1)
    rows = [
        [str(name), *(heat(number(n), n / max(totals[name], 1)) for n in row), number(totals[name])]
        for name, row in zip(counts.index, counts.to_numpy(), strict=True)
    ]
    return Table(
        "Cells of each sample in each cluster.",
        captions.COUNTS,
        ["sample", *map(str, counts.columns), "all"],
        "l" + "r" * (counts.shape[1] + 1),
        rows,
        ["all", *(number(n) for n in counts.sum()), number(totals.sum())],
    )


def marker_table(best: pd.DataFrame, sizes: pd.Series) -> Table:
    """Return a row a marker; `sizes`: cells a cluster."""
    rows = [
        [
            str(row.cluster),
            number(sizes.get(row.cluster, 0)),
            str(row.symbol),
            number(row.score, 1),
            number(row.logfoldchange, 2),
            number(row.mean, 2),
            percent(row.pct_in),
            percent(row.pct_out),
            words.p_value(row.pval_adj),
        ]
        for row in best.itertuples()
    ]
    return Table(
        "The first markers of each cluster.",
        captions.MARKERS,
        ["cluster", "cells", "gene", "t", "log2 fold change", "mean", "expressing", "in the rest", "adjusted p"],
        "lrlrrrrrr",
        rows,
    )


def change_table(changes: pd.DataFrame, settings: Mapping[str, Any]) -> Table:
    """Return the likeliest changes of each contrast; `settings`: section `differential` of the config."""
    rows = []
    for (comparison, stratum), genes in changes.groupby(["comparison", "stratum"], sort=False):
        first = genes.iloc[0]
        cells = f"{number(first['cells_first'])} / {number(first['cells_second'])}"
        called = f"{number(genes['is_changed'].sum())} of {number(len(genes))}"
        for at, row in enumerate(genes.head(TOP_CHANGES).itertuples()):
            where = [comparison, stratum, cells, called] if at == 0 else ["", "", "", ""]
            numbers = [
                number(row.p_change, 3),
                number(row.lfc, 2),
                number(row.lfc_sd, 2),
                number(row.pseudobulk_lfc, 2),
            ]
            rows.append([*where, str(row.gene), *numbers, number(row.replicates), words.p_value(row.pseudobulk_fdr)])
    header = ["comparison", "within", "cells", "changed", "gene", "P(change)", "log2 fold change", "sd"]
    return Table(
        "Genes that differ between groups of cells.",
        captions.CHANGES.format(**settings, n=TOP_CHANGES),
        [*header, "of pseudobulk", "replicates", "adjusted p"],
        "lllllrrrrrr",
        rows,
    )


def likelihood_table(facts: Mapping[str, Any], draws: int) -> Table:
    """Return log p(x) of each sample's cells and of all; `facts`: what rule likelihood found."""

    def row(name: str, found: Mapping[str, Any]) -> list[str]:
        values = [(found["mean"], 2), (found["se"], 2), (found["error"], 3), (found["ess"], 1)]
        return [name, number(found["cells"]), *(number(value, digits) for value, digits in values)]

    samples = sorted(facts["samples"], key=lambda found: words.natural(found["sample"]))
    return Table(
        "log p(x) of the cells.",
        captions.LIKELIHOOD.format(draws=number(draws)),
        ["sample", "cells", "log p(x), mean", "± s.e.", "Monte Carlo error", "sample size"],
        "lrrrrr",
        [row(found["sample"], found) for found in samples],
        row("all", facts["all"]),
    )


def resource_table(rules: pd.DataFrame) -> Table:
    """Return time and memory of each rule, the longest first."""
    rows = [
        [
            row.rule,
            number(row.jobs),
            words.duration(row.seconds),
            words.duration(row.longest),
            words.megabytes(row.rss),
            percent(row.cpu_seconds, row.seconds),
        ]
        for row in rules.itertuples()
    ]
    total = [
        "all",
        number(rules["jobs"].sum()),
        words.duration(rules["seconds"].sum()),
        words.duration(rules["longest"].max()),
        words.megabytes(rules["rss"].max()),
        percent(rules["cpu_seconds"].sum(), rules["seconds"].sum()),
    ]
    return Table(
        "Time and memory of each rule.",
        captions.RESOURCES,
        ["rule", "jobs", "time, all jobs", "longest job", "peak memory", "processor"],
        "lrrrrr",
        rows,
        total,
        is_measured=True,
    )
