"""What a rule is shown of config and sheet."""

from dataclasses import replace

from cohortvi.cohort import sections
from cohortvi.cohort.sheet import Sample

SAMPLES = [
    Sample(name, "x", None, None, (), f"{donor}-r1", {"donor": donor, "age": age})
    for name, donor, age in (("s1", "d1", "40"), ("s2", "d2", "50"))
]


def test_qc_of_a_sample_shows_its_own_overrides_and_exemption_alone(demo_values):
    section = demo_values["qc"]
    section["overrides"] = {"s1": {"total_counts": {"below": 9}}, "s2": {"total_counts": {"below": 8}}}
    section["gate"]["keep"] = ["s2", "s1"]
    found = sections.qc_of(section, "s1")
    assert found["overrides"] == {"s1": {"total_counts": {"below": 9}}}
    assert found["gate"]["keep"] == ["s1"]
    assert sections.qc_of(section, "s3") == {**section, "overrides": {}, "gate": {**section["gate"], "keep": []}}


def test_batches_list_their_samples():
    assert sections.by_batch({"s1": "a", "s2": "b", "s3": "a"}) == {"a": ["s1", "s3"], "b": ["s2"]}


def test_stores_carry_the_column_that_cells_are_held_out_by():
    assert sections.store_columns(SAMPLES[0], "donor") == {"batch": "d1-r1", "donor": "d1"}
    assert sections.store_columns(SAMPLES[0], "cell") == {"batch": "d1-r1"}


def test_covariates_come_from_the_sheet_if_it_has_them(demo_config):
    model = replace(
        demo_config.models["nb"], categorical_covariates=("donor", "cell_type"), continuous_covariates=("age",)
    )
    assert sections.sheet_covariates(model, SAMPLES) == {
        "donor": {"s1": "d1", "s2": "d2"},
        "age": {"s1": "40", "s2": "50"},
    }


def test_the_config_of_an_atlas_holds_its_own_model_and_no_report(demo_values):
    demo_values["models"]["other"] = demo_values["models"]["nb"]
    found = sections.config_of_atlas(demo_values, "nb")
    assert list(found["models"]) == ["nb"]
    assert found.keys() == {"seed", "cohort", "qc", "genes", "store", "atlas", "models"}
