"""Denoised expression beside scvi-tools and quadrature, and as a store of all cells with its means by group."""

import dataclasses
import re
import weakref
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tiny_cohort
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.stats import kstest
from test_vae import GOLDEN, Golden

from cohortvi.atlas import cell_store
from cohortvi.atlas import expression as module
from cohortvi.atlas.expression import expression
from cohortvi.config import Expression
from cohortvi.inference.expression import denoised
from cohortvi.inference.networks import Covariates
from cohortvi.inference.noise import BLOCK, noise_of
from cohortvi.inference.reading import Source
from cohortvi.inference.vae import VAE

SHEET = {"site": {"s0": "north", "s1": "south"}, "dose": {"s0": "0.5", "s1": "2"}}
TOLD = {"categorical_covariates": ("site", "sex"), "continuous_covariates": ("dose", "age")}
GENES = ("gene7", "gene3", "gene29")
SETTINGS = Expression(genes=GENES, batches=(), groups=(), draws=4, library=1e4)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_expression_equals_that_of_scvi_tools_at_equal_weights_and_noise(path):
    golden = Golden(path, torch.float32)
    theirs = np.load(path.with_name(path.name.replace("scvi-", "use-")))
    genes = torch.tensor([17, 3, 29, 0])
    for name, batches in (("own", ()), ("one", (1,)), ("mean", (0, 2))):
        noise, x = torch.from_numpy(theirs["noise"]), torch.from_numpy(golden.arrays["x"])
        found = denoised(golden.vae.eval(), x, golden.covariates(), noise, genes, batches)
        expected = theirs[name][:, :, genes]
        np.testing.assert_allclose(found.mean_ng, expected.mean(0), rtol=2e-5)
        np.testing.assert_allclose(found.std_ng, expected.std(0, ddof=1), rtol=1e-3, atol=1e-7)


def test_mean_and_deviation_are_those_of_the_posterior_by_quadrature():
    torch.manual_seed(0)
    shape = {"n_latent": 1, "n_hidden": 8, "n_layers": 1, "dropout": 0.0, "likelihood": "nb", "dispersion": "gene"}
    vae = VAE(12, 2, **shape, encode_covariates=False, norm="none").eval()
    x, told, draws = torch.poisson(torch.rand(6, 12) * 4), Covariates(torch.tensor([0, 1] * 3)), 1000
    nodes, weights = hermegauss(60)
    with torch.no_grad():
        qz = vae.encode(x, told)
        rho = torch.stack([vae.px_scale(qz.loc_nk + qz.scale_nk * node, told) for node in nodes]).double().numpy()
    weights = (weights / weights.sum())[:, None, None]
    mean = (weights * rho).sum(0)
    sd = np.sqrt((weights * (rho - mean) ** 2).sum(0))
    found = denoised(vae, x, told, torch.randn(draws, 6, 1), torch.arange(12))
    assert (np.abs(found.mean_ng.numpy() - mean) < 5 * sd / draws**0.5).all()
    np.testing.assert_allclose(found.std_ng, sd, rtol=0.15)


def test_noise_is_normal_and_follows_from_seed_sample_and_row_alone():
    rows = np.array([0, 3, BLOCK - 1, BLOCK, 5 * BLOCK + 7, 2])
    noise = noise_of(rows, (200, 3), (0, 1), "a")
    assert (noise.shape, noise.dtype) == ((6, 200, 3), np.float32)
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    for at, row in enumerate(rows):
        np.testing.assert_array_equal(noise_of(np.array([row]), (200, 3), (0, 1), "a")[0], noise[at])
    others = [noise_of(rows, (200, 3), stream, name) for stream, name in (((0, 1), "b"), ((1, 1), "a"), ((0, 2), "a"))]
    for other in (*others, noise_of(rows + 1, (200, 3), (0, 1), "a")):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.1


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Counts, shards and a model of two batches that is told of covariates."""
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    tiny_cohort.fit_model(folder, SHEET, **TOLD)
    return folder


def source_of(cohort: Path, *samples: str) -> Source:
    counts = [cohort / f"counts/{name}.json" for name in samples or ("s0", "s1")]
    return Source(cohort / "model.safetensors", counts, sheet=SHEET, threads=1)


def run(cohort: Path, out: Path, *samples: str, cells=None, chunk_cells: int = 64, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return expression(source_of(cohort, *samples), settings, cells, out, seed=0, chunk_cells=chunk_cells)


def test_the_store_is_an_anndata_with_the_genes_asked_for_and_every_cell_in_order(cohort, tmp_path):
    manifest, groups = run(cohort, tmp_path / "out.zarr")
    found = ad.io.read_zarr(tmp_path / "out.zarr")
    assert found.obs_names.tolist() == [f"s{i}_cell{j}" for i in range(2) for j in range(150)]
    assert found.obs["sample"].tolist() == ["s0"] * 150 + ["s1"] * 150
    assert tuple(found.var_names) == GENES
    assert found.X.dtype == found.layers["std"].dtype == np.float32
    assert found.uns["cohortvi"]["library"] == 1e4
    assert {key: manifest[key] for key in ("n_obs", "n_vars", "samples")} == {
        "n_obs": 300,
        "n_vars": 3,
        "samples": {"s0": 150, "s1": 150},
    }
    assert len(groups) == 0
    again, _ = run(cohort, tmp_path / "again.zarr")
    assert again == manifest


def test_the_expression_of_all_genes_adds_up_to_the_library(cohort, tmp_path):
    run(cohort, tmp_path / "out.zarr", genes=tuple(source_of(cohort).facts["genes"]), library=500.0)
    np.testing.assert_allclose(ad.io.read_zarr(tmp_path / "out.zarr").X.sum(1), 500, rtol=1e-5)


def test_values_are_those_of_each_cells_own_counts_covariates_and_noise(cohort, tmp_path):
    run(cohort, tmp_path / "out.zarr", batches=("run1", "run0"))
    found, source = ad.io.read_zarr(tmp_path / "out.zarr"), source_of(cohort)
    for i in range(2):
        x, obs = tiny_cohort.simulate(150, seed=i)
        codes = torch.from_numpy((obs["sex"] == "m").to_numpy(np.int64)), torch.full((150,), i)
        moments = source.facts["continuous"]
        values = {"age": obs["age"].to_numpy(), "dose": np.full(150, [0.5, 2.0][i])}
        scaled = [(values[name] - moments[name][0]) / moments[name][1] for name in ("age", "dose")]
        told = Covariates(torch.full((150,), i), codes, torch.from_numpy(np.stack(scaled, 1)).float())
        noise_nsk = noise_of(np.arange(150), (4, 3), (0, module.EXPRESSION), f"s{i}")
        with torch.no_grad():
            z_snk, _ = source.vae.encode(torch.from_numpy(x.toarray()).float(), told).draw(
                torch.from_numpy(noise_nsk).transpose(0, 1)
            )
            batches = [told._replace(batch_n=torch.full((150,), batch)) for batch in range(2)]
            rho = torch.stack([sum(source.vae.px_scale(z_nk, one) for one in batches) / 2 for z_nk in z_snk])
        rho = 1e4 * rho.numpy()[:, :, [7, 3, 29]]
        here = found[found.obs["sample"] == f"s{i}"]
        np.testing.assert_allclose(here.X, rho.mean(0), rtol=1e-4)
        np.testing.assert_allclose(here.layers["std"], rho.std(0, ddof=1), rtol=1e-2, atol=1e-3)


def test_another_batch_changes_what_the_model_learnt_of_batches(cohort, tmp_path):
    for name in ("run0", "run1"):
        run(cohort, tmp_path / f"{name}.zarr", batches=(name,))
    run(cohort, tmp_path / "own.zarr")
    zero, one, own = (ad.io.read_zarr(tmp_path / f"{name}.zarr").X for name in ("run0", "run1", "own"))
    np.testing.assert_array_equal(own[:150], zero[:150])
    np.testing.assert_array_equal(own[150:], one[150:])
    assert (zero != one).all()


def test_chunks_shards_and_other_samples_do_not_change_what_is_written(cohort, tmp_path, monkeypatch):
    run(cohort, tmp_path / "whole.zarr", chunk_cells=1000)
    whole = ad.io.read_zarr(tmp_path / "whole.zarr")
    monkeypatch.setattr(cell_store, "SHARD_CHUNKS", 4)
    monkeypatch.setattr(cell_store, "CHUNK_CELLS", 16)
    for size, samples in ((7, ("s0", "s1")), (150, ("s0", "s1")), (64, ("s1",))):
        run(cohort, tmp_path / "part.zarr", *samples, chunk_cells=size)
        part = ad.io.read_zarr(tmp_path / "part.zarr")
        expected = whole[part.obs_names]
        np.testing.assert_allclose(part.X, expected.X, rtol=1e-4)
        np.testing.assert_allclose(part.layers["std"], expected.layers["std"], rtol=1e-3, atol=1e-3)


def test_no_more_than_two_stores_are_in_memory_at_a_time(cohort):
    counts, opened = [cohort / f"counts/s{i}.json" for i in (0, 1, 0, 1, 0)], []
    source = Source(cohort / "model.safetensors", counts, sheet=SHEET, threads=1)
    for reader in source.stores():
        opened.append(weakref.ref(reader))
        assert sum(chunk.stop - chunk.start for chunk in source.chunks(reader, 64)) == len(reader.obs)
        assert sum(one() is not None for one in opened) <= 2
    assert len(opened) == 5


def test_groups_have_the_moments_of_all_draws_of_their_cells(cohort, tmp_path):
    r = np.random.default_rng(0)
    cells = pd.DataFrame({"donor": r.choice(["d0", "d1"], 300), "leiden_1": pd.Categorical(r.integers(3, size=300))})
    cells.loc[:20, "donor"] = None
    cells["leiden_1"] = cells["leiden_1"].cat.add_categories([9])  # of no cell
    cells.index = [f"cell{i}" for i in range(300)]
    cells.to_parquet(tmp_path / "cells.parquet")
    columns = ("donor", "leiden_1")
    _, found = run(cohort, tmp_path / "out.zarr", cells=tmp_path / "cells.parquet", groups=columns, chunk_cells=7)
    store = ad.io.read_zarr(tmp_path / "out.zarr")
    assert list(found.columns) == list(module.COLUMNS)
    assert len(found) == (2 + 3) * len(GENES)
    for (column, group), rows in found.groupby(["column", "group"]):
        here = (cells[column].astype(object).astype(str) == group).to_numpy()
        mean, std = (values[here].astype(float) for values in (store.X, store.layers["std"]))
        assert (rows["cells"] == here.sum()).all()
        assert tuple(rows["gene"]) == GENES
        np.testing.assert_allclose(rows["mean"], mean.mean(0), rtol=1e-5)
        # of n cells' draws, s each: the variance of the cells' means, and the mean of their variances
        np.testing.assert_allclose(rows["sd"], np.sqrt(mean.var(0) + 3 / 4 * (std**2).mean(0)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": ("Gene7", "gene3")}, "expression.genes: 'Gene7' is none of the model's 30; did you mean 'gene7'"),
        ({"genes": ("CD3E",)}, "'CD3E' is none of the model's 30; there are gene0, gene1"),
        ({"batches": ("run2",)}, "expression.batches: 'run2' is none of the model's 2; did you mean 'run"),
    ],
)
def test_what_the_model_does_not_know_is_refused_before_anything_is_written(cohort, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(cohort, tmp_path / "out.zarr", **change)
    assert not list(tmp_path.iterdir())


def test_a_table_of_other_cells_is_refused(cohort, tmp_path):
    pd.DataFrame({"donor": ["d"] * 299}).to_parquet(tmp_path / "cells.parquet")
    with pytest.raises(ValueError, match="found 299 cells; expected the 300 of the counts"):
        run(cohort, tmp_path / "out.zarr", cells=tmp_path / "cells.parquet", groups=("donor",))


def test_cells_are_written_a_shard_at_a_time_and_a_failure_leaves_the_store_that_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_store, "SHARD_CHUNKS", 2)
    monkeypatch.setattr(cell_store, "CHUNK_CELLS", 8)
    out, seen = tmp_path / "out.zarr", []

    def blocks(fail: bool):
        for start in range(0, 40, 5):
            written = list((tmp_path / "out.zarr.partial/X/c").glob("*/0"))
            assert len(written) == start // 16  # files of 16 cells: no more than one is waiting
            seen.append(start)
            if fail and start == 30:
                raise ValueError("broken off")
            names = np.array([f"c{start + i}" for i in range(5)], dtype=object)
            yield cell_store.Block(names, np.zeros(5, int), (np.full((5, 2), start, np.float32),))

    shapes = {"X": (2,)}
    write = {"samples": {"a": 40}, "shapes": shapes, "facts": dict, "genes": ["g", "h"]}
    manifest = cell_store.write_cells(out, blocks=blocks(fail=False), **write)
    assert seen == list(range(0, 40, 5))
    with pytest.raises(ValueError, match="broken off"):
        cell_store.write_cells(out, blocks=blocks(fail=True), **write)
    found = ad.io.read_zarr(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zarr"]
    np.testing.assert_array_equal(found.X[:, 0], np.arange(0, 40, 5).repeat(5))
    assert manifest["samples"] == {"a": 40}
