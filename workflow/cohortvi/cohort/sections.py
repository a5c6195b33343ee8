"""What a rule is shown of config and sheet: no more than it uses, so that a change elsewhere reruns nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from cohortvi.cohort.sheet import Sample
from cohortvi.config import Model

MADE_BY = ("seed", "cohort", "qc", "genes", "store", "atlas")  # sections that decide an atlas, beside its model's


def qc_of(section: Mapping[str, Any], sample: str) -> dict[str, Any]:
    """Return the section `qc` of the config with the overrides and the exemption of this sample alone."""
    gate = {**section["gate"], "keep": [name for name in section["gate"]["keep"] if name == sample]}
    overrides = {name: values for name, values in section["overrides"].items() if name == sample}
    return {**section, "gate": gate, "overrides": overrides}


def by_batch(batches: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the samples of each batch, given each sample's."""
    samples: dict[str, list[str]] = {}
    for sample, batch in batches.items():
        samples.setdefault(batch, []).append(sample)
    return samples


def store_columns(sample: Sample, held_out_by: str) -> dict[str, str]:
    """Return what the stores say of all cells of a sample: its batch, and the column that held-out cells go by."""
    held = {held_out_by: sample.columns[held_out_by]} if held_out_by in sample.columns else {}
    return {"batch": sample.batch, **held}


def store_of(section: Mapping[str, Any], shards: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the section `store` of the config for the shards of one generation, whatever others there are."""
    return {**section, "shards": len(shards["train"]), "reshuffle": 0}


def sheet_covariates(model: Model, samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    """Return the covariates of a model that the sheet holds: {column: {sample: value}}."""
    columns = [*model.categorical_covariates, *model.continuous_covariates]
    held = [column for column in columns if column in samples[0].columns]
    return {column: {sample.name: sample.columns[column] for sample in samples} for column in held}


def config_of_atlas(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the part of the config that made a model's atlas."""
    return {**{key: config[key] for key in MADE_BY}, "models": {model: config["models"][model]}}
