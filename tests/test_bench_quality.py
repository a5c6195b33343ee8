"""benchmarks/quality.py: methods are judged alike, on cells that no model saw, and what is missing is shown."""

import importlib
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cohortvi.inference.vae import VAE
from cohortvi.store.opening import open_counts

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


methods, quality, weights = load("quality_methods"), load("quality"), load("scvi_weights")


@pytest.fixture
def cells() -> ad.AnnData:
    r = np.random.default_rng(0)
    obs = pd.DataFrame({"sample": pd.Categorical(r.choice(["a", "b", "c"], 400))}, pd.RangeIndex(400).astype(str))
    obs["cell_type"] = pd.Series(r.choice(["B", "NK", None], 400), obs.index)
    return ad.AnnData(sp.csr_matrix(r.poisson(1.0, (400, 30)).astype(np.float32)), obs=obs)


def task(cells: ad.AnnData, folder: Path, seed: int) -> "methods.Task":
    return methods.Task(cells, seed, folder, folder / "kept", None)


def test_no_model_sees_a_held_out_cell_and_all_methods_hold_out_the_same(cells, tmp_path):
    first, again, other = (task(cells, tmp_path / name, seed) for name, seed in [("x", 0), ("y", 0), ("z", 1)])
    np.testing.assert_array_equal(first.is_held_out, again.is_held_out)
    assert (first.is_held_out != other.is_held_out).any()
    assert abs(first.is_held_out.mean() - methods.HELD_OUT) < 0.06
    assert first.is_held_out[first.judged].all()
    in_shards = [name for paths in first.shards for path in paths for name in open_counts(path).obs.index]
    assert sorted(in_shards) == sorted(cells.obs_names[~first.is_held_out])
    np.testing.assert_array_equal(np.sort(np.concatenate(first.split)), np.arange(cells.n_obs))
    assert (first.told[first.is_held_out] == methods.UNKNOWN).all()
    np.testing.assert_array_equal(first.split[2], np.flatnonzero(first.is_held_out))


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_log_p_of_the_same_weights_is_the_same_as_ours_and_as_scvi_tools(likelihood, cells, monkeypatch):
    module = pytest.importorskip("scvi.module", reason="needs scvi-tools: pip install scvi-tools")
    monkeypatch.setattr(methods, "DRAWS", 20)
    torch.manual_seed(0)
    sizes = {"n_latent": 3, "n_hidden": 8, "n_layers": 1}
    common = {"dropout": 0.1, "likelihood": likelihood, "dispersion": "gene", "encode_covariates": False}
    vae = VAE(30, 3, **sizes, **common).eval()
    theirs = module.VAE(30, n_batch=3, gene_likelihood=likelihood, **sizes).eval()
    theirs.load_state_dict(weights.to_scvi_state(vae), strict=False)
    # Genes and batches of a model are not in the order of the cells'.
    genes, batches = list(cells.var_names[::-1]), ["c", "a", "b"]
    batch_n1 = torch.from_numpy(pd.Index(batches).get_indexer(cells.obs["sample"].astype(str)))[:, None]
    tensors = {"X": torch.from_numpy(cells[:, genes].X.toarray()), "batch": batch_n1}
    found = []
    for joint in (
        methods.our_joint(vae, {"genes": genes, "batches": batches}, cells),
        methods.their_joint(theirs, tensors),
    ):
        torch.manual_seed(1)
        found.append(methods.log_likelihood(*joint, cells.n_obs, 3))
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_the_estimated_prior_of_scanvi_integrates_to_one():
    module = pytest.importorskip("scvi.module", reason="needs scvi-tools: pip install scvi-tools")
    torch.manual_seed(0)
    theirs = module.SCANVAE(10, n_batch=2, n_labels=3, n_latent=2, n_hidden=8).eval()
    wide = torch.distributions.Normal(0.0, 3.0)
    z_nk = wide.sample((200_000, 2))
    ratio_n = (methods.scanvi_log_prior(theirs, z_nk) - wide.log_prob(z_nk).sum(1)).exp()
    error = float(ratio_n.std()) / len(ratio_n) ** 0.5
    assert error < 0.02
    assert abs(float(ratio_n.mean()) - 1) < 4 * error


def test_the_table_has_means_spreads_and_differences_of_the_same_seed_and_shows_what_is_missing(tmp_path):
    measured = [
        ("PCA", 0, 0.5, None),
        ("scVI", 0, 0.6, -440.0),
        ("scVI", 1, 0.8, -450.0),
        ("cohortvi NB", 0, 0.7, -438.0),
    ]
    for method, seed, total, log_p in measured:
        shown = dict.fromkeys(("Bio conservation", "Batch correction", "Leiden ARI", "Leiden NMI"), 0.25)
        result = {"cohort": "kang", "method": method, "seed": seed, "seconds": 10.0, "Total": total, **shown}
        result |= {} if log_p is None else {"log p(x)": log_p}
        quality.keep({**result, "Total": 0.0}, tmp_path / "kept.csv")
        quality.keep(result, tmp_path / "kept.csv")  # in place of the older one
    names = ["PCA", "cohortvi NB", "scVI", "scANVI"]
    rows = quality.collect(["kang"], names, [0, 1], tmp_path / "kept.csv")
    assert len(rows) == len(measured)
    found = quality.table(rows, names)
    assert found["seeds"].tolist() == [1, 1, 2, 0]
    assert found.loc["scVI", "Total"] == "0.700 ± 0.141"
    assert found.loc["cohortvi NB", "Total minus scVI"] == "0.100"
    assert found.loc["cohortvi NB", "log p(x) minus scVI"] == "2.0"
    assert found.loc["PCA", "log p(x)"] == "-"
    assert (found.loc["scANVI"].drop("seeds") == "-").all()
