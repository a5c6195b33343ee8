"""Stores as data modules of Lightning and scvi-tools; both packages are optional, and nothing else imports this file.

A data module decides nothing about cells: order, ranks and resumption are the loader's. It asks the trainer for rank
and world, so that a distributed run needs no sampler; every fit begins with the first epoch's order, unless it goes on
from a checkpoint; what is on a device does not depend on memory that the loader writes anew.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cohortvi.store.loader import Loader, Minibatch
from cohortvi.store.scvi_registry import registry
from cohortvi.store.sharded import ShardedCounts

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise ImportError("cohortvi.store.datamodules needs Lightning: pip install lightning") from error


class Epochs:
    """Minibatches of a loader, an epoch an iteration, resumable as Lightning asks of data loaders.

    The first iteration after `load_state_dict` may go on in mid-epoch; any other begins an epoch. The loader alone
    would not: Lightning ends an epoch at its last minibatch or before, and never asks for one more. Nothing happens
    before the first minibatch is asked for, since Lightning calls `iter` more often than it iterates.
    """

    def __init__(self, loader: Loader):
        self.loader, self.n_steps, self.is_resumed = loader, loader.n_steps(0), False

    def __len__(self) -> int:
        """Return the minibatches of a whole epoch: Lightning counts those before a resumption, too."""
        return self.n_steps

    def __iter__(self) -> Iterator[Minibatch]:
        state = self.loader.state_dict()
        if state["step"] == self.n_steps or (state["step"] and not self.is_resumed):
            self.loader.load_state_dict({**state, "epoch": state["epoch"] + 1, "step": 0})
        self.is_resumed = False
        yield from self.loader

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands: after the last minibatch that was yielded."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on there. Errors: ValueError for the state of other cells, seed or batch size."""
        self.loader.load_state_dict(state)
        self.is_resumed = True


class Pass:
    """Minibatches of a loader, from its first one on at every iteration; `form` makes of each what is asked for."""

    def __init__(self, loader: Loader, form: Callable[[Minibatch], Any]):
        self.loader, self.form, self.start = loader, form, loader.state_dict()

    def __len__(self) -> int:
        return self.loader.n_steps(0)

    def __iter__(self) -> Iterator[Any]:
        self.loader.load_state_dict(self.start)
        for minibatch in self.loader:
            yield self.form(minibatch)


class CountsDataModule(LightningDataModule):
    """Minibatches of stores for a LightningModule, whose checkpoints then hold the loader's state.

    Resumption is exact from checkpoints written between two steps, as by callbacks. Of the strategies that start
    processes, `ddp` it is: it runs the script in each, which opens stores of its own; a fork cannot use another's.
    """

    def __init__(
        self,
        train: ShardedCounts,
        validation: ShardedCounts | None = None,
        *,
        batch_size: int,
        seed: int,
        columns: Sequence[str] = (),
        output: str = "dense",
        threads: int = 1,
    ):
        """`batch_size`: cells of all ranks together. The others are those of Loader, which makes the minibatches.

        Errors: ValueError if the stores' genes differ, or the categories of a column.
        """
        super().__init__()
        self.train_store, self.validation_store, self.epochs = train, validation, None
        self.settings = dict(batch_size=batch_size, seed=seed, columns=list(columns), output=output, threads=threads)
        if validation is not None:
            _check_alike(train, validation, columns)

    def setup(self, stage: str) -> None:
        """Begin anew; Lightning calls this before it restores a checkpoint."""
        if stage == "fit":
            self.epochs = Epochs(self._loader(self.train_store, shuffle=True))

    def train_dataloader(self) -> Epochs:
        """Return the training store's minibatches, in an order of its own each epoch."""
        if self.epochs is None:
            self.setup("fit")
        return self.epochs

    def val_dataloader(self) -> Pass | list[Pass]:
        """Return the validation store's minibatches, in its order; an empty list if there is none."""
        if self.validation_store is None:
            return []
        return Pass(self._loader(self.validation_store, shuffle=False), lambda minibatch: minibatch)

    def _loader(self, store: ShardedCounts, *, shuffle: bool) -> Loader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Loader(store, shuffle=shuffle, rank=rank, world=world, **self.settings)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy to a device and wait: Lightning does not, and the loader soon writes into what is being copied."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, the same on every rank; Lightning calls this for its checkpoints."""
        return {} if self.epochs is None else self.epochs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let training go on there. Errors: ValueError for the state of other cells, seed or batch size."""
        self.train_dataloader().load_state_dict(state)


class ScviDataModule(CountsDataModule):
    """Minibatches as SCVI takes them: SCVI(registry=module.registry), then train(datamodule=module).

    Codes are those of the stores' categories; one that no cell has counts as well, as in an AnnData.
    """

    def __init__(
        self,
        train: ShardedCounts,
        validation: ShardedCounts | None = None,
        *,
        batch_key: str,
        categorical_covariate_keys: Sequence[str] = (),
        continuous_covariate_keys: Sequence[str] = (),
        batch_size: int = 128,
        seed: int = 0,
        threads: int = 1,
    ):
        """Keys: columns of text, or of numbers for continuous covariates.

        Errors: ImportError without scvi-tools; ValueError for a column of the other kind, or as by CountsDataModule.
        """
        text, numeric = [batch_key, *categorical_covariate_keys], list(continuous_covariate_keys)
        _check_kinds(train, text, numeric)
        columns = dict.fromkeys(text + numeric)
        super().__init__(train, validation, batch_size=batch_size, seed=seed, columns=columns, threads=threads)
        self.batch_key, self.categorical, self.numeric = batch_key, text[1:], numeric
        self.registry = registry(train, batch_key, self.categorical, numeric)
        # scvi-tools asks for these by name.
        self.n_obs, self.n_vars, self.n_batch = train.n_obs, train.n_vars, len(train.categories[batch_key])
        self.n_labels, self.n_train, self.n_val = 1, train.n_obs, 0 if validation is None else validation.n_obs

    def on_before_batch_transfer(self, batch: Minibatch, dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Return X (n, g); batch and labels (n, 1); covariates (n, number of them), where there are any."""
        tensors = {"X": batch.x_ng, "batch": batch.obs[self.batch_key][:, None]}
        tensors["labels"] = torch.zeros_like(tensors["batch"])
        for kind, keys in (("categorical", self.categorical), ("continuous", self.numeric)):
            if keys:
                tensors[f"extra_{kind}_covs"] = torch.stack([batch.obs[key] for key in keys], dim=1)
        return tensors

    def inference_dataloader(self, store: ShardedCounts | None = None) -> Pass:
        """Return what models take as `dataloader`: all cells of the training store, or of another, in its order."""
        store = self.train_store if store is None else store
        _check_alike(self.train_store, store, self.settings["columns"])
        loader = Loader(store, shuffle=False, copy=True, **self.settings)
        return Pass(loader, lambda minibatch: self.on_before_batch_transfer(minibatch, 0))


def _check_kinds(store: ShardedCounts, texts: Sequence[str], numbers: Sequence[str]) -> None:
    for names, kind, is_text in ((texts, "text", True), (numbers, "numbers", False)):
        fitting = [name for name in store.columns if (name in store.categories) == is_text]
        for name in names:
            if name not in fitting:
                found = f"{name!r} is no column of {kind} that all stores have"
                raise ValueError(f"{store.stores[0].path}: {found}; expected some of {', '.join(fitting)}")


def _check_alike(first: ShardedCounts, second: ShardedCounts, columns: Sequence[str]) -> None:
    path, other = second.stores[0].path, first.stores[0].path
    if list(first.var_names) != list(second.var_names):
        raise ValueError(f"{path}: its genes are not those of {other}; expected the same, in the same order")
    for name in columns:
        found, expected = second.categories.get(name), first.categories.get(name)
        if found != expected:
            raise ValueError(f"{path}: column {name!r} has categories {found}; expected those of {other}, {expected}")
