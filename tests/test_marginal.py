"""log p(x) of every cell beside quadrature and scvi-tools, and what is told of it by sample."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_cohort
import torch
from test_vae import GOLDEN, Golden

from cohortvi.inference.bounds import importance, log_weights
from cohortvi.inference.marginal import marginal_log_likelihood, write_likelihood
from cohortvi.inference.networks import Covariates
from cohortvi.inference.reading import Source

DRAWS = 200


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_log_p_equals_that_of_scvi_tools_at_equal_weights_and_noise(path):
    golden = Golden(path, torch.float32)
    theirs = np.load(path.with_name(path.name.replace("scvi-", "use-")))
    noise, x, told = torch.from_numpy(theirs["noise"]), torch.from_numpy(golden.arrays["x"]), golden.covariates()
    with torch.no_grad():
        vae = golden.vae.eval()
        weights_sn = log_weights(vae.log_joint(x, told), vae.encode(x, told), noise)
    np.testing.assert_allclose(importance(weights_sn, len(noise)).bound_n, theirs["marginal"], rtol=1e-5)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Counts, shards, and a model with one latent dimension."""
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    tiny_cohort.fit_model(folder, {}, n_latent=1, categorical_covariates=(), continuous_covariates=())
    return folder


def source_of(cohort: Path, *samples: str) -> Source:
    counts = [cohort / f"counts/{name}.json" for name in samples or ("s0", "s1")]
    return Source(cohort / "model.safetensors", counts, sheet={}, threads=1)


def found_of(source: Source, seed: int = 0, chunk_cells: int = 64) -> pd.DataFrame:
    return pd.concat(marginal_log_likelihood(source, DRAWS, seed=seed, chunk_cells=chunk_cells))


def test_log_p_is_that_of_quadrature_within_the_error_that_is_told(cohort):
    source = source_of(cohort)
    found = found_of(source)
    assert found.index.tolist() == [f"s{i}_cell{j}" for i in range(2) for j in range(150)]
    assert found["sample"].tolist() == ["s0"] * 150 + ["s1"] * 150
    x = np.concatenate([tiny_cohort.simulate(150, seed=i)[0].toarray() for i in range(2)])
    vae, grid = source.vae.double(), torch.linspace(-9, 9, 1801, dtype=torch.float64)
    log_joint = vae.log_joint(torch.from_numpy(x).double(), Covariates(torch.tensor([0, 1]).repeat_interleave(150)))
    exact = torch.stack([log_joint(z.expand(300, 1)) for z in grid]).logsumexp(0) + math.log(0.01)
    away = (found["log_p"] - exact.numpy()) / found["log_p_error"]
    assert np.abs(away).max() < 6
    assert away.std() == pytest.approx(1, abs=0.25)
    assert found["ess"].between(1, DRAWS).all()


def test_log_p_of_a_cell_depends_on_no_other_cell(cohort):
    whole = found_of(source_of(cohort), chunk_cells=1000)
    for chunk_cells, samples in ((37, ("s0", "s1")), (150, ("s1",))):
        part = found_of(source_of(cohort, *samples), chunk_cells=chunk_cells)
        np.testing.assert_allclose(part["log_p"], whole.loc[part.index, "log_p"], rtol=1e-5)
    assert (found_of(source_of(cohort), seed=1)["log_p"] != whole["log_p"]).mean() > 0.9


def test_the_table_is_written_whole_and_summed_up_by_sample(cohort, tmp_path):
    facts = write_likelihood(marginal_log_likelihood(source_of(cohort), DRAWS, seed=0, chunk_cells=64), tmp_path / "p")
    cells = pd.read_parquet(tmp_path / "p")
    pd.testing.assert_frame_equal(cells, found_of(source_of(cohort)), check_names=False)
    rows = {row.pop("sample"): row for row in facts["samples"]} | {"all": facts["all"]}
    assert list(rows) == ["s0", "s1", "all"]
    for name, row in rows.items():
        here = cells if name == "all" else cells[cells["sample"] == name]
        expected = {"cells": len(here), "mean": here["log_p"].mean(), "se": here["log_p"].sem()}
        expected |= {"error": (here["log_p_error"] ** 2).mean() ** 0.5, "ess": here["ess"].mean()}
        assert row == pytest.approx(expected)


def test_a_sample_without_cells_has_no_row(cohort, tmp_path):
    x, obs = tiny_cohort.simulate(5, seed=3)
    (empty,) = tiny_cohort.write_samples(tmp_path / "more", {"s9": (x[:0], obs[:0])}, shards=False)
    whole = found_of(source_of(cohort))
    for counts in ([empty, cohort / "counts/s0.json"], [cohort / "counts/s0.json", empty]):
        source = Source(cohort / "model.safetensors", counts, sheet={}, threads=1)
        facts = write_likelihood(marginal_log_likelihood(source, DRAWS, seed=0, chunk_cells=64), tmp_path / "p")
        assert [row["sample"] for row in facts["samples"]] == ["s0"]
        found = pd.read_parquet(tmp_path / "p")
        np.testing.assert_allclose(found["log_p"], whole.loc[found.index, "log_p"], rtol=1e-5)


def test_a_sample_of_one_cell_has_no_standard_error(tmp_path):
    columns = {"sample": pd.Categorical(["a"]), "log_p": [-3.0], "log_p_error": [0.1], "ess": [9.0]}
    facts = write_likelihood([pd.DataFrame(columns, index=["a_c0"])], tmp_path / "p")
    assert facts["all"] == {"cells": 1, "mean": -3.0, "se": None, "error": pytest.approx(0.1), "ess": 9.0}


def test_a_run_that_breaks_off_leaves_no_table(tmp_path):
    def tables():
        yield pd.DataFrame({"sample": pd.Categorical(["a"]), "log_p": [-3.0], "log_p_error": [0.1], "ess": [9.0]})
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        write_likelihood(tables(), tmp_path / "p")
    assert not list(tmp_path.iterdir())
