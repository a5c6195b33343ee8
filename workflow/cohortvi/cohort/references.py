"""The models that others are mapped onto, as far as their facts tell before any job starts.

A reference is a folder with model.safetensors and model.json, as rule train writes them, which no rule writes again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cohortvi.cohort.selection import read_list
from cohortvi.config import Config, Labels, Model
from cohortvi.files import read_json

FILES = ("model.safetensors", "model.json")
TRAINED = "results/models"  # where rule train writes
# Settings that decide which parameters a model has and what they mean; the others say how it is trained.
SHAPE = (
    *("likelihood", "dispersion", "n_latent", "n_hidden", "n_layers", "categorical_covariates"),
    *("continuous_covariates", "encode_covariates", "coding", "n_embedding", "library", "posterior", "prior"),
    *("n_components", "labels", "decoder", "norm"),
)
FACTS = ("settings", "vae", "genes", "batches", "categories", "continuous", "labels", "best_validation_elbo")
SHOWN = 5  # genes listed in a message


def reference_files(model: Model) -> list[str]:
    """Return the files of the model that this one is mapped onto; none if it is trained from scratch."""
    return [] if model.reference is None else [f"{model.reference.path}/{name}" for name in FILES]


def check_references(config: Config) -> None:
    """Check that the models can be mapped onto their references; ValueError lists what speaks against it."""
    faults = [fault for name in config.models for fault in _faults(config, name)]
    if faults:
        raise ValueError("the references of models have faults:\n" + "\n".join(f"  - {fault}" for fault in faults))


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Return what model.json in a folder says. Errors: ValueError if a file is not there, or says too little."""
    for name in FILES:
        if not (Path(folder) / name).is_file():
            raise ValueError(
                f"{folder}: no {name}; expected a folder with {' and '.join(FILES)}, such as a copy of "
                f"{TRAINED}/NAME of an earlier run"
            )
    path = Path(folder) / "model.json"
    try:
        facts = read_json(path)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: no JSON ({error}); expected the file as rule train wrote it. Copy it again"
        ) from None
    missing = [name for name in FACTS if not isinstance(facts, dict) or name not in facts]
    if missing:
        raise ValueError(
            f"{path}: it lacks {', '.join(missing)}; expected the facts of a model, as rule train wrote them"
        )
    return facts


def shape_faults(settings: dict[str, Any], model: Model) -> Iterator[str]:
    """Yield every setting that shapes a model and of which this model has another value than `settings` of its file."""
    for name in SHAPE:
        found, known = (_plain(value) for value in (getattr(model, name), settings.get(name)))
        if found != known:
            yield f"{name} is {found!r}; expected {known!r}, as the reference has it"


def _plain(value: Any) -> Any:
    """Return a setting, from a config or from a file, as values that can be compared; of labels, their column."""
    if isinstance(value, Labels):
        return value.column
    if isinstance(value, dict):
        return value["column"]
    return sorted(value) if isinstance(value, list | tuple) else value


def _faults(config: Config, name: str) -> Iterator[str]:
    model, where = config.models[name], f"models.{name}.reference"
    if model.reference is None:
        return
    path = Path(model.reference.path)
    if any(path.resolve() == Path(TRAINED, trained).resolve() for trained in config.models):
        yield (
            f"{where}: {path} is where rule train writes a model of this config, which would be trained again; copy "
            f"the folder (cp -r {path} references/{path.name}) and name the copy"
        )
        return
    try:
        facts = read_facts(path)
    except ValueError as error:
        yield f"{where}: {error}"
        return
    yield from (f"models.{name}.{fault}" for fault in shape_faults(facts["settings"], model))
    yield from (f"{where}: {fault}" for fault in _gene_faults(config, path, facts["genes"]))


def _gene_faults(config: Config, path: Path, genes: list[str]) -> Iterator[str]:
    advice = f"Set genes.frozen: {path}/model.json, which is read as its list"
    if config.genes.frozen is None:
        yield f"genes.frozen is null; expected the {len(genes)} genes of the reference. {advice}"
    elif not Path(config.genes.frozen).is_file():
        yield f"genes.frozen: no file {config.genes.frozen!r}. {advice}"
    else:
        listed = set(read_list(config.genes.frozen))
        missing = [gene for gene in genes if gene not in listed]
        if missing:
            shown = ", ".join(missing[:SHOWN])
            yield f"genes.frozen ({config.genes.frozen}) lacks {len(missing)} genes of the reference, {shown}. {advice}"
