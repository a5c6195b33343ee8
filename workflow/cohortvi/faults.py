"""What is wrong with a config, in words for the user: where, what was found, what was expected."""

import difflib
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

import jsonschema


def faults_of(config: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """Return what breaks the schema, a line each; if nothing does, what no schema can tell."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(config)
    errors = sorted(found, key=lambda error: [str(part) for part in error.absolute_path])
    faults = [fault for error in errors for fault in _describe(error)]
    faults += _infinite(config)
    return faults or list(_cross_faults(config))


def _describe(error: jsonschema.ValidationError) -> Iterator[str]:
    """Yield where a value breaks the schema, what was found, and what was expected."""
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        for key in sorted(set(error.instance) - set(known)):
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield f"{f'{where}.' if where else ''}{key}: unknown key; {hint}"
    elif error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        yield f"{where or 'config'}: missing {', '.join(missing)}; take it over from this release's config/config.yaml"
    else:
        found = f"found {error.instance!r} ({_kind(error.instance)})"
        yield f"{where}: {found}; expected {_expected(error)}{_advice(error)}"


def _infinite(values: Any, where: str = "") -> Iterator[str]:
    """Yield where a config has .inf or .nan, which a schema takes for numbers."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield from _infinite(value, f"{where}.{key}" if where else str(key))
    if isinstance(values, float) and not math.isfinite(values):
        yield f"{where}: found {values}; expected a finite number"


def _advice(error: jsonschema.ValidationError) -> str:
    described = error.schema.get("description")
    if described:
        return f" ({described})"
    # YAML 1.1 reads 1e-3 as text: a number in this notation needs a point.
    if isinstance(error.instance, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", error.instance):
        number = float(error.instance)
        return f"; write {number:g} or {error.instance.lower().replace('e', '.0e', 1)}"
    return ""


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list"}
    return "nothing" if value is None else names.get(type(value), "a section")


def _expected(error: jsonschema.ValidationError) -> str:
    value = error.validator_value
    words = {
        "type": lambda: " or ".join(value) if isinstance(value, list) else value,
        "enum": lambda: "one of " + ", ".join(map(str, value)),
        "minimum": lambda: f"at least {value}",
        "maximum": lambda: f"at most {value}",
        "exclusiveMinimum": lambda: f"more than {value}",
        "exclusiveMaximum": lambda: f"less than {value}",
        "pattern": lambda: f"letters, digits, '_', '-' and '.' only ({value})",
        "minItems": lambda: f"at least {value} of them",
        "minProperties": lambda: f"at least {value} of them",
    }
    return words.get(error.validator, lambda: error.message)()


def hint(name: str, known: Collection[str], most: int = 1) -> str:
    """Return the names nearest to one that is unknown, or some of those that there are."""
    near = difflib.get_close_matches(name, known, n=most)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there are {', '.join(sorted(known)[:12]) or 'none'}{' ...' if len(known) > 12 else ''}"


def _cross_faults(config: dict[str, Any]) -> Iterator[str]:
    """Yield what no schema can tell: values of a config, each right by itself, that do not go together."""
    clusters = config["atlas"]["clusters"]
    if clusters["shown"] not in clusters["resolutions"]:
        expected = f"expected one of atlas.clusters.resolutions {clusters['resolutions']}"
        yield f"atlas.clusters.shown: found {clusters['shown']}; {expected}"
    for where, names in (
        ("genes.always", config["genes"]["always"]),
        ("expression.genes", config["expression"]["genes"]),
    ):
        both = sorted(set(names) & set(config["genes"]["never"]))
        if both:
            yield f"{where} and genes.never both hold {', '.join(both[:5])}; expected each gene in one of them at most"
    for name, model in config["models"].items():
        yield from _label_faults(f"models.{name}", model)
    metrics = {"n_genes_by_counts", "total_counts", *(f"pct_counts_{name}" for name in config["qc"]["gene_sets"])}
    for where, names in [
        ("qc.thresholds", config["qc"]["thresholds"]),
        *((f"qc.overrides.{sample}", sections) for sample, sections in config["qc"]["overrides"].items()),
    ]:
        for name in sorted(set(names) - metrics):
            near = difflib.get_close_matches(name, metrics, n=1)
            yield f"{where}.{name}: no such metric; " + (
                f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(metrics))}"
            )


def _label_faults(where: str, model: dict[str, Any]) -> Iterator[str]:
    labels = model["labels"]
    if labels is None:
        if model["dispersion"] == "gene-label":
            yield f"{where}.dispersion: found gene-label and no labels; expected another one, or {where}.labels"
        return
    if model["prior"] != "mixture":
        yield f"{where}.prior: found {model['prior']} beside labels; expected mixture, with a component for each label"
    if labels["column"] in model["categorical_covariates"]:
        yield f"{where}.labels.column: {labels['column']!r} is a covariate too; expected it in one of them"
