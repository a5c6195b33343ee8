"""The ledger: cells in = kept + removed by each reason at every stage, or the run stops."""

import pytest

from cohortvi.cohort.ledger import account


def facts(sample, n_obs, n_kept, removed, quarantined=None):
    return {"sample": sample, "n_obs": n_obs, "n_kept": n_kept, "removed": removed, "quarantined": quarantined}


QC = [facts("a", 10, 8, {"low": 2}), facts("b", 5, 0, {"low": 1, "quarantined": 4}, "too few")]
COUNTS = [{"samples": {"a": 8}}, {"samples": {"b": 0}}]
SHARDS = [{"samples": {"a": 7}, "split": "train"}, {"samples": {"a": 1}, "split": "validation"}]
MODELS = {"nb": ({"samples": {"a": 8}}, {"samples": {"a": 8}})}


def test_every_cell_is_accounted_for():
    ledger = account(QC, COUNTS, SHARDS, MODELS).set_index("sample")
    assert ledger.loc["a"].drop("quarantined").to_dict() == {
        "cells_in": 10, "removed_low": 2, "removed_quarantined": 0, "kept": 8, "counts": 8, "train": 7,
        "validation": 1, "latent_nb": 8, "atlas_nb": 8,
    }  # fmt: skip
    assert ledger.loc["b", "quarantined"] == "too few"


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"qc": [facts("a", 10, 8, {"low": 1}), QC[1]]}, "qc: sample 'a' has 10 cells before and 9 accounted"),
        ({"counts": [{"samples": {"a": 7}}, COUNTS[1]]}, "extract: sample 'a' has 8 cells before and 7"),
        ({"shards": SHARDS[:1]}, "shard: sample 'a' has 8 cells before and 7"),
        ({"models": {"nb": ({"samples": {"a": 9}}, MODELS["nb"][1])}}, "embed of model nb: sample 'a' has 8"),
        ({"models": {"nb": (MODELS["nb"][0], {"samples": {}})}}, "atlas of model nb: sample 'a' has 8"),
    ],
)
def test_a_lost_cell_stops_the_run_and_is_named(change, stage):
    parts = {"qc": QC, "counts": COUNTS, "shards": SHARDS, "models": MODELS} | change
    with pytest.raises(ValueError, match="cells are unaccounted for") as error:
        account(**parts)
    assert stage in str(error.value)
