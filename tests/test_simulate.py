"""The simulator: what the config asks for is what is drawn, and the truth lies apart."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cohortvi.cohort.simulate import (
    draw_cells,
    draw_counts,
    draw_effects,
    sample_columns,
    sample_names,
    shares,
    simulate_sample,
)


@pytest.fixture
def config(demo_config):
    return replace(demo_config.simulate, cells=400, genes=500)


def test_a_store_and_its_truth_have_the_same_cells(config, tmp_path):
    store, truth = tmp_path / "s.zarr", tmp_path / "truth/s.parquet"
    simulate_sample(config, 0, "sample01", store, truth)
    adata, cells = ad.read_zarr(store), pd.read_parquet(truth)
    assert adata.shape == (400, 500)
    assert list(cells.index) == [f"sample01_{name}" for name in adata.obs_names]
    assert list(adata.obs.columns) == []
    assert adata.obs_names.is_unique
    assert np.array_equal(pd.read_parquet(tmp_path / "truth/s.genes.parquet").index, adata.var_names)


def test_the_same_seed_draws_the_same_and_another_does_not(config):
    first, again, other = (
        next(draw_counts(config, seed, "sample02", draw_cells(config, seed, "sample02"))) for seed in (0, 0, 1)
    )
    assert (first != again).nnz == 0
    assert (first != other).nnz > 0


def test_samples_do_not_depend_on_how_many_there_are(config):
    few, many = replace(config, samples=4, failed_samples=0), replace(config, samples=40, failed_samples=0, runs=20)
    assert draw_cells(few, 0, "sample01").equals(draw_cells(replace(many, runs=2), 0, "sample01"))


def test_shares_sum_to_one_and_dying_cells_are_mitochondrial(config):
    effects, cells = draw_effects(config, 0), draw_cells(config, 0, "sample01")
    rho = shares(effects, cells, **sample_columns(config, "sample01"))
    np.testing.assert_allclose(rho.sum(1), np.where(cells["doublet"], 2, 1))
    mt = rho[:, effects.is_mt].sum(1)
    np.testing.assert_allclose(mt[cells["dying"]], cells["mt_share"][cells["dying"]])
    healthy = mt[~cells["dying"] & ~cells["doublet"]]
    assert 0.01 < np.median(healthy) < 0.1


def test_counts_have_the_stated_mean_and_variance(config):
    config = replace(
        config, cells=3000, doublet_rate=0, dying_rate=0, types=2, type_effect=0, donor_effect=0, run_effect=0
    )
    effects, cells = draw_effects(config, 0), draw_cells(config, 0, "sample01").assign(depth=1000.0)
    x = np.vstack([block.toarray() for block in draw_counts(config, 0, "sample01", cells)])
    mean = 1000 * np.exp(effects.base) / np.exp(effects.base).sum()
    top = np.argsort(-mean)[:100]
    np.testing.assert_allclose(x.mean(0)[top], mean[top], rtol=0.15)
    np.testing.assert_allclose(x.var(0)[top], (mean + mean**2 / effects.theta)[top], rtol=0.35)


def test_rates_donors_runs_and_the_failed_sample_are_as_asked(demo_config):
    config = demo_config.simulate
    cells = {name: draw_cells(config, 0, name) for name in sample_names(config)}
    whole = pd.concat(cells.values())
    assert whole["doublet"].mean() == pytest.approx(config.doublet_rate, abs=0.01)
    assert whole["dying"].mean() == pytest.approx(config.dying_rate, abs=0.01)
    assert [name for name, table in cells.items() if table["failed"].all()] == ["sample08"]
    columns = [tuple(sample_columns(config, name).values()) for name in cells]
    assert columns == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
    shares_of_types = whole["cell_type"].value_counts(normalize=True)
    assert len(shares_of_types) == 8
    assert shares_of_types.iloc[0] > 2 * shares_of_types.iloc[-1]
