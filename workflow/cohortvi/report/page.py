"""The page: one HTML file that needs nothing beside it, with the same bytes for the same inputs.

No script, no address, no time of day; every text that comes from users is escaped by the template. Only the last table,
between the comments `resources`, differs between two equal runs.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cohortvi.config import cluster_column
from cohortvi.files import read_table, replacing
from cohortvi.report import sections, tables, words
from cohortvi.report.blocks import Section, number
from cohortvi.report.inputs import ReportInputs, read_facts, read_ledger
from cohortvi.report.model_sections import model_sections, read_models
from cohortvi.report.sections import Cohort

FOLDER = Path(__file__).parent


def write_report(inputs: ReportInputs, config: dict[str, Any], out: Path) -> None:
    """Write the page of a cohort to `out`; `config`: the whole config, as read."""
    cohort = Cohort(inputs, config, read_facts(inputs), read_ledger(inputs.ledger), read_table(inputs.genes))
    models = read_models(inputs.models)
    shown = cluster_column(config["atlas"]["clusters"]["shown"])
    parts = [sections.samples_section(cohort), sections.quality_section(cohort), sections.genes_section(cohort)]
    parts.append(Section("models", "The models", [tables.comparison_table(models, shown)]))
    for name, (facts, metrics) in models.items():
        parts += model_sections(cohort, name, facts, metrics, shown)
    truth = sections.truth_section(cohort, {name: metrics for name, (_, metrics) in models.items()})
    parts += [] if truth is None else [truth]
    parts.append(sections.provenance_section(cohort, {name: facts for name, (facts, _) in models.items()}))
    number(parts)
    page = _template().render(
        title=config["report"]["title"],
        abstract=sections.abstract(cohort, models, shown),
        numbers=key_numbers(cohort),
        sections=parts,
    )
    with replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")


def key_numbers(cohort: Cohort) -> list[tuple[str, str, str]]:
    """Return (what, how many, out of how many) for the head of the page."""
    n_in, n_kept = int(cohort.ledger["cells_in"].sum()), int(cohort.ledger["kept"].sum())
    n_quarantined, n_genes = len(cohort.quarantined), int(cohort.genes["highly_variable"].sum())
    return [
        ("samples", words.number(len(cohort.facts)), f"{words.number(n_quarantined)} quarantined"),
        ("cells in", words.number(n_in), "that the sheet selects"),
        ("cells kept", words.number(n_kept), words.percent(n_kept, n_in)),
        ("genes selected", words.number(n_genes), f"of {words.number(len(cohort.genes))}"),
        ("models", words.number(len(cohort.inputs.models)), words.listed(list(cohort.inputs.models), 3)),
    ]


def _template() -> Template:
    loader = FileSystemLoader(FOLDER)
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, **options).get_template("template.html")
