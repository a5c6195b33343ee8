"""store.datamodules: Lightning and scvi-tools see each cell once an epoch, on any ranks and after any resumption."""

import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import anndata as ad
import numpy as np
import pytest
import tiny_cohort
import torch
from test_imports import MODULES, imported_names

from cohortvi.store import scvi_registry
from cohortvi.store.sharded import ShardedCounts

pl = pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install lightning")
from cohortvi.store.datamodules import CountsDataModule, ScviDataModule  # noqa: E402 (needs Lightning)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*srun:"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
COVARIATES = {"categorical_covariate_keys": ["sex", "sample"], "continuous_covariate_keys": ["age"]}


class Stores(NamedTuple):
    """A cohort of 300 cells, its training and its validation store."""

    folder: Path
    train: ShardedCounts
    validation: ShardedCounts


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Stores:
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    return Stores(folder, *(ShardedCounts(tiny_cohort.manifests(folder, split)) for split in ("train", "validation")))


def read(manifest: Path) -> ad.AnnData:
    return ad.read_zarr(manifest.with_suffix(".zarr"))


def counts_module(stores: Stores, **others) -> CountsDataModule:
    return CountsDataModule(stores.train, stores.validation, batch_size=32, seed=1, **others)


def rows_of(minibatches) -> list[np.ndarray]:
    return [rows.copy() for _, _, rows in minibatches]


def test_every_cell_comes_once_an_epoch_and_each_epoch_in_another_order(stores):
    module = counts_module(stores)
    first, second = (rows_of(module.train_dataloader()) for _ in range(2))
    assert len(first) == len(second) == len(module.train_dataloader())
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(stores.train.n_obs))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))


def test_validation_begins_anew_in_the_order_of_the_store_also_after_a_break(stores):
    minibatches = counts_module(stores).val_dataloader()
    next(iter(minibatches))
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(rows_of(minibatches)), np.arange(stores.validation.n_obs))
    assert len(minibatches) == len(list(minibatches))


def test_two_ranks_get_disjoint_halves(stores):
    modules = [counts_module(stores) for _ in range(2)]
    for rank, module in enumerate(modules):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    for dataloader, n_obs in (("train_dataloader", stores.train.n_obs), ("val_dataloader", stores.validation.n_obs)):
        found = [rows_of(getattr(module, dataloader)()) for module in modules]
        assert len(found[0]) == len(found[1])
        halves = [np.concatenate(rows) for rows in found]
        np.testing.assert_array_equal(np.sort(np.concatenate(halves)), np.arange(n_obs))
        assert abs(len(halves[0]) - len(halves[1])) <= len(found[0])


class Regression(pl.LightningModule):
    """Predicts a cell's total from its counts; notes the cells of each step, and of each validation step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen, self.validated = torch.nn.Linear(tiny_cohort.N_VARS, 1), [], []

    def loss(self, minibatch) -> torch.Tensor:
        return (self.layer(minibatch.x_ng.log1p())[:, 0] - minibatch.x_ng.sum(1).log1p()).square().mean()

    def training_step(self, minibatch, _):
        self.seen.append(minibatch.rows.copy())
        return self.loss(minibatch)

    def validation_step(self, minibatch, _):
        self.validated.append(minibatch.rows.copy())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Crash(pl.Callback):
    """Saves a checkpoint after `step` steps, in the hook of that name, and raises."""

    def __init__(self, hook: str, step: int, path: Path):
        self.step, self.path = step, path
        setattr(self, hook, self.crash)

    def crash(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise ZeroDivisionError


class Keeping(Regression):
    """Keeps what came to the device, while the loader goes on."""

    def training_step(self, minibatch, _):
        self.seen.append((minibatch.rows.copy(), minibatch.x_ng.clone()))
        return self.loss(minibatch)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=NEEDS_GPU)])
def test_what_comes_to_the_device_are_the_counts_of_its_rows(stores, accelerator):
    adatas = [read(path) for path in tiny_cohort.manifests(stores.folder, "train")]
    model, x_ng = Keeping(), np.vstack([adata.X.toarray() for adata in adatas])
    trainer = pl.Trainer(**{**QUIET, "accelerator": accelerator}, devices=1, max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=counts_module(stores))
    assert len(model.seen) == 16
    for rows, found in model.seen:
        np.testing.assert_array_equal(found.cpu(), x_ng[rows])


def fit(stores: Stores, *, crash: Crash | None = None, resume: Path | None = None, **others) -> Regression:
    model, callbacks = Regression(), [crash] if crash else []
    trainer = pl.Trainer(**QUIET, max_epochs=3, enable_checkpointing=False, callbacks=callbacks, **others)
    try:
        trainer.fit(model, datamodule=counts_module(stores), ckpt_path=resume)
    except ZeroDivisionError:
        assert crash
    return model


@pytest.mark.parametrize(
    ("hook", "step", "others"),
    [
        ("on_train_batch_end", 1, {}),
        ("on_train_batch_end", 11, {}),
        ("on_train_batch_end", 8, {}),
        ("on_validation_end", 4, {"val_check_interval": 0.5}),
        ("on_validation_end", 12, {"val_check_interval": 0.5}),
        ("on_validation_end", 8, {}),
        ("on_train_epoch_end", 16, {}),
        ("on_train_batch_end", 7, {"limit_train_batches": 5}),
    ],
)
def test_a_run_resumed_from_its_checkpoint_takes_the_steps_of_one_never_stopped(stores, tmp_path, hook, step, others):
    whole = fit(stores, **others)
    begun = fit(stores, crash=Crash(hook, step, tmp_path / "c.ckpt"), **others)
    resumed = fit(stores, resume=tmp_path / "c.ckpt", **others)
    assert len(begun.seen) == step
    assert len(whole.seen) == 3 * others.get("limit_train_batches", 8)
    for found, expected in zip(begun.seen + resumed.seen, whole.seen, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    np.testing.assert_array_equal(np.unique(np.concatenate(whole.validated)), np.arange(stores.validation.n_obs))


def test_the_state_of_another_seed_is_refused_and_a_new_fit_begins_anew(stores):
    module = counts_module(stores)
    first = rows_of(module.train_dataloader())
    state = module.state_dict()
    other = CountsDataModule(stores.train, batch_size=32, seed=2)
    with pytest.raises(ValueError, match="loader state: seed is 1; expected 2"):
        other.load_state_dict(state)
    module.setup("fit")
    np.testing.assert_array_equal(np.concatenate(rows_of(module.train_dataloader())), np.concatenate(first))


def test_without_a_validation_store_lightning_trains_and_does_not_validate(stores):
    model = Regression()
    trainer = pl.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        trainer.fit(model, datamodule=CountsDataModule(stores.train, batch_size=32, seed=1))
    assert (len(model.seen), model.validated) == (8, [])


DISTRIBUTED = """
import sys
import lightning.pytorch as pl
import numpy as np
from test_datamodules import QUIET, Regression, Stores, counts_module
from cohortvi.store.sharded import ShardedCounts
from pathlib import Path
import tiny_cohort

if __name__ == "__main__":
    folder, checkpoint, out = map(Path, sys.argv[1:])
    splits = [ShardedCounts(tiny_cohort.manifests(folder, split)) for split in ("train", "validation")]
    trainer = pl.Trainer(**QUIET, max_epochs=3, enable_checkpointing=False, devices=2, strategy="ddp")
    model = Regression()
    trainer.fit(model, datamodule=counts_module(Stores(folder, *splits)), ckpt_path=checkpoint)
    np.savez(out / f"{trainer.global_rank}.npz", *model.seen)
"""


@pytest.mark.slow
def test_two_processes_go_on_with_the_steps_of_the_one_whose_checkpoint_they_take(stores, tmp_path):
    whole, checkpoint = fit(stores), tmp_path / "c.ckpt"
    begun = fit(stores, crash=Crash("on_train_batch_end", 11, checkpoint))
    (tmp_path / "run.py").write_text(DISTRIBUTED)
    command = [sys.executable, *map(str, (tmp_path / "run.py", stores.folder, checkpoint, tmp_path))]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [list(np.load(tmp_path / f"{rank}.npz").values()) for rank in (0, 1)]
    for first, second, expected in zip(*ranks, whole.seen[len(begun.seen) :], strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), expected)
        assert abs(len(first) - len(second)) <= 1


@pytest.fixture(scope="module")
def scvi():
    return pytest.importorskip("scvi", reason="needs scvi-tools: pip install scvi-tools")


def scvi_module(stores: Stores, **others) -> ScviDataModule:
    return ScviDataModule(stores.train, stores.validation, batch_key="batch", batch_size=32, seed=1, **others)


def adata_of(scvi, stores: Stores, splits: list[str], covariates: dict[str, list[str]]) -> ad.AnnData:
    """The cells of these splits, read by anndata, set up."""
    adata = ad.concat([read(path) for split in splits for path in tiny_cohort.manifests(stores.folder, split)])
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch", **covariates)
    return adata


def train(scvi, *data, epochs: int, seed: int = 0, **others):
    """Return a model of an AnnData, or of None and a registry, trained from the same weights on."""
    scvi.settings.seed = seed
    model = scvi.model.SCVI(*data, n_hidden=16, n_latent=3, gene_likelihood="nb", encode_covariates=True)
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "check_val_every_n_epoch": 1}
    model.train(max_epochs=epochs, plan_kwargs={"lr": 2e-3, "n_epochs_kl_warmup": 10}, **settings, **others)
    return model


@pytest.mark.parametrize("covariates", [{}, COVARIATES])
def test_the_registry_is_that_of_an_anndata_of_the_same_cells(scvi, stores, covariates):
    expected = scvi.model.SCVI(adata_of(scvi, stores, ["train"], covariates)).registry
    found = scvi_module(stores, **covariates).registry
    np.testing.assert_equal(found, {name: expected[name] for name in expected if name != "_scvi_uuid"})


@pytest.mark.parametrize("covariates", [{}, COVARIATES])
def test_minibatches_are_those_of_scvi_tools_own_loader_for_the_same_cells(scvi, stores, covariates):
    model = scvi.model.SCVI(adata_of(scvi, stores, ["train"], covariates))
    module = scvi_module(stores, **covariates)
    for minibatch in module.train_dataloader():
        found, rows = module.on_before_batch_transfer(minibatch, 0), minibatch.rows
        (expected,) = model._make_data_loader(model.adata, indices=rows, batch_size=len(rows))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.dtype == expected[name].dtype, name
            np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("covariates", [{}, COVARIATES])
def test_latents_equal_those_of_an_anndata_row_by_row_and_so_after_loading(scvi, stores, tmp_path, covariates):
    module = scvi_module(stores, **covariates)
    model = train(scvi, None, module.registry, epochs=2, datamodule=module)
    model.save(tmp_path / "model")
    alone = scvi.model.SCVI.load(tmp_path / "model", adata=False, accelerator="cpu")
    for split, store in (("train", None), ("validation", stores.validation)):
        adata = adata_of(scvi, stores, [split], covariates)
        expected = scvi.model.SCVI.load(tmp_path / "model", adata, accelerator="cpu").get_latent_representation()
        assert len(np.unique(expected, axis=0)) > 0.9 * len(expected)
        for trained in (model, alone):
            found = trained.get_latent_representation(dataloader=module.inference_dataloader(store))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_from_a_store_reaches_the_elbo_of_training_from_an_anndata(scvi, stores):
    adata = adata_of(scvi, stores, ["train", "validation"], COVARIATES)
    split = np.split(np.arange(adata.n_obs), [stores.train.n_obs, adata.n_obs])
    module = scvi_module(stores, **COVARIATES)
    theirs = train(scvi, adata, epochs=60, batch_size=32, datasplitter_kwargs={"external_indexing": split})
    ours = train(scvi, None, module.registry, epochs=60, datamodule=module)
    for name, tolerance in (("elbo_train", 0.01), ("elbo_validation", 0.02)):
        curves = [model.history[name].to_numpy(float)[:, 0] for model in (theirs, ours)]
        ends = [curve[-10:].mean() for curve in curves]
        assert min(curve[0] - end for curve, end in zip(curves, ends, strict=True)) > 10
        assert ends[1] == pytest.approx(ends[0], rel=tolerance)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_key": "age"}, "'age' is no column of text that all stores have; expected some of batch, kind, sample"),
        ({"categorical_covariate_keys": ["donor"]}, "'donor' is no column of text"),
        ({"continuous_covariate_keys": ["sex"]}, "'sex' is no column of numbers .* expected some of age, row"),
    ],
)
def test_columns_of_the_wrong_kind_are_refused(stores, wrong, message):
    with pytest.raises(ValueError, match=rf"train-0000\.zarr: {message}"):
        ScviDataModule(stores.train, **{"batch_key": "batch", **wrong})


def test_stores_that_do_not_fit_together_are_refused(scvi, stores, tmp_path):
    x, obs = tiny_cohort.simulate(60, seed=0)
    for name, n_vars in (("one_sample", tiny_cohort.N_VARS), ("fewer_genes", 20)):
        tiny_cohort.write_samples(tmp_path / name, {"s0": (x[:, :n_vars], obs)})
    one, fewer = (
        ShardedCounts(tiny_cohort.manifests(tmp_path / name, "train")) for name in ("one_sample", "fewer_genes")
    )
    with pytest.raises(ValueError, match=r"column 'batch' has categories \['run0'\]; expected .* \['run0', 'run1'\]"):
        CountsDataModule(stores.train, one, batch_size=32, seed=1, columns=["batch"])
    with pytest.raises(ValueError, match="its genes are not those of"):
        scvi_module(stores).inference_dataloader(fewer)


def test_a_missing_package_is_named_with_the_command_that_installs_it(stores, monkeypatch):
    def no_version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(scvi_registry, "version", no_version)
    with pytest.raises(ImportError, match="pip install scvi-tools"):
        scvi_module(stores)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "cohortvi.store.datamodules")
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("cohortvi.store.datamodules")


def test_no_other_module_imports_either_package_or_the_data_modules():
    for path in MODULES:
        names = imported_names(path)
        assert "scvi" not in {name.split(".")[0] for name in names}
        assert path.name == "datamodules.py" or not names & {"lightning.pytorch", "cohortvi.store.datamodules"}
