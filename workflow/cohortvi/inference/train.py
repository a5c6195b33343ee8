"""Training: from shards to a model, in one loop that can be killed anywhere and goes on as if it had not been.

Random numbers are no state: noise and dropout of a step follow from (seed, step), the order of the cells from
(seed, epoch). So a run resumed from any checkpoint takes the same steps, bit for bit on one CPU machine with the same
number of threads. The KL weight counts planned steps and always reaches 1; the weights returned are those of the best
validation ELBO among the epochs that ended with weight 1.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cohortvi.config import Model
from cohortvi.inference import ranks
from cohortvi.inference.checkpoint import Checkpoints, Signals
from cohortvi.inference.covariates import Sheet
from cohortvi.inference.device import choose_device
from cohortvi.inference.events import Events
from cohortvi.inference.graph import can_capture, graphed_step
from cohortvi.inference.prepare import TRAINING, VALIDATION, Setup, prepare, seed_torch
from cohortvi.inference.run import HISTORY, SUMS, Run
from cohortvi.inference.schedule import kl_weight, learning_rate
from cohortvi.inference.step import descend, evaluate, inputs_of, part_of
from cohortvi.inference.surgery import level
from cohortvi.inference.terms import Noted, Terms
from cohortvi.inference.vae import VAE
from cohortvi.log import logger, peak_memory_mb
from cohortvi.progress import Progress
from cohortvi.store.loader import Minibatch

PACKAGES = ("cohortvi", "numpy", "safetensors", "torch")  # whose versions a model carries
TERMINATED = 143  # exit status of a process that ended for SIGTERM


def fit(
    train: Sequence[Path],
    validation: Sequence[Path],
    model: Model,
    *,
    sheet: Sheet,
    seed: int,
    checkpoints: Path,
    threads: int,
    events: Path | None = None,
) -> tuple[VAE, pd.DataFrame, dict[str, Any]]:
    """Train a model on the shards of manifests `train`; return it with its history (a row an epoch) and its facts.

    `sheet`: {column: {sample: value}} of the covariates that the sheet holds; the others are columns of the shards.
    Goes on from the newest checkpoint in the folder `checkpoints`; one that says finished is returned as it is.
    `events`: a folder for TensorBoard's files. SIGUSR1 saves a checkpoint; SIGTERM saves one and ends the process with
    status 143.
    Errors: ValueError for shards that do not fit together, no validation cells, a loss that is not finite, a device
    that is not there, checkpoints of another run or in use by another process.
    """
    torch.set_num_threads(threads)
    with ranks.joined(choose_device(model.device)), Signals() as signals:
        setup, run = prepare(train, validation, model, sheet=sheet, seed=seed, threads=threads)
        with Checkpoints(checkpoints, model.checkpoint_minutes, is_owner=ranks.rank() == 0) as saved:
            resume(setup, run, saved)
            keep = partial(save_if_due, setup, run, saved, signals)
            written, began = Events(events if ranks.rank() == 0 else None, run.history), run.step
            if setup.task.facts is not None and run.elbo_before is None:
                run.judge_reference(validate(setup, run, keep), is_trained=setup.planned > 0)
                logger.info("held-out ELBO of the reference as it is: %.2f nats per cell", run.elbo_before)
                keep()
            with Progress((setup.planned - began) * model.batch_size) as progress:
                while not run.finished:
                    for minibatch in run.minibatches():
                        line = take_step(setup, run, minibatch)
                        progress.report((run.step - began) * model.batch_size, line)
                        keep()
                    close_epoch(setup, run, validate(setup, run, keep))
                    written.add(run.history[-1])
                    keep(epoch_end=True)
        return result(setup, run)


def take_step(setup: Setup, run: Run, minibatch: Minibatch) -> str:
    """Take one optimiser step, note its terms for the epoch's sums; return a line that tells of it.

    Errors: ValueError with step, rows and both terms if they are not finite. On CPUs the weights are then still the old
    ones; of a GPU it is known within `terms.TOGETHER` steps, by the end of the epoch, and before a checkpoint.
    """
    weight = kl_weight(run.step, setup.planned, setup.model.kl_warmup)
    rate = learning_rate(run.step, setup.planned, setup.model)
    part, inputs = part_of(run.loader), inputs_of(setup, minibatch, weight, rate)
    note = partial(run.terms.add, Noted(run.step, minibatch.rows, part.n, weight), sums=run.sums)
    seed_torch(setup.seed, TRAINING, run.step)
    if run.graphed is None and can_capture(setup.model, setup.device):
        run.graphed = graphed_step(setup, run)
    if run.graphed and run.graphed.takes(inputs):
        note(run.graphed(inputs))
    else:
        terms, sums = evaluate(setup, run, inputs, part, is_training=True)
        note(sums)
        descend(setup, run, terms, part, rate)
    run.step += 1
    return f"step {run.step}/{setup.planned}  {run.terms.line()}  kl_weight {weight:.2f}"


@torch.inference_mode()
def validate(setup: Setup, run: Run, keep: Callable[[], None]) -> dict[str, float]:
    """Return the held-out ELBO and its terms, nats per cell: KL weight 1, no dropout, running batch statistics.

    The noise is the same at every epoch, so that epochs are compared on the same draws. Batches and categories that no
    training cell has, held out as a whole, stand at the mean of the others.
    """
    level(run.vae, setup.unseen)
    sums, terms, is_training = dict.fromkeys(SUMS, 0.0), Terms(run.terms.together), run.vae.training
    run.vae.eval()
    for step, minibatch in enumerate(setup.validation):
        terms.add(*held_out_terms(setup, run, minibatch, step), sums)
        keep()
    terms.settle(sums)
    run.vae.train(is_training)  # a mapped model never is: its statistics stand still
    reconstruction, kl = sums["reconstruction"] / sums["cells"], sums["kl"] / sums["cells"]
    return {"elbo": -reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


def held_out_terms(setup: Setup, run: Run, minibatch: Minibatch, step: int) -> tuple[Noted, torch.Tensor]:
    """Return the sums of the terms of a minibatch of validation cells, (3,)."""
    part, inputs = part_of(setup.validation), inputs_of(setup, minibatch, 1.0)
    seed_torch(setup.seed, VALIDATION, step)
    sums = evaluate(setup, run, inputs, part, is_training=False)[1]
    return Noted(run.step, minibatch.rows, part.n, 1.0), sums


def close_epoch(setup: Setup, run: Run, validation: dict[str, float]) -> None:
    """Add the epoch's row to the history, keep its weights if they are the best, and decide whether to go on."""
    weight = kl_weight(run.step - 1, setup.planned, setup.model.kl_warmup)
    cells = run.sums["cells"]
    run.history.append(
        {"epoch": len(run.history) + 1, "step": run.step}
        | {f"train_{name}": run.sums[name] / cells for name in ("loss", "reconstruction", "kl")}
        | {"kl_weight": weight, "learning_rate": learning_rate(run.step - 1, setup.planned, setup.model)}
        | {f"validation_{name}": value for name, value in validation.items()}
        | {"cells_per_second": cells / max(run.sums["seconds"], 1e-9)}
        | {name: run.sums[name] for name in ("seconds", "waiting_seconds")}
        | {"peak_memory_mb": peak_memory_mb()}
    )
    # Below weight 1 the ELBO is not what is optimised: such epochs neither stop the run nor give the weights.
    limits = setup.model.early_stopping
    patience = max(1, round(limits.patience * setup.epochs))
    stop = weight == 1 and run.judge(validation["elbo"], patience, limits.min_delta)
    run.finished = stop or len(run.history) == setup.epochs
    run.sums = dict.fromkeys(SUMS, 0.0)
    logger.info("%s", _epoch_line(run, setup.epochs))


def result(setup: Setup, run: Run) -> tuple[VAE, pd.DataFrame, dict[str, Any]]:
    """Return the finished run's best model (on the CPU, in evaluation mode), its history and its facts."""
    weight = run.history[-1]["kl_weight"]
    if weight != 1:
        raise ValueError(f"training ended with KL weight {weight}; expected 1, without which the ELBO was not trained")
    run.vae.load_state_dict(run.best_weights)
    facts = {
        "settings": asdict(setup.model),
        "vae": run.vae.settings,
        "genes": list(setup.train.var_names),
        **setup.columns.facts(),
        "seed": setup.seed,
        "shards": setup.shards,
        "n_obs": setup.task.n_obs,
        "n_parameters": sum(parameter.numel() for parameter in run.vae.parameters()),
        "n_steps": run.step,
        "n_epochs": run.history[-1]["epoch"],
        "planned_epochs": setup.epochs,
        "kl_weight": weight,
        "best_epoch": run.best_epoch,
        "best_validation_elbo": run.best_elbo,
        "reference": None if setup.task.facts is None else setup.task.facts | {"elbo_before": run.elbo_before},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    numbers = dict.fromkeys((name for name in HISTORY if name not in ("epoch", "step")), float)
    history = pd.DataFrame(run.history, columns=HISTORY).astype(numbers)  # with nothing trained some have no value
    return run.vae.cpu().eval(), history, facts


def resume(setup: Setup, run: Run, saved: Checkpoints) -> None:
    """Put the run where its newest checkpoint left it, if there is one."""
    ranks.wait()  # for their owner to have cleared away what is damaged
    found = saved.newest()
    ranks.wait()  # before the owner writes another
    if found is None:
        logger.info("training %d steps on %s", setup.planned, setup.device)
        return
    tensors, facts = found
    if facts.pop("key") != setup.key:
        raise ValueError(
            f"{saved.folder}: its checkpoints are of other shards, settings or seed; expected those of this run. "
            "Give every run a folder of its own, or empty this one."
        )
    run.restore(tensors, facts)
    logger.info("going on from step %d of %d on %s", run.step, setup.planned, setup.device)


def save_if_due(setup: Setup, run: Run, saved: Checkpoints, signals: Signals, *, epoch_end: bool = False) -> None:
    """Save the run if the clock, a signal or its end asks for it; after SIGTERM end the process."""
    noted = [signals.asked, signals.terminated, saved.is_owner and saved.due(epoch_end=epoch_end)]
    asked, terminated, due = ranks.total(noted)
    if run.finished or asked or due:
        run.terms.settle(run.sums)
        if saved.is_owner:
            saved.save(run.step, run.tensors(), run.facts() | {"key": setup.key})
        signals.asked = False
    if terminated and not run.finished:
        logger.info("SIGTERM: saved at step %d, ending", run.step)
        raise SystemExit(TERMINATED)


def _epoch_line(run: Run, epochs: int) -> str:
    row = run.history[-1]
    best = "none yet" if run.best_elbo is None else f"{run.best_elbo:.2f} of epoch {run.best_epoch}"
    return (
        f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.2f}  "
        f"validation elbo {row['validation_elbo']:.2f}  reconstruction {row['validation_reconstruction']:.2f}  "
        f"kl {row['validation_kl']:.2f}  kl_weight {row['kl_weight']:.2f}  best {best}  "
        f"{row['cells_per_second']:,.0f} cells/s  waiting {row['waiting_seconds'] / max(row['seconds'], 1e-9):.1%}  "
        f"peak memory {row['peak_memory_mb']:,.0f} MB"
    )
