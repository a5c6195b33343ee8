"""The sections on the cohort as a whole: samples, quality control, genes, truth, provenance."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd
import yaml

from cohortvi.files import digest, read_table
from cohortvi.report import captions, figures, tables, words
from cohortvi.report.blocks import Facts, Figure, Section, Table, Text
from cohortvi.report.inputs import ReportInputs, read_benchmarks, read_spreads
from cohortvi.report.words import number, percent

FITS_SHOWN = 6
NOTICES = 5  # more quarantined samples than this share one
PACKAGES = (
    "cohortvi", "snakemake", "torch", "numpy", "scipy", "pandas", "anndata", "zarr", "scanpy", "scikit-learn",
    "scikit-misc", "igraph", "umap-learn", "matplotlib",
)  # fmt: skip


@dataclass(frozen=True)
class Cohort:
    """What the sections share: the inputs, the config as read, the QC facts, the ledger, the genes."""

    inputs: ReportInputs
    config: dict[str, Any]
    facts: dict[str, dict]
    ledger: pd.DataFrame
    genes: pd.DataFrame

    @property
    def quarantined(self) -> dict[str, str]:
        """Samples that take part in nothing, with the rule that excluded each."""
        return {name: found["quarantined"] for name, found in self.facts.items() if found["quarantined"]}


def samples_section(cohort: Cohort) -> Section:
    """Return the cohort's table and the ledger."""
    many = len(cohort.quarantined) > NOTICES
    notices = [
        Text(f"Sample {name} is quarantined: {rule}. To let it through, name it in qc.gate.keep.", "notice")
        for name, rule in ({} if many else cohort.quarantined).items()
    ]
    if many:
        names = words.listed(list(cohort.quarantined))
        notices = [
            Text(f"{len(cohort.quarantined):,} samples are quarantined, for the rules below: {names}.", "notice")
        ]
    shown = [tables.cohort_table(cohort.inputs.sheet, cohort.facts), tables.ledger_table(cohort.ledger)]
    return Section("cohort", "The cohort", [*notices, *shown])


def quality_section(cohort: Cohort) -> Section:
    """Return the distributions of the QC metrics with the effective thresholds."""
    spreads = read_spreads(cohort.inputs, cohort.facts)
    n = len(cohort.facts)
    rows = captions.RIDGES if n <= figures.RIDGES else captions.RANKS
    caption = captions.QUALITY.format(n=words.plural(n, "sample"), rows=rows, tail=100 * figures.TAIL)
    figure = Figure("QC metrics of each sample.", caption, figures.qc_panels(spreads))
    return Section("quality", "Quality control", [figure])


def genes_section(cohort: Cohort) -> Section:
    """Return mean and variance of the genes in the largest batches, with the selected ones."""
    settings, selected = cohort.config["genes"], cohort.genes.index[cohort.genes["highly_variable"]]
    fits = {batch: read_table(path) for batch, path in cohort.inputs.fits.items()}
    fits = {batch: fit for batch, fit in fits.items() if len(fit)}
    largest = sorted(fits, key=lambda batch: (-int(fits[batch]["n_obs"].max()), words.natural(batch)))[:FITS_SHOWN]
    width = 400 if len(largest) in (1, 2, 4) else 310
    panels = [
        figures.mean_variance_panel(fits[batch], selected, batch, width) for batch in sorted(largest, key=words.natural)
    ]
    n_left_out = len(fits) - len(largest)
    caption = captions.GENES.format(
        n=number(len(selected)),
        how=f"listed in {frozen}" if (frozen := settings["frozen"]) else f"{settings['flavor']}, over all batches",
        trend=captions.TREND if settings["flavor"] == "seurat_v3" else "",
        left_out=captions.LEFT_OUT.format(shown=len(largest), n=n_left_out) if n_left_out else "",
    )
    return Section("genes", "Selected genes", [Figure("Mean and variance of genes.", caption, panels)])


def truth_section(cohort: Cohort, metrics: Mapping[str, dict]) -> Section | None:
    """Return what was recovered of a simulated cohort's truth, or None where no truth is known."""
    known = {model: found["truth"] for model, found in metrics.items() if found.get("truth")}
    if not known:
        return None
    rows = [
        [model, name, number(found["ari"], 3), number(found["nmi"], 3), number(found["n_labelled"])]
        for model, truth in known.items()
        for name, found in truth["types"].items()
    ]
    types = Table(
        "Clusters against the simulated cell types.",
        captions.TYPES,
        ["model", "clusters", "ARI", "NMI", "cells"],
        "llrrr",
        rows,
    )
    effects = [(model, truth["effects"]) for model, truth in known.items() if truth["effects"]]
    return Section("truth", "What was recovered of the truth", [_recovered(known), types, *_effect_figure(effects)])


def _recovered(known: Mapping[str, dict]) -> Facts:
    truth = next(iter(known.values()))
    doublets, dying = truth["doublets"], truth["dying"]
    quarantined, failed = truth["quarantined"], truth["failed"]
    pairs = [
        ("Doublets simulated", number(doublets["n_true"])),
        ("Doublets called", number(doublets["n_called"])),
        ("Precision of the calls", number(doublets["precision"], 3)),
        ("Recall of the calls", number(doublets["recall"], 3)),
        ("AUC of the score", number(doublets["auc"], 3)),
        ("Dying cells removed", f"{number(dying['n_removed'])} of {number(dying['n_true'])}"),
        ("Failed samples quarantined", f"{len(set(failed) & set(quarantined))} of {len(failed)}"),
        ("Other samples quarantined", number(len(set(quarantined) - set(failed)))),
    ]
    return Facts("Doublets, dying cells, failed samples.", captions.RECOVERED, pairs)


def _effect_figure(effects: list[tuple[str, dict]]) -> list[Figure]:
    if not effects:
        return []
    panels = []
    for model, found in effects:
        panel = figures.effects_panel(found["true"], found["estimated"])
        panel.heading = f"{model} · correlation {number(found['correlation'], 3)}"
        panels.append(panel)
    first, last = effects[0][1]["batches"]
    caption = captions.EFFECT.format(first=first, last=last)
    return [Figure("The effect of the batch.", caption, panels)]


def provenance_section(cohort: Cohort, model_facts: Mapping[str, dict]) -> Section:
    """Return config, seeds, versions and digests, and last what differs from run to run: time and memory."""
    selected = list(cohort.genes.index[cohort.genes["highly_variable"]])
    pairs = [
        ("Seed", str(cohort.config["seed"])),
        ("Digest of the config", digest(used_config(cohort.config))),
        ("Digest of the selected genes", digest(selected)),
        *((f"Digest of the shards of {model}", facts["shards"]) for model, facts in model_facts.items()),
    ]
    versions = [("python", sys.version.split()[0]), *((name, found) for name in PACKAGES if (found := _version(name)))]
    for model, facts in model_facts.items():
        trained = words.listed([f"{name} {found}" for name, found in facts["versions"].items()])
        versions.append((f"{model} was trained by", trained))
    used = yaml.safe_dump(used_config(cohort.config), sort_keys=False, allow_unicode=True, default_flow_style=None)
    blocks = [
        Facts("Seed and digests.", captions.DIGESTS, pairs),
        Facts("Versions.", captions.VERSIONS, versions),
        Text("The part of the config that was used:"),
        Text(used, "code"),
    ]
    rules = read_benchmarks(cohort.inputs.benchmarks)
    return Section("provenance", "Provenance", blocks + ([tables.resource_table(rules)] if len(rules) else []))


def used_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config without the simulator's parameters, where the cohort is not simulated."""
    return {key: value for key, value in config.items() if key != "simulate" or config["atlas"]["metrics"]["truth"]}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def abstract(cohort: Cohort, models: Mapping[str, tuple[dict, dict]], shown: str) -> str:
    """Return what the page comes to, in a few sentences."""
    n_in, n_kept = int(cohort.ledger["cells_in"].sum()), int(cohort.ledger["kept"].sum())
    batches = {row["batch"] for row in cohort.inputs.sheet.values()}
    origin = f"{words.plural(len(cohort.facts), 'sample')} in {words.plural(len(batches), 'batch')}"
    kept = f"{number(n_kept)} ({percent(n_kept, n_in)}) passed quality control"
    parts = [f"{origin} gave {words.plural(n_in, 'cell')}, of which {kept}."]
    if cohort.quarantined:
        many = len(cohort.quarantined) > 1
        names = words.listed(list(cohort.quarantined))
        parts.append(f"{'Samples' if many else 'Sample'} {names} {'were' if many else 'was'} quarantined.")
    # The ELBO of a mapped model is that of other cells.
    comparable = [name for name, (facts, _) in models.items() if not facts.get("reference")] or list(models)
    best = max(comparable, key=lambda name: models[name][0]["best_validation_elbo"])
    facts, metrics = models[best]
    elbo = f"{number(facts['best_validation_elbo'], 2)} nats per cell"
    of_many = f"Of {len(comparable)} models, {best} reached the best held-out ELBO,"
    alone = "The model" if len(models) == 1 else f"Model {best}"
    reached = of_many if len(comparable) > 1 else f"{alone} reached a held-out ELBO of"
    clusters = words.plural(metrics["clusters"][shown]["n_clusters"], "cluster")
    return " ".join([*parts, f"{reached} {elbo}, and its cells fall into {clusters} ({shown})."])
