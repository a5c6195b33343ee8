"""Our training beside scvi-tools' SCVI on one GPU: cells a second, held-out ELBO: `make bench-gpu`.

One process, alternating rounds, the same simulated cells (2,000 genes, 6 batches, a tenth of the counts not zero), the
model of config.yaml, but for dropout and encoder, which are theirs. Steps of ours, eager and as a CUDA graph, in each
precision: of minibatches that lie on the GPU as compact CSR (resident), and read from shards on disk (disk), with all
that a user waits for. Steps of scvi-tools at its default minibatch of 128 and at larger ones, its cells in memory.
Roofline: bytes that a step cannot do without at the rate of a large copy on the same GPU; limit_ns is that time of a
cell.

After the steps both train for the same epochs, ours with its batch size and rate, theirs with its defaults but for NB
and a KL warm-up that ends; ELBO of held-out cells by our own evaluator and, our weights copied over, by theirs. Without
scvi-tools only ours is measured, and the first line says so.
"""

import argparse
import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import torch
import yaml
from scvi_weights import SAME, elbo_by_scvi, to_scvi_state
from simulated import Preset, simulate
from training import ROOT, Trainer

from cohortvi.config import EarlyStopping, Model
from cohortvi.inference import gpu, ranks
from cohortvi.inference.device import counts_of
from cohortvi.inference.graph import graphed_step
from cohortvi.inference.prepare import TRAINING, prepare, seed_torch
from cohortvi.inference.step import Inputs, inputs_of, take
from cohortvi.inference.train import fit, take_step
from cohortvi.store.opening import open_counts
from cohortvi.typed import build

SKIP, SECONDS = 6, 0.4  # steps of a round that are not counted; length of a round
N_GENES = 2_000
TRIED = ((256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8))  # BLOCK, WARPS
Shards = dict[str, list[Path]]


def timed(call: Callable[[], Any], n: int) -> float:
    """Return seconds that the GPU takes for n calls."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def rate(call: Callable[[], Any], cells: int) -> float:
    """Return cells a second of calls of so many cells, over SECONDS."""
    timed(call, SKIP)
    n = max(4, int(SECONDS / (timed(call, 4) / 4)))
    return n * cells / timed(call, n)


def copy_bytes_per_second() -> float:
    """Return the bytes, read and written, that a large copy moves a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * len(source) * 20 / min(timed(lambda: target.copy_(source), 20) for _ in range(3))


def step_bytes(likelihood: str, precision: str, count_bytes: int) -> int:
    """Return the bytes of a cell: logits are written, turned into their gradient, and read by three products or sums.

    log1p of the counts is written once and read by two products; the counts are written and read.
    """
    of_float, heads = (2 if precision == "bf16" else 4), (2 if likelihood == "zinb" else 1)
    return N_GENES * (6 * of_float * heads + 3 * of_float + 2 * count_bytes)


class Ours:
    """Steps of our model at one batch size."""

    def __init__(self, shards: Shards, model: Model, threads: int):
        # A small rate that does not fall: what is measured is time, over as many steps as it takes.
        endless = {"max_epochs": 10**6, "learning_rate_decay": 0.0, "learning_rate": 1e-3 * 128 / model.batch_size}
        model = replace(model, **endless)
        common = {"sheet": {}, "seed": 0, "threads": threads}
        self.setup, self.run = prepare(shards["train"], shards["validation"], model, **common)
        self.minibatches = itertools.chain.from_iterable(itertools.repeat(self.run.loader))
        self.whole: list[Inputs] = []
        for minibatch in itertools.islice(self.minibatches, 12):
            inputs = inputs_of(self.setup, minibatch, 1.0, 1e-4)
            if len(minibatch.rows) == model.batch_size:
                self.whole.append(inputs)
        self.run.graphed = graphed_step(self.setup, self.run) if model.graph else None
        self.next = itertools.cycle(self.whole)

    def resident(self) -> None:
        """Take a step of a minibatch that is on the GPU."""
        seed_torch(self.setup.seed, TRAINING, self.run.step)
        n = self.setup.model.batch_size
        step = self.run.graphed or partial(take, self.setup, self.run, ranks.Part(0, n, n))
        step(next(self.next))

    def disk(self) -> None:
        """Take the training loop's step of the next minibatch on disk."""
        take_step(self.setup, self.run, next(self.minibatches))


class Scvi:
    """Steps of scvi-tools' SCVI."""

    def __init__(self, adata: ad.AnnData, likelihood: str):
        import scvi

        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        self.model, self.n_obs = scvi.model.SCVI(adata, gene_likelihood=likelihood), adata.n_obs

    def rate(self, batch_size: int, n: int) -> float:
        """Return cells a second of n steps, the first ones left out."""
        from lightning.pytorch import Callback

        marks: dict[int, float] = {}

        class Clock(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step in (SKIP, n):
                    torch.cuda.synchronize()
                    marks[trainer.global_step] = time.perf_counter()

        epochs = -(-n // (self.n_obs // batch_size))
        options = {"batch_size": batch_size, "train_size": 1.0, "callbacks": [Clock()], "max_steps": n}
        self.model.train(max_epochs=epochs + 1, accelerator="gpu", devices=1, enable_progress_bar=False, **options)
        return (n - SKIP) * batch_size / (marks[n] - marks[SKIP])


def step_rows(
    adata: ad.AnnData, shards: Shards, models: list[Model], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and minibatch: medians over the rounds, and the fraction of the roofline."""
    bytes_per_second = copy_bytes_per_second()
    yield {"gpu": torch.cuda.get_device_name(), "copy_terabytes_per_second": bytes_per_second / 1e12}
    for batch_size in arguments.batch_sizes:
        for likelihood in arguments.likelihoods:
            chosen = [model for model in models if model.likelihood == likelihood]
            ours = [Ours(shards, replace(model, batch_size=batch_size), arguments.threads) for model in chosen]
            scvi = Scvi(adata, likelihood) if arguments.scvi else None
            found: dict[tuple, list[float]] = {}
            for _ in range(arguments.rounds):
                for model, own in zip(chosen, ours, strict=True):
                    for kind in ("resident", "disk"):
                        found.setdefault((model.precision, model.graph, kind), []).append(
                            rate(getattr(own, kind), batch_size)
                        )
                if scvi:
                    found.setdefault(("scvi-tools",), []).append(scvi.rate(batch_size, arguments.scvi_steps))
            count_bytes = ours[0].setup.train.count_type.itemsize
            for who, rates in found.items():
                row = {
                    "likelihood": likelihood,
                    "batch_size": batch_size,
                    "who": who,
                    "cells_per_second": median(rates),
                }
                if len(who) > 1:
                    limit = step_bytes(likelihood, who[0], count_bytes) / bytes_per_second
                    row |= {"limit_ns": limit * 1e9, "fraction_of_roofline": median(rates) * limit}
                yield row


def kernel_rows(shards: Shards, model: Model, threads: int) -> Iterator[dict[str, Any]]:
    """Yield microseconds of the parts of a step: the kernels, at several block sizes, and the head's products."""
    own = Ours(shards, model, threads)
    inputs, n = own.whole[0], model.batch_size
    row = {"likelihood": model.likelihood, "precision": model.precision, "batch_size": n}
    heads, log_theta = (2 if model.likelihood == "zinb" else 1), torch.zeros(1, N_GENES, device="cuda")
    cells, rows_n = (torch.ones(n, device="cuda"), log_theta), torch.zeros(n, dtype=torch.int64, device="cuda")
    before = gpu.BLOCK, gpu.WARPS
    for block, warps in TRIED:
        gpu.BLOCK, gpu.WARPS = block, warps
        x = counts_of(inputs.x, model.precision)
        logits = [torch.randn(n, N_GENES, device="cuda").to(x.log1p_ng.dtype) for _ in range(heads)]
        weights_n = torch.full((n,), 1e-3, device="cuda")
        head = partial(gpu.head, x, rows_n, logits, *cells, weights_n, is_trained=True)
        calls = {"densify": partial(counts_of, inputs.x, model.precision), "head": head}
        for name, call in calls.items():
            timed(call, 3)
            yield row | {"part": name, "block": block, "warps": warps, "microseconds": timed(call, 30) / 30 * 1e6}
    gpu.BLOCK, gpu.WARPS = before
    h_nh, weight_gh = (torch.randn(size, 128, device="cuda", dtype=x.log1p_ng.dtype) for size in (n, N_GENES))
    products = {"logits": lambda: h_nh @ weight_gh.T, "dh": lambda: logits[0] @ weight_gh}
    products |= {"dweight": lambda: logits[0].T @ h_nh, "dbias": lambda: logits[0].sum(0, dtype=torch.float32)}
    for name, call in products.items():
        timed(call, 3)
        yield row | {"part": name, "microseconds": timed(call, 30) / 30 * 1e6}


def elbo_rows(
    adata: ad.AnnData, trainer: Trainer, models: list[Model], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the held-out ELBO after the same epochs, nats per cell, and seconds of the training."""
    shards = trainer.shards(np.arange(adata.n_obs), "all")
    # Shards and cells in memory have the same order of raw rows: counts.json is written from `adata` as it is.
    held_out = np.sort(np.concatenate([open_counts(path).obs["row"].to_numpy() for path in shards["validation"]]))
    judged = Scvi(adata, "nb").model if arguments.scvi else None
    epochs = arguments.epochs
    for model in models:
        settings = {"max_epochs": epochs, "min_steps": 0, "early_stopping": EarlyStopping(1.0, 0.0), "kl_warmup": 0.5}
        checkpoints = Path(trainer.folder.name) / f"elbo-{model.precision}-{model.graph}-{model.batch_size}"
        began = time.perf_counter()
        vae, history, _ = fit(
            shards["train"],
            shards["validation"],
            replace(model, **settings),
            sheet={},
            seed=0,
            checkpoints=checkpoints,
            threads=arguments.threads,
        )
        row = {"who": f"{model.precision}, graph {model.graph}", "batch_size": model.batch_size, "epochs": epochs}
        row |= {"seconds": time.perf_counter() - began, "elbo": history["validation_elbo"].iloc[-1]}
        if judged is not None:
            judged.module.load_state_dict(to_scvi_state(vae), strict=False)
            row["elbo_by_scvi_tools"] = elbo_by_scvi(judged, held_out)
        yield row
    if arguments.scvi:
        scvi = Scvi(adata, "nb").model
        split = [np.setdiff1d(np.arange(adata.n_obs), held_out), held_out, np.array([], int)]
        began = time.perf_counter()
        scvi.train(
            max_epochs=epochs,
            accelerator="gpu",
            devices=1,
            enable_progress_bar=False,
            plan_kwargs={"n_epochs_kl_warmup": epochs // 2},
            datasplitter_kwargs={"external_indexing": split},
        )
        row = {"who": "scvi-tools", "batch_size": 128, "epochs": epochs, "seconds": time.perf_counter() - began}
        yield row | {"elbo_by_scvi_tools": elbo_by_scvi(scvi, held_out)}


def main() -> None:
    """Measure and print a line of JSON a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--likelihoods", nargs="+", default=["nb", "zinb"])
    parser.add_argument("--precisions", nargs="+", default=["tf32", "bf16"])
    parser.add_argument("--parts", nargs="+", default=["kernels", "steps", "elbo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scvi-steps", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=8, help="that read shards")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi", "cohortvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: this process sees no GPU; run it where there is one")
    arguments.scvi = find_spec("scvi") is not None
    print(json.dumps({"scvi-tools": "measured" if arguments.scvi else "not installed: only ours is measured"}))
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"] | {"device": "cuda"} | SAME
    model = build(Model, values)
    adata = simulate(Preset(arguments.cells, N_GENES, 0.1, 6, 3))
    trainer = Trainer(adata, "batch", model, arguments.threads, 0)
    shards = trainer.shards(np.arange(adata.n_obs), "all")
    models = [
        replace(model, likelihood=likelihood, precision=precision, graph=graph)
        for likelihood, precision in itertools.product(arguments.likelihoods, arguments.precisions)
        for graph in (True, False)
    ]
    graphs = [model for model in models if model.graph]
    rows: list[Iterator[dict[str, Any]]] = []
    if "kernels" in arguments.parts:
        rows += [kernel_rows(shards, replace(model, batch_size=8192), arguments.threads) for model in graphs]
    if "steps" in arguments.parts:
        rows.append(step_rows(adata, shards, models, arguments))
    if "elbo" in arguments.parts:
        chosen = [
            replace(model, batch_size=size) for model in graphs if model.likelihood == "nb" for size in (256, 1024)
        ]
        rows.append(elbo_rows(adata, trainer, chosen, arguments))
    for row in itertools.chain.from_iterable(rows):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
