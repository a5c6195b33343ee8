"""Our model beside scvi-tools' SCVI on the CPU: training, and what a trained model is asked: `make bench-training`.

One process, alternating rounds, the same simulated cells (50,000, of 2,000 genes and 6 batches, a tenth of the counts
not zero), the defaults of both. Ours reads from shards on disk, theirs from memory. A step has all that a user waits
for: reading, forward, backward, optimiser, bookkeeping; the first of a round are left out. Ratios: of the steps'
medians, of their 10th percentiles (the least disturbed by neighbours), and of processor time. The limit: the matrix
products that a step cannot do without, at the speed of torch's sgemm in the same process; `products`: how many times as
fast ours are. `over_modules`: ours over ours without FusedElbo.
"""

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import torch
from simulated import Preset, simulate
from torch import Tensor
from training import Trainer, make_trainer

from cohortvi.inference.bounds import importance, log_weights
from cohortvi.inference.fused_elbo import FusedElbo
from cohortvi.inference.products import product
from cohortvi.inference.subset import Cells, draw_cells, read_cells

SKIP = 4  # steps of a round that are not counted
STEPS = 24  # that are
CELLS = Preset(50_000, 2_000, 0.1, 6, 3)
DRAWS = 10  # of the marginal likelihood
ASKED = {"latent": 20_000, "elbo": 6_000, "marginal": 1_000}  # cells


class Scvi:
    """scvi-tools' SCVI on some cells."""

    def __init__(self, adata: ad.AnnData, likelihood: str):
        import scvi

        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        self.model, self.adata = scvi.model.SCVI(adata, gene_likelihood=likelihood), adata
        self.model.is_trained_ = True

    def steps(self, batch_size: int, n: int) -> list[tuple[float, float]]:
        """Train n steps; return wall and processor time at the end of each."""
        from lightning.pytorch import Callback

        marks: list[tuple[float, float]] = []

        class Clock(Callback):
            def on_train_batch_end(self, *_: Any, **__: Any) -> None:
                marks.append((time.perf_counter(), time.process_time()))

        options = {"batch_size": batch_size, "limit_train_batches": n, "train_size": 1.0, "callbacks": [Clock()]}
        self.model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, **options)
        return marks

    def ask(self, what: str, n: int) -> Any:
        """Return what is asked of the first n cells, by scvi-tools' own function."""
        cells = np.arange(n)
        if what == "latent":
            return self.model.get_latent_representation(indices=cells, batch_size=1024)
        if what == "elbo":
            return self.model.get_elbo(indices=cells, batch_size=1024)
        return self.model.get_marginal_ll(indices=cells, n_mc_samples=DRAWS, batch_size=1024)


class Ours:
    """The model of this project on the same cells."""

    def __init__(self, adata: ad.AnnData, likelihood: str, threads: int):
        self.trainer: Trainer = make_trainer(adata, "batch", likelihood, threads, 0, 1e-3)

    def steps(self, batch_size: int, n: int) -> list[tuple[float, float]]:
        """As Scvi.steps."""
        return [(time.perf_counter(), time.process_time()) for _ in self.trainer.steps(batch_size, n)]

    def cells(self, n: int) -> Cells:
        """Return n cells of the shards, in memory, as scvi-tools has them."""
        setup, _, _ = self.trainer.runs[1024]
        return read_cells(setup.train, draw_cells(setup.train, n, 0), setup.columns, {})

    def ask(self, what: str, cells: Cells) -> Any:
        """Return what is asked of these cells."""
        _, run, _ = self.trainer.runs[1024]
        vae, n, found = run.vae.eval(), len(cells.obs), []
        with torch.inference_mode():
            for start in range(0, n, 1024):
                part = cells.part(start, min(start + 1024, n))
                qz = vae.encode(part.x, part.covariates)
                noise_snk = torch.randn(1 if what == "elbo" else DRAWS, *qz.loc_nk.shape)
                log_joint = vae.log_joint(part.x, part.covariates)
                found.append(qz.loc_nk if what == "latent" else log_weights(log_joint, qz, noise_snk))
        vae.train()
        return found if what != "marginal" else [importance(weights_sn, DRAWS) for weights_sn in found]


class ByModules:
    """Ours through its modules and torch's record of operations, as models go that are not plain."""

    def __init__(self, ours: Ours):
        self.ours = ours

    def steps(self, batch_size: int, n: int) -> list[tuple[float, float]]:
        """As Scvi.steps, after Ours has taken some."""
        _, run, _ = self.ours.trainer.runs[batch_size]
        run.fused = None
        marks = self.ours.steps(batch_size, n)
        run.fused = FusedElbo(run.vae)
        return marks


def gemm_seconds(threads: int, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> float:
    """Return seconds a cell of one of the head's products, at the best speed of 1,024 cells."""
    torch.set_num_threads(threads)
    h_nh, weight_gh = torch.randn(1024, 128), torch.randn(2000, 128)
    return min(_timed(lambda: multiply(h_nh, weight_gh.T)) for _ in range(50)) / 1024


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def train_rows(adata: ad.AnnData, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each likelihood and batch size: ratios of the steps, and the fraction of the limit."""
    for likelihood in ("nb", "zinb"):
        who = {"scvi-tools": Scvi(adata, likelihood), "cohortvi": Ours(adata, likelihood, threads)}
        who["modules"] = ByModules(who["cohortvi"])
        for batch_size in (128, 512, 1024):
            found: dict[str, list[np.ndarray]] = {name: [] for name in who}
            for _ in range(rounds):
                for name, trainer in who.items():
                    torch.set_num_threads(threads)
                    marks = trainer.steps(batch_size, SKIP + STEPS)
                    found[name].append(np.diff(marks, axis=0)[SKIP:])
            wall, cpu = ({name: np.concatenate(parts)[:, at] for name, parts in found.items()} for at in (0, 1))
            of = {"median": np.median, "p10": lambda values: np.quantile(values, 0.1)}
            ratios = {key: float(f(wall["scvi-tools"]) / f(wall["cohortvi"])) for key, f in of.items()}
            ratios["cpu"] = float(np.median(cpu["scvi-tools"]) / np.median(cpu["cohortvi"]))
            limit = batch_size * gemm_seconds(threads) * (6 if likelihood == "zinb" else 3)
            speed = {name: round(batch_size / float(np.median(values))) for name, values in wall.items()}
            fraction = limit / float(np.quantile(wall["cohortvi"], 0.1))
            over = float(np.quantile(wall["modules"], 0.1) / np.quantile(wall["cohortvi"], 0.1))
            row = {"likelihood": likelihood, "batch_size": batch_size, "threads": threads, "cells_per_second": speed}
            row["over_modules"] = over
            yield row | {"ratio": ratios, "fraction_of_limit": fraction}
        yield from ask_rows(who["scvi-tools"], who["cohortvi"], likelihood, threads, rounds)


def ask_rows(scvi: Scvi, ours: Ours, likelihood: str, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each question: the ratio of the rounds' medians."""
    for what, n in ASKED.items():
        cells, times = ours.cells(n), ([], [])
        for _ in range(rounds):
            torch.set_num_threads(threads)
            times[0].append(_timed(lambda: scvi.ask(what, n)))  # noqa: B023 - called at once
            torch.set_num_threads(threads)
            times[1].append(_timed(lambda: ours.ask(what, cells)))  # noqa: B023
        theirs, own = median(times[0]), median(times[1])
        speed = {"scvi-tools": round(n / theirs), "cohortvi": round(n / own)}
        row = {"likelihood": likelihood, "asked": what, "threads": threads, "cells_per_second": speed}
        yield row | {"ratio": {"median": theirs / own, "best": min(times[0]) / min(times[1])}}


def main() -> None:
    """Measure and print a line of JSON a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi", "cohortvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    adata = simulate(CELLS)
    for threads in arguments.threads:
        print(json.dumps({"threads": threads, "products": gemm_seconds(threads) / gemm_seconds(threads, product)}))
        for row in train_rows(adata, threads, arguments.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
