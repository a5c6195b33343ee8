"""The sections of one model: training, trust, maps, composition of the clusters, markers."""

from collections.abc import Mapping

import pandas as pd

from cohortvi.files import read_json, read_table
from cohortvi.report import captions, cluster_figures, figures, tables, words
from cohortvi.report.blocks import Block, Facts, Figure, Section, Text
from cohortvi.report.inputs import ModelFiles, cross, draw_rows, read_columns, read_rows
from cohortvi.report.maps import categorical, coloring, distinct, map_panel
from cohortvi.report.sections import Cohort
from cohortvi.report.theme import ACCENT, MUTED, VARIABLES
from cohortvi.report.trust import trust_section
from cohortvi.report.words import number, percent

TABLED_SAMPLES = 200  # longer tables of the composition are left to the files
PARTS = 20  # bars of more parts than this cannot be told apart


def read_models(models: Mapping[str, ModelFiles]) -> dict[str, tuple[dict, dict]]:
    """Return {model: (facts, metrics)}."""
    return {name: (read_json(files.facts), read_json(files.metrics)) for name, files in models.items()}


def model_sections(cohort: Cohort, name: str, facts: dict, metrics: dict, shown: str) -> list[Section]:
    """Return the sections of model `name`; `shown`: the column of clusters that is shown."""
    files = cohort.inputs.models[name]
    clusters = read_columns(files.clusters, [shown])[shown].astype("category")
    settings = _facts(cohort.config["models"][name], facts)
    return [
        Section(f"model-{name}", f"Model {name}", [settings, _training(files, facts)]),
        trust_section(name, files),
        Section(f"map-{name}", "Maps", [_maps(cohort, files, clusters, facts)], level=3),
        Section(f"clusters-{name}", "Clusters", _clusters(files, metrics, clusters, shown), level=3),
        Section(f"markers-{name}", "Markers", _markers(cohort, files, clusters), level=3),
        *_changes(cohort, name, files),
        *_likelihood(cohort, name, files),
    ]


def _changes(cohort: Cohort, name: str, files: ModelFiles) -> list[Section]:
    settings = cohort.config["differential"]
    if not settings["comparisons"]:
        return []
    changes = read_table(files.differential)
    blocks = [tables.change_table(changes, settings)] if len(changes) else [Text(captions.NO_CHANGES)]
    return [Section(f"differential-{name}", "Differential expression", blocks, level=3)]


def _likelihood(cohort: Cohort, name: str, files: ModelFiles) -> list[Section]:
    draws = cohort.config["likelihood"]["draws"]
    if draws is None:
        return []
    table = tables.likelihood_table(read_json(files.likelihood), draws)
    return [Section(f"likelihood-{name}", "Marginal likelihood", [table], level=3)]


def _facts(order: Mapping[str, object], facts: dict) -> Facts:
    settings = facts["settings"]
    found = [
        ("Held-out ELBO", f"{number(facts['best_validation_elbo'], 2)} nats per cell"),
        ("Epochs", f"{number(facts['n_epochs'])} of at most {number(facts['planned_epochs'])}"),
        ("Weights kept", f"those of epoch {number(facts['best_epoch'])}"),
        ("Steps", number(facts["n_steps"])),
        ("Final KL weight", f"{facts['kl_weight']:g}"),
        ("Parameters", number(facts["n_parameters"])),
        ("Cells trained on", number(facts["n_obs"])),
        ("Genes", number(len(facts["genes"]))),
        ("Batches", number(len(facts["batches"]))),
    ]
    found += _reference(facts["reference"], facts["n_parameters"]) if facts.get("reference") else []
    found += [(key, _setting(settings[key])) for key in order]
    return Facts("The model and its training.", captions.MODEL, found)


def _reference(known: dict, n_parameters: int) -> list[tuple[str, str]]:
    """Return what is to be said of the model that this one was mapped onto."""
    new = [f"{name} {words.listed(values)}" for name, values in known["new"].items()]
    before, own = (f"{number(known[name], 2)} nats per cell" for name in ("elbo_before", "validation_elbo"))
    return [
        ("Mapped onto", f"{known['path']} ({known['digest']})"),
        ("New to it", "; ".join(new) or "nothing"),
        ("Parameters trained", f"{number(known['n_trained'])} of {number(n_parameters)}"),
        ("Held-out ELBO before", before),
        ("Held-out ELBO of the reference", f"{own}, of its own cells"),
    ]


def _setting(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_setting(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _training(files: ModelFiles, facts: dict) -> Figure | Text:
    if not facts["n_epochs"]:
        return Text(captions.UNTRAINED)
    history = read_table(files.history)
    n, planned, best = len(history), facts["planned_epochs"], facts["best_epoch"]
    end = f"stopped early, after {n} of {planned} epochs" if n < planned else f"took all {planned} epochs"
    first = captions.FIRST_EPOCH if n >= figures.LONG_TRAINING else ""
    legend = (("training", f"var(--{VARIABLES[MUTED]})"), ("validation", f"var(--{VARIABLES[ACCENT]})"))
    caption = captions.TRAINING.format(end=end, best=best, first=first)
    return Figure("Training.", caption, figures.training_panels(history, best), legend)


def _maps(cohort: Cohort, files: ModelFiles, clusters: pd.Series, facts: dict) -> Figure:
    settings, labels = cohort.config["report"], ("sample", "batch")
    samples = read_columns(files.cells, ["sample"])["sample"]
    rows = draw_rows(samples, settings["max_cells"], cohort.config["seed"])
    layout = read_rows(files.layout, ["umap_1", "umap_2"], rows).to_numpy(float)
    predicted = ["predicted_label", "label_probability"] if facts["labels"] else []
    columns = read_rows(files.cells, list(dict.fromkeys([*labels, *predicted, *settings["color_by"]])), rows)
    found = [(categorical if name in labels else coloring)(name, column) for name, column in columns.items()]
    shown = distinct([color for color in found if not color.is_constant])
    same = [color.heading for color in found if color.is_constant]
    panels = [map_panel(layout, categorical("cluster", clusters.iloc[rows]), is_labelled=True)]
    panels += [map_panel(layout, color) for color in shown]
    caption = captions.MAPS.format(
        which=_which(len(rows), len(samples)),
        repeated=captions.REPEATED if any(panel.is_folded for panel in panels) else "",
        same=captions.SAME.format(names=words.listed(same)) if same else "",
    )
    return Figure("Maps of the cells.", caption, panels)


def _which(n_drawn: int, n: int) -> str:
    cells = words.plural(n, "cell")
    return f"All {cells}" if n_drawn == n else f"{number(n_drawn)} of {cells}, {percent(n_drawn, n)} of every sample"


def _clusters(files: ModelFiles, metrics: dict, clusters: pd.Series, shown: str) -> list[Block]:
    cells = read_columns(files.cells, ["sample", "batch"])
    counts = cross(cells["sample"], clusters)
    panels, caption = [cluster_figures.composition_panel(counts, "samples, by cluster", "sample")], captions.COMPOSITION
    parts = {"sample": counts, "batch": cross(cells["batch"], clusters)}
    column = next((name for name, table in parts.items() if 1 < len(table) <= PARTS), None)
    if column:
        shares = parts[column].div(parts[column].sum(axis=1), axis=0)
        panels.append(cluster_figures.composition_panel(shares.T, f"clusters, by {column}", "cluster"))
        caption = captions.COMPOSITION_BOTH.format(column=column)
    repeated = captions.REPEATED if any(panel.is_folded for panel in panels) else ""
    few = len(counts) <= TABLED_SAMPLES
    return [
        tables.resolution_table(metrics, shown),
        Figure("Composition of the clusters.", caption + repeated, panels),
        tables.composition_table(counts) if few else Text(captions.MANY_COUNTS.format(n=len(counts))),
    ]


def _markers(cohort: Cohort, files: ModelFiles, clusters: pd.Series) -> list[Block]:
    n_markers = cohort.config["report"]["n_markers"]
    markers = read_table(files.markers)
    markers = markers.assign(cluster=markers["cluster"].astype(str))
    sizes = clusters.value_counts()
    sizes.index = sizes.index.astype(str)
    best = cluster_figures.marker_genes(markers, n_markers)
    if best.empty:
        return [Text(captions.NO_MARKERS)]
    panels, top = cluster_figures.dot_panels(markers, best, list(clusters.cat.categories.astype(str)))
    caption = captions.DOTS.format(n_markers=n_markers, top=number(top, 2))
    return [Figure("Marker genes.", caption, panels, is_wide=True), tables.marker_table(best, sizes)]
