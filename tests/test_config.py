"""The config: one place for each value, unknown keys refused with the nearest right one, types checked."""

import copy
from dataclasses import fields, is_dataclass
from typing import get_args, get_origin, get_type_hints

import pytest

from cohortvi.config import Config, Reference, check
from cohortvi.typed import build


def test_the_shipped_config_is_valid_and_becomes_dataclasses(demo_values, config_schema):
    config = check(demo_values, config_schema)
    assert config.models["nb"].learning_rate == demo_values["models"]["nb"]["learning_rate"]
    assert config.cohort.batch_key == tuple(demo_values["cohort"]["batch_key"])


def compare(kind, values, schema, defs):
    schema = defs[schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
    names = {field.name for field in fields(kind)}
    assert names == set(values) == set(schema["properties"]), kind
    assert schema["additionalProperties"] is False
    for name, hint in get_type_hints(kind).items():
        inner = values[name]
        if is_dataclass(hint):
            compare(hint, inner, schema["properties"][name], defs)
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            for section in inner.values():
                compare(get_args(hint)[1], section, schema["properties"][name]["additionalProperties"], defs)


def test_schema_dataclasses_and_config_have_the_same_keys(demo_values, config_schema):
    compare(Config, demo_values, config_schema, config_schema["$defs"])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("qc.doublet", 1, "qc.doublet: unknown key; did you mean 'doublets'?"),
        ("store.shard", 1, "store.shard: unknown key; did you mean 'shards'?"),
        ("modelz", {}, "modelz: unknown key; did you mean 'models'?"),
        ("store.shards", "4", "store.shards: found '4' (text); expected integer"),
        ("seed", -1, "seed: found -1 (an integer); expected at least 0"),
        ("seed", None, "seed: found None (nothing); expected integer"),
        ("genes.flavor", "seurat", "expected one of seurat_v3, pearson_residuals"),
        ("genes.span", 0, "genes.span: found 0 (an integer); expected more than 0"),
        ("models.nb.learning_rate", "1e-3", "write 0.001 or 1.0e-3"),
        ("models.nb.prior_shrinkage", float("inf"), "models.nb.prior_shrinkage: found inf; expected a finite number"),
        ("expression.library", float("nan"), "expression.library: found nan; expected a finite number"),
        ("atlas.clusters.resolutions", [float("nan")], "atlas.clusters.resolutions.0: found nan; expected a finite"),
        ("models.nb.likelihood", "normal", "expected one of nb, zinb, poisson"),
        ("cohort.batch_key", "run", "cohort.batch_key: found 'run' (text); expected array"),
        ("atlas.clusters.shown", 7, "atlas.clusters.shown: found 7; expected one of atlas.clusters.resolutions"),
        ("qc.overrides", {"s1": {"pct_counts_mito": {"below": 5}}}, "did you mean 'pct_counts_mt'?"),
        ("qc.overrides", {"s1": {"pct_counts_mt": {"belo": 5}}}, "belo: unknown key; did you mean 'below'?"),
        ("genes.always", ["A"], "genes.always and genes.never both hold A"),
        ("expression.genes", ["A"], "expression.genes and genes.never both hold A"),
        ("likelihood.draws", 1, "likelihood.draws: found 1 (an integer); expected at least 2"),
        ("expression.groups", ["run", "run"], "expression.groups: found ['run', 'run'] (a list); expected"),
    ],
)
def test_each_fault_is_named_with_what_was_expected(demo_values, config_schema, path, value, expected):
    values = copy.deepcopy(demo_values)
    values["genes"]["never"] = ["A"]
    section = values
    *parents, last = path.split(".")
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(ValueError, match="the config has faults") as error:
        check(values, config_schema)
    assert expected in str(error.value)


def test_all_faults_are_listed_at_once(demo_values, config_schema):
    del demo_values["seed"], demo_values["store"]["shards"]
    with pytest.raises(ValueError, match="missing seed") as error:
        check(demo_values, config_schema)
    assert "store: missing shards" in str(error.value)


def test_a_reference_is_none_or_a_section_of_its_own(demo_values, config_schema):
    assert check(demo_values, config_schema).models["nb"].reference is None
    demo_values["models"]["nb"]["reference"] = {"path": "references/nb", "surgery": True}
    assert check(demo_values, config_schema).models["nb"].reference == Reference("references/nb", surgery=True)
    compare(Reference, demo_values["models"]["nb"]["reference"], config_schema["properties"]["models"]
            ["additionalProperties"]["properties"]["reference"], config_schema["$defs"])  # fmt: skip
    demo_values["models"]["nb"]["reference"]["surgry"] = True
    with pytest.raises(ValueError, match=r"models\.nb\.reference\.surgry: unknown key; did you mean 'surgery'\?"):
        check(demo_values, config_schema)


def test_a_list_becomes_a_tuple_and_an_integer_a_float(demo_values):
    from cohortvi.config import Clusters

    assert build(Clusters, {"resolutions": [1, 2], "shown": 1}) == Clusters((1, 2), 1.0)
