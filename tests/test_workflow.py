"""The workflow as a whole, on a tiny cohort: end to end, what reruns when, what is refused before any job starts."""

import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from workflows import GATHER, planned, planned_samples, run, tiny_clone, write_sheet

pytestmark = pytest.mark.slow

CHANGES = {"differential": 1, "expression": 1}  # of the table of all cells
ASKED = {"likelihood": 1, **CHANGES}  # rules that the config asks for


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A clone, in a folder whose path holds a space, in which the tiny cohort has run."""
    clone = tiny_clone(tmp_path_factory.mktemp("with a space") / "clone")
    run(clone)
    return clone


@pytest.fixture
def clone(done, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(done, tmp_path / "clone", symlinks=True)


def test_everything_is_written_and_every_cell_accounted_for(done):
    ledger = pd.read_csv(done / "results/cohort/ledger.tsv", sep="\t")
    atlas = ad.read_zarr(done / "results/models/nb/atlas.zarr")
    assert (ledger["cells_in"] == 250).all()
    assert atlas.n_obs == ledger["atlas_nb"].sum() == ledger["kept"].sum() > 500
    assert atlas.n_vars == 400
    assert atlas.var["highly_variable"].sum() == 150
    assert {"X_latent", "X_latent_std", "X_umap"} <= set(atlas.obsm)
    assert {"sample", "batch", "donor", "leiden_0.5", "total_counts"} <= set(atlas.obs)
    assert "connectivities" in atlas.obsp
    assert yaml.safe_load(atlas.uns["cohortvi"]["config"])["genes"]["n_top"] == 150
    assert json.loads(atlas.uns["cohortvi"]["model"])["kl_weight"] == 1
    assert (done / "results/report/index.html").stat().st_size > 100_000


def test_all_stores_hold_the_same_cells_in_the_same_order(done):
    folder = done / "results/models/nb"
    names = [
        name for i in range(1, 5) for name in ad.read_zarr(done / f"results/store/counts/sample0{i}.zarr").obs_names
    ]
    assert all(name.startswith("sample0") for name in names)
    assert list(ad.read_zarr(folder / "latent.zarr").obs_names) == names
    assert list(ad.read_zarr(folder / "atlas.zarr").obs_names) == names
    assert list(ad.read_zarr(folder / "expression.zarr").obs_names) == names
    for table in ("clusters", "layout", "cells", "likelihood"):
        assert list(pd.read_parquet(folder / f"{table}.parquet").index) == names
    shards = sorted((done / "results/store/shards").glob("*.zarr"))
    shuffled = [name for shard in shards for name in ad.read_zarr(shard).obs_names]
    assert shuffled != names
    assert sorted(shuffled) == names


def test_what_the_config_asks_for_is_written_and_told_in_the_report(done):
    folder = done / "results/models/nb"
    cells, store = pd.read_parquet(folder / "cells.parquet"), ad.read_zarr(folder / "expression.zarr")
    assert list(store.var_names) == ["RPL1", "RPS2"]
    groups = pd.read_parquet(folder / "expression.parquet").set_index(["column", "group", "gene"])
    for column in ("donor", "leiden_0.5"):
        expected = (
            pd.DataFrame(store.X, columns=store.var_names).groupby(cells[column].to_numpy(), observed=True).mean()
        )
        np.testing.assert_allclose(groups.loc[column, "mean"].unstack()[expected.columns], expected, rtol=1e-5)
    assert ad.read_zarr(folder / "latent.zarr").obsm["X_latent_samples"].shape == (len(cells), 2, 10)
    found = json.loads((folder / "likelihood.json").read_text())
    assert found["all"]["mean"] == pytest.approx(pd.read_parquet(folder / "likelihood.parquet")["log_p"].mean())
    assert "log p(x) of the cells." in (done / "results/report/index.html").read_text()


def test_counts_are_never_changed_on_the_way(done):
    raw = ad.read_zarr(done / "resources/demo/sample01.zarr")
    atlas = ad.read_zarr(done / "results/models/nb/atlas.zarr")
    mine = atlas[atlas.obs["sample"] == "sample01"]
    source = raw[[name.removeprefix("sample01_") for name in mine.obs_names], mine.var_names]
    assert (mine.X != source.X).nnz == 0


def test_a_second_run_does_nothing(done):
    assert planned(done) == {}


def test_a_comment_or_docstring_in_a_module_reruns_nothing(clone):
    for path in (clone / "workflow/cohortvi").rglob("*.py"):
        path.write_text(path.read_text() + "\n# a comment\n")
    assert planned(clone) == {}


def test_changed_code_reruns_the_rules_that_reach_it(clone):
    path = clone / "workflow/cohortvi/atlas/layout.py"
    path.write_text(path.read_text().replace("10 * start", "5 * start"))
    assert planned(clone) == {"layout": 1, "cells": 1, **CHANGES, "metrics": 1, "atlas": 1, "ledger": 1, "report": 1}


def change(clone, edit):
    """Change the values of tiny.yaml."""
    values = yaml.safe_load((clone / "tiny.yaml").read_text())
    edit(values)
    (clone / "tiny.yaml").write_text(yaml.safe_dump(values))


def add_sample(clone, run_name):
    """Add a sample to the sheet, which is no simulated one."""
    change(clone, lambda values: values["atlas"].update(metrics={"truth": None}))
    shutil.copytree(clone / "resources/demo/sample01.zarr", clone / "new.zarr")
    sheet = clone / "config/samples.tsv"
    sheet.write_text(sheet.read_text() + f"sample05\tnew.zarr\tdonor9\t{run_name}\n")


def test_an_added_sample_runs_its_own_passes_and_the_gather_steps(clone):
    add_sample(clone, "run9")
    own = {"qc": 1, "extract": 1, "gene_moments": 1, "gene_fit": 1, "gene_variance": 1}
    assert planned(clone) == {**own, **GATHER, **ASKED, "shard": 3}
    for rule in own.keys() - {"gene_fit"}:
        assert planned_samples(clone, rule) == {"sample05"}


def test_a_sample_added_to_a_batch_runs_the_batch_s_variances_too(clone):
    add_sample(clone, "run1")
    assert planned(clone) == {
        "qc": 1,
        "extract": 1,
        "gene_moments": 1,
        "gene_fit": 1,
        "gene_variance": 3,
        **GATHER,
        **ASKED,
        "shard": 3,
    }
    assert planned_samples(clone, "gene_variance") == {"sample01", "sample02", "sample05"}


def test_a_changed_atlas_value_does_not_train_again(clone):
    change(clone, lambda values: values["atlas"]["clusters"].update(resolutions=[0.5, 0.7]))
    assert planned(clone) == {
        "cluster": 1,
        "cells": 1,
        **CHANGES,
        "markers": 1,
        "metrics": 1,
        "atlas": 1,
        "ledger": 1,
        "report": 1,
    }


def test_a_sample_s_own_threshold_reruns_its_own_qc(clone):
    change(clone, lambda values: values["qc"].update(overrides={"sample02": {"pct_counts_mt": {"below": 30}}}))
    assert planned_samples(clone, "qc") == {"sample02"}
    assert planned_samples(clone, "gene_moments") == {"sample02"}


def test_reordering_the_sheet_reruns_nothing_and_a_new_column_the_tables_alone(clone):
    sheet = clone / "config/samples.tsv"
    header, *rows = sheet.read_text().splitlines()
    sheet.write_text("\n".join([header, *reversed(rows)]) + "\n")
    assert planned(clone) == {}
    sheet.write_text("\n".join([f"{header}\tage", *(f"{row}\t40" for row in rows)]) + "\n")
    assert planned(clone) == {"cells": 1, **CHANGES, "metrics": 1, "atlas": 1, "ledger": 1, "report": 1}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda values: values["genes"].update(flavour="x"), "genes.flavour: unknown key; did you mean 'flavor'?"),
        (lambda values: values["report"].update(color_by=["doner"]), "'doner' is unknown; did you mean 'donor'?"),
        (lambda values: values.update(cohort={"sheet": "none.tsv"}), "none.tsv: no such sample sheet"),
        (lambda values: values["qc"].update(overrides={"sampel01": {}}), "did you mean 'sample01'?"),
        (lambda values: values["atlas"].update(metrics={"truth": "nowhere"}), "atlas.metrics.truth: no such folder"),
        (
            lambda values: values["differential"]["comparisons"]["donor"].update(within="leiden_0.6"),
            "differential.comparisons.donor.within: 'leiden_0.6' is unknown; did you mean 'leiden_0.5'?",
        ),
        (
            lambda values: values["expression"].update(batches=["run9"], groups=["doner"]),
            "expression.batches: 'run9' is unknown; did you mean 'run",
        ),
    ],
)
def test_a_wrong_config_is_refused_before_any_job(clone, edit, expected):
    change(clone, edit)
    refused = run(clone, "--dry-run", check=False)
    assert refused.returncode != 0
    assert expected in refused.stdout


def test_a_wrong_file_is_refused_before_any_job_and_leaves_nothing(tmp_path):
    clone = tiny_clone(tmp_path / "clone")
    (clone / "broken.h5ad").write_bytes(b"no hdf5")
    sheet = clone / "config/samples.tsv"
    sheet.write_text(sheet.read_text() + "sample05\tbroken.h5ad\td\tr\nsample06\tnowhere.h5ad\td\tr\n")
    refused = run(clone, check=False)
    assert refused.returncode != 0
    assert "sample05" in refused.stdout
    assert "sample06" in refused.stdout
    assert not (clone / "results").exists()


def test_lint_and_a_report_by_snakemake(done):
    assert "Congratulations" in run(done, "--lint").stdout
    run(done, "--report", "snakemake-report.html")
    assert (done / "snakemake-report.html").stat().st_size > 100_000


def test_samples_of_a_new_generation_leave_the_shards_that_are_there_alone(tmp_path):
    clone = tiny_clone(tmp_path / "clone", n_samples=3)
    names = [f"Gene{i:04d}" for i in range(1, 151)]
    (clone / "frozen.txt").write_text("\n".join(names))
    tiny = yaml.safe_load((clone / "tiny.yaml").read_text())
    tiny["genes"] |= {"frozen": "frozen.txt"}
    tiny["store"] |= {"reshuffle": 0.5}
    (clone / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    raw = clone / "resources/demo/sample01.zarr"
    run(clone, str(raw.relative_to(clone)))
    (clone / "frozen.txt").write_text("\n".join(ad.read_zarr(raw).var_names[:150]))
    run(clone)
    shards = clone / "results/store/shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    write_sheet(clone, 4)
    sheet = pd.read_csv(clone / "config/samples.tsv", sep="\t").assign(generation=[0, 0, 0, 1])
    sheet.to_csv(clone / "config/samples.tsv", sep="\t", index=False)
    assert planned(clone)["shard"] == 2  # one to train and one to validate
    run(clone)
    after = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert before.items() <= after.items()
    assert {name.removesuffix(".json") for name in after.keys() - before.keys() if name.endswith(".json")} == {
        "train-0002",
        "validation-0001",
    }
    ledger = pd.read_csv(clone / "results/cohort/ledger.tsv", sep="\t").set_index("sample")
    assert ledger.loc["sample04", "train"] > 0
    assert json.loads((clone / "results/models/nb/model.json").read_text())["n_obs"] == ledger["train"].sum()
    assert planned(clone) == {}


def test_new_samples_are_mapped_onto_a_frozen_model_and_old_cells_stay_in_their_places(clone):
    add_sample(clone, "run9")
    shutil.copytree(clone / "results/models/nb", clone / "references/nb")
    reference = {"path": "references/nb", "surgery": True}
    settings = yaml.safe_load((clone / "config/config.yaml").read_text())["models"]["nb"]
    changes = {"genes": {"frozen": "references/nb/model.json", "span": 0.5, "n_top": 150}}
    nb = {"max_epochs": 4, "min_steps": 0, "n_hidden": 32}
    mapped = settings | nb | {"reference": reference, "kl_warmup": 0}
    change(clone, lambda values: values.update(changes | {"models": {"nb": nb, "mapped": mapped | {"n_latent": 7}}}))
    refused = run(clone, "--dry-run", check=False)
    assert refused.returncode != 0
    assert "models.mapped.n_latent is 7; expected 10, as the reference has it" in refused.stdout
    change(clone, lambda values: values["models"].update(mapped=mapped))
    target = "results/models/mapped/latent.json"
    run(clone, target)
    facts = json.loads((clone / "results/models/mapped/model.json").read_text())
    assert facts["batches"] == ["run1", "run2", "run9"]
    assert facts["reference"]["new"] == {"batch": ["run9"]}
    assert facts["best_validation_elbo"] >= facts["reference"]["elbo_before"]
    old, new = (ad.read_zarr(clone / folder / "latent.zarr") for folder in ("references/nb", "results/models/mapped"))
    assert list(new.obs_names[: old.n_obs]) == list(old.obs_names)
    assert new.n_obs > old.n_obs
    for name in ("X_latent", "X_latent_std"):
        assert (new.obsm[name][: old.n_obs] == old.obsm[name]).all()
    assert planned(clone, target) == {}
    path = clone / "references/nb/model.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert planned(clone, target) == {"train": 1, "embed": 1}
