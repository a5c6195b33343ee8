"""The training loop as a plug-in for benchmarks: `make_trainer` gives steps and fits of the workflow's own loop.

Cells of an AnnData in memory become shards, as in the workflow, and are read from there.
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
import yaml
from scvi_weights import SAME, to_scvi_state
from torch import nn

from cohortvi.config import EarlyStopping, Model, Store, Validation
from cohortvi.files import write_json
from cohortvi.inference.prepare import Setup, prepare
from cohortvi.inference.run import Run
from cohortvi.inference.schedule import REFERENCE_BATCH
from cohortvi.inference.train import fit, take_step
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Minibatch
from cohortvi.store.names import SPLITS, shard_names
from cohortvi.store.shards import write_shard
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
SPLIT = Store(1, Validation(0.01, "cell"), 0)


class Trainer:
    """Our model on some cells, and what is measured of it."""

    def __init__(self, adata: ad.AnnData, batch_key: str, model: Model, threads: int, seed: int):
        self.adata, self.batch_key, self.model, self.threads, self.seed = adata, batch_key, model, threads, seed
        self.folder = tempfile.TemporaryDirectory()
        self.runs: dict[int, tuple[Setup, Run, Iterator[Minibatch]]] = {}
        self.vae: nn.Module | None = None

    def shards(self, cells: np.ndarray, name: str) -> dict[str, list[Path]]:
        """Write the cells of these numbers as shards; return the manifests by split."""
        folder = Path(self.folder.name) / name
        paths = [folder / f"{shard}.json" for shard in shard_names(SPLIT)]
        if not folder.exists():
            part = self.adata[cells]
            batch = part.obs[self.batch_key].astype(str).to_numpy()
            obs = part.obs[[]].assign(batch=batch, sample="all", row=np.arange(len(cells)))
            counts = folder / "counts.json"
            blocks = [sp.csr_matrix(part.X, dtype=np.uint32)]
            write_json(write_counts(blocks, obs, part.var[[]], counts.with_suffix(".zarr"), sample="all"), counts)
            for path in paths:
                split, shard = path.stem.split("-")
                manifest = write_shard([counts], split, int(shard), path.with_suffix(".zarr"), seed=0, store=SPLIT)
                write_json(manifest, path)
        return {split: [path for path in paths if path.stem.startswith(split)] for split in SPLITS}

    def settings(self, batch_size: int) -> Model:
        """Return the model's settings for a batch size; the rate is that of minibatches of this size."""
        rate = self.model.learning_rate * REFERENCE_BATCH / batch_size
        return replace(self.model, batch_size=batch_size, learning_rate=rate)

    def steps(self, batch_size: int, n: int) -> Iterator[int]:
        """Take n steps of the training loop; yield the cells of each after it."""
        if batch_size not in self.runs:
            paths = self.shards(np.arange(self.adata.n_obs), "all")
            model = self.settings(batch_size)
            common = {"sheet": {}, "seed": self.seed, "threads": self.threads}
            setup, run = prepare(paths["train"], paths["validation"], model, **common)
            self.runs[batch_size] = setup, run, itertools.chain.from_iterable(itertools.repeat(run.loader))
        setup, run, minibatches = self.runs[batch_size]
        for minibatch in itertools.islice(minibatches, n):
            take_step(setup, run, minibatch)
            yield len(minibatch.rows)

    def fit(self, indices: np.ndarray, epochs: int, batch_size: int, warmup_epochs: int) -> None:
        """Train on the cells of these numbers."""
        paths = self.shards(np.asarray(indices), "fit")
        settings = {"max_epochs": epochs, "min_steps": 0, "kl_warmup": warmup_epochs / epochs}
        model = replace(self.settings(batch_size), early_stopping=EarlyStopping(1.0, 0.0), **settings)
        checkpoints = Path(self.folder.name) / "checkpoints"
        common = {"sheet": {}, "seed": self.seed, "checkpoints": checkpoints, "threads": self.threads}
        self.vae, _, _ = fit(paths["train"], paths["validation"], model, **common)

    def export_to_scvi(self, module: nn.Module) -> None:
        """Give an scvi-tools module the weights of the last fit."""
        module.load_state_dict(to_scvi_state(self.vae), strict=False)


def make_trainer(adata: ad.AnnData, batch_key: str, likelihood: str, threads: int, seed: int, lr: float) -> Trainer:
    """Return our model with the settings of config.yaml, but for these."""
    torch.set_num_threads(threads)
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"]
    changes = {"likelihood": likelihood, "learning_rate": lr, "device": "cpu"}
    model = build(Model, settings | changes | SAME)
    return Trainer(adata, batch_key, model, threads, seed)
