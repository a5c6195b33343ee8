"""Before any job starts: every fault that names and metadata can tell is listed, and a good cohort is opened once."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cohortvi.cohort import preflight
from cohortvi.cohort.sheet import Sample
from cohortvi.config import Labels


def sample(name, path, **changes):
    return replace(Sample(name, str(path), None, None, (), "r", {"donor": "d", "run": "r"}), **changes)


def write(path, genes, n=5):
    x = sp.csr_matrix(np.ones((n, len(genes)), np.float32))
    ad.AnnData(x, obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=genes)).write(path)
    return path


def test_all_faults_of_all_files_are_listed_and_nothing_is_remembered(demo_config, tmp_path):
    good = write(tmp_path / "good.h5ad", ["a", "b"])
    (tmp_path / "broken.h5ad").write_bytes(b"no hdf5")
    samples = [
        sample("s1", good),
        sample("s2", tmp_path / "broken.h5ad"),
        sample("s3", tmp_path / "nowhere.h5ad"),
        sample("s4", good, layer="layers/counts"),
        sample("s5", good, select=(("donor", "x"),)),
        sample("s6", "resources/demo/sample01.zarr"),
    ]
    with pytest.raises(ValueError, match="the samples have faults") as error:
        preflight.check_files(demo_config, samples, {"resources/demo/sample01.zarr"}, tmp_path / "memory.json")
    assert all(f"'{name}'" in str(error.value) for name in ("s2", "s3", "s4", "s5"))
    assert "'s1'" not in str(error.value)
    assert "'s6'" not in str(error.value)
    assert not (tmp_path / "memory.json").exists()


def test_samples_that_share_no_gene_are_refused_unless_the_join_is_outer(demo_config, tmp_path):
    samples = [sample("s1", write(tmp_path / "a.h5ad", ["a"])), sample("s2", write(tmp_path / "b.h5ad", ["b"]))]
    with pytest.raises(ValueError, match=r"the samples share no gene: their lists begin a \.\.\.; b \.\.\."):
        preflight.check_files(demo_config, samples, (), tmp_path / "memory.json")
    outer = replace(demo_config, cohort=replace(demo_config.cohort, join="outer"))
    preflight.check_files(outer, samples, (), tmp_path / "memory.json")


def test_a_file_is_opened_again_only_when_it_has_changed(demo_config, tmp_path, monkeypatch):
    path, opened = write(tmp_path / "a.h5ad", ["a"]), []
    open_raw = preflight.open_raw

    def counted(*arguments, **options):
        opened.append(1)
        return open_raw(*arguments, **options)

    monkeypatch.setattr(preflight, "open_raw", counted)
    for _ in range(2):
        preflight.check_files(demo_config, [sample("s1", path)], (), tmp_path / "memory.json")
    assert len(opened) == 1
    write(path, ["a", "b"])
    preflight.check_files(demo_config, [sample("s1", path)], (), tmp_path / "memory.json")
    assert len(opened) == 2


def test_names_in_the_config_must_exist(demo_config):
    model = replace(demo_config.models["nb"], continuous_covariates=("donor",), categorical_covariates=("sexx",))
    config = replace(
        demo_config,
        models={"nb": model},
        report=replace(demo_config.report, color_by=("doner",)),
        store=replace(demo_config.store, validation=replace(demo_config.store.validation, by="plate")),
        cohort=replace(demo_config.cohort, keep_obs=("total_counts",)),
    )
    with pytest.raises(ValueError, match="does not fit the sample sheet") as error:
        preflight.check_names(config, [sample("s1", "x")])
    text = str(error.value)
    assert "report.color_by: 'doner' is unknown; did you mean 'donor'?" in text
    assert "store.validation.by: 'plate' is unknown" in text
    assert "models.nb.categorical_covariates: 'sexx' is unknown" in text
    assert "column 'donor' of sample 's1' is 'd'; expected a number" in text
    assert "cohort.keep_obs: 'total_counts' is also a column" in text


def test_a_column_of_another_batch_than_the_batch_key_makes_is_refused(demo_config):
    other = replace(sample("s1", "x"), columns=sample("s1", "x").columns | {"batch": "b7"})
    with pytest.raises(ValueError, match=r"column 'batch' of sample 's1' is 'b7', but cohort\.batch_key"):
        preflight.check_names(demo_config, [other])
    same = replace(other, columns=other.columns | {"batch": other.batch})
    preflight.check_names(demo_config, [same])
    told = replace(demo_config.models["nb"], categorical_covariates=("batch",))
    with pytest.raises(ValueError, match=r"models\.nb\.categorical_covariates: every model is told the batch"):
        preflight.check_names(replace(demo_config, models={"nb": told}), [same])


def labelled(config, column: str = "cell_type"):
    model = replace(config.models["nb"], labels=Labels(column, ("NA",), 50.0), prior="mixture")
    return replace(config, models={"nb": model}, cohort=replace(config.cohort, keep_obs=("cell_type", "lane")))


def test_a_file_may_be_without_the_column_of_labels_alone(demo_config, tmp_path):
    config, samples = labelled(demo_config), []
    for name, columns in (("s1", ["cell_type", "lane"]), ("s2", ["lane"])):
        obs = pd.DataFrame({column: ["x"] for column in columns}, ["cell"])
        ad.AnnData(np.ones((1, 1), np.float32), obs, pd.DataFrame(index=["a"])).write_h5ad(tmp_path / f"{name}.h5ad")
        samples.append(sample(name, tmp_path / f"{name}.h5ad"))
    memory = tmp_path / "memory.json"
    preflight.check_files(config, samples, (), memory)
    preflight.check_files(config, samples, (), memory)  # as remembered
    with pytest.raises(ValueError, match="no sample has an obs column 'cell_type', which models"):
        preflight.check_files(config, samples[1:], (), memory)
    with pytest.raises(ValueError, match=r"'s2'.*has no obs column 'cell_type', which cohort.keep_obs names"):
        preflight.check_files(labelled(demo_config, "lane"), samples, (), memory)


def test_the_column_of_labels_must_be_kept(demo_config):
    with pytest.raises(
        ValueError,
        match=r"models\.nb\.labels\.column \(of cohort\.keep_obs\): 'cell_typ' is unknown; did you mean 'cell_type'",
    ):
        preflight.check_names(labelled(demo_config, "cell_typ"), [sample("s1", "x")])


def test_columns_batches_and_genes_of_the_expression_must_exist(demo_config, tmp_path):
    wanted = replace(
        demo_config.expression, genes=("CD3E", "Cd4", "MS4A"), batches=("r2",), groups=("doner", "leiden_1")
    )
    config = replace(demo_config, expression=wanted)
    path = write(tmp_path / "a.h5ad", ["CD3E", "CD3D", "MS4A1"])
    with pytest.raises(ValueError, match="does not fit the sample sheet") as error:
        preflight.check_names(config, [sample("s1", "x")])
    assert "expression.groups: 'doner' is unknown; did you mean 'donor'?" in str(error.value)
    assert "expression.batches: 'r2' is unknown; did you mean 'r'?" in str(error.value)
    assert "leiden_1" not in str(error.value)
    with pytest.raises(ValueError, match="the samples have faults") as error:
        preflight.check_files(config, [sample("s1", path)], (), tmp_path / "memory.json")
    assert "expression.genes: 'Cd4' is none of the cohort's 3; there are CD3D, CD3E, MS4A1" in str(error.value)
    assert "expression.genes: 'MS4A' is none of the cohort's 3; did you mean 'MS4A1'" in str(error.value)
    assert "'CD3E' is none" not in str(error.value)
    # nothing is known yet of the genes of a cohort that the workflow has still to make
    preflight.check_files(config, [sample("s1", "made.zarr")], ("made.zarr",), tmp_path / "memory.json")
