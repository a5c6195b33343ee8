"""What can be known to be wrong before any job starts: names in the config, and the files' metadata.

What was found in a file is remembered under its path, size and time, so that a second look at a cohort of thousands
of samples costs nothing.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd

from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.references import check_references
from cohortvi.cohort.selection import joined
from cohortvi.cohort.sheet import Sample
from cohortvi.config import Config, cluster_column
from cohortvi.faults import hint
from cohortvi.files import digest, read_json, write_json

PREDICTED = ("predicted_label", "label_probability")
COMPUTED = ("row", "n_genes_by_counts", "total_counts", "doublet_score", "predicted_doublet", "reason")


def check(config: Config, samples: Sequence[Sample], made: Collection[str], memory: Path) -> None:
    """Check all that config, sheet and files tell before any job starts; ValueError lists what is wrong."""
    check_names(config, samples)
    check_references(config)
    check_files(config, samples, made, memory)


def check_names(config: Config, samples: Sequence[Sample]) -> None:
    """Check that every column and sample that the config names exists; ValueError lists those that do not."""
    faults = list(_name_faults(config, samples))
    if faults:
        raise ValueError("the config does not fit the sample sheet:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _name_faults(config: Config, samples: Sequence[Sample]) -> Iterator[str]:
    names = {sample.name for sample in samples}
    sheet = {"sample", "batch", *samples[0].columns}
    kept = set(config.cohort.keep_obs)
    measured = {*COMPUTED, *(f"pct_counts_{name}" for name in config.qc.gene_sets)}
    for column in sorted(kept & (sheet | measured)):
        yield f"cohort.keep_obs: {column!r} is also a column of the sheet or one that QC computes; leave it out"
    for column in sorted(set(PREDICTED) & (sheet | kept)):
        yield f"column {column!r} bears the name of what models with labels say of each cell; rename it"
    for column in sorted(measured & set(samples[0].columns)):
        yield f"{config.cohort.sheet}: column {column!r} bears the name of a QC metric; rename it"
    wanted = [("report.color_by", column, sheet | kept | measured) for column in config.report.color_by]
    wanted += [("atlas.metrics.labels", column, sheet | kept) for column in config.atlas.metrics.labels]
    wanted += [("store.validation.by", config.store.validation.by, sheet | {"cell"})]
    wanted += [
        (f"models.{model}.labels.column (of cohort.keep_obs)", settings.labels.column, kept)
        for model, settings in config.models.items()
        if settings.labels
    ]
    wanted += [("qc.overrides", name, names) for name in config.qc.overrides]
    wanted += [("qc.gate.keep", name, names) for name in config.qc.gate.keep]
    for model, settings in config.models.items():
        for kind, known in (("categorical", sheet | kept), ("continuous", sheet | kept | measured)):
            columns = getattr(settings, f"{kind}_covariates")
            wanted += [(f"models.{model}.{kind}_covariates", column, known) for column in columns]
    clusters = {cluster_column(resolution) for resolution in config.atlas.clusters.resolutions}
    if all(model.labels for model in config.models.values()):
        clusters.add(PREDICTED[0])
    wanted += [("expression.groups", column, sheet | kept | clusters) for column in config.expression.groups]
    wanted += [("expression.batches", name, {sample.batch for sample in samples}) for name in config.expression.batches]
    wanted += [("differential.replicate", config.differential.replicate, sheet | kept)]
    for comparison, groups in config.differential.comparisons.items():
        columns = [("column", groups.column), *([] if groups.within is None else [("within", groups.within)])]
        wanted += [
            (f"differential.comparisons.{comparison}.{key}", name, sheet | kept | clusters) for key, name in columns
        ]
    for where, name, known in wanted:
        if name not in known:
            yield f"{where}: {name!r} is unknown; {hint(name, known)}"
    truth = config.atlas.metrics.truth
    if truth and not truth.startswith("resources/") and not Path(truth).is_dir():
        yield f"atlas.metrics.truth: no such folder {truth!r}; set it to null unless the cohort is a simulated one"
    yield from _batch_faults(config, samples)
    yield from _covariate_faults(config, samples)


def _batch_faults(config: Config, samples: Sequence[Sample]) -> Iterator[str]:
    for sample in samples:
        found = sample.columns.get("batch", sample.batch)
        if found != sample.batch:
            yield (
                f"{config.cohort.sheet}: column 'batch' of sample {sample.name!r} is {found!r}, but cohort.batch_key "
                f"makes its batch {sample.batch!r}; rename the column, or let batch_key be [batch]"
            )
            return


def _covariate_faults(config: Config, samples: Sequence[Sample]) -> Iterator[str]:
    for model, settings in config.models.items():
        if "batch" in settings.categorical_covariates:
            yield f"models.{model}.categorical_covariates: every model is told the batch; leave 'batch' out"
        for column in settings.continuous_covariates:
            values = {sample.name: sample.columns[column] for sample in samples if column in sample.columns}
            for name, value in values.items():
                if pd.isna(pd.to_numeric(value, errors="coerce")):
                    yield (
                        f"models.{model}.continuous_covariates: column {column!r} of sample {name!r} is {value!r}; "
                        "expected a number for every sample"
                    )


def check_files(config: Config, samples: Sequence[Sample], made: Collection[str], memory: Path) -> None:
    """Open every sample's metadata; ValueError lists all faults found, and none is left for a job to find late.

    `made`: paths that a rule of the workflow writes, which need not be there yet. `memory`: a JSON file that remembers
    what was found.
    """
    known = read_json(memory) if memory.is_file() else {"samples": {}, "genes": {}}
    remembered = dict(known["samples"])
    found, genes, faults = {}, {}, []
    labelled = [model for model in config.models.values() if model.labels]
    optional = sorted({model.labels.column for model in labelled})
    settings = [config.cohort.gene_key, config.qc.symbols, list(config.cohort.keep_obs), optional]
    for sample in samples:
        if sample.path in made:
            continue
        key = digest(sample.source(), settings, _stamp(sample.path))
        if key not in known["samples"]:
            try:
                raw = open_raw(
                    sample,
                    gene_key=config.cohort.gene_key,
                    symbols=config.qc.symbols,
                    keep_obs=config.cohort.keep_obs,
                    chunk_cells=config.cohort.chunk_cells,
                    may_lack=optional,
                )
            except ValueError as error:
                faults.append(str(error))
                continue
            names = [str(name) for name in raw.var.index]
            known["samples"][key] = {"genes": digest(names), "lacking": list(raw.lacking)}
            known["genes"][digest(names)] = names
        found[key] = known["samples"][key]
        genes[found[key]["genes"]] = known["genes"][found[key]["genes"]]
    if config.cohort.join == "inner" and genes and joined([pd.Index(names) for names in genes.values()], "inner").empty:
        shown = "; ".join(f"{', '.join(names[:3])} ..." for names in list(genes.values())[:4])
        faults.append(
            f"the samples share no gene: their lists begin {shown}; expected names that all samples know. Set "
            "cohort.gene_key to a column of var that they have in common, or cohort.join: outer"
        )
    for column in {model.labels.column for model in labelled if model.reference is None}:
        if found and not faults and all(column in facts["lacking"] for facts in found.values()):
            faults.append(f"no sample has an obs column {column!r}, which models.*.labels names; expected it in some")
    if not any(sample.path in made for sample in samples) and not faults:
        faults += _gene_faults(config, [pd.Index(names) for names in genes.values()])
    if faults:
        raise ValueError("the samples have faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
    if found != remembered:
        write_json({"samples": found, "genes": genes}, memory)


def _gene_faults(config: Config, genes: Sequence[pd.Index]) -> Iterator[str]:
    wanted = config.expression.genes
    known = joined(genes, config.cohort.join) if wanted else pd.Index([])
    for name in wanted:
        if name not in known:
            yield f"expression.genes: {name!r} is none of the cohort's {len(known)}; {hint(name, known, 3)}"


def _stamp(path: str) -> list[int]:
    local = Path(path)
    if "://" in path or not local.exists():
        return []
    files = [local] if local.is_file() else sorted(local.iterdir())
    return [number for file in files for number in (file.stat().st_size, file.stat().st_mtime_ns)]
