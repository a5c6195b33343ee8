"""What a training run starts from: its stores, its covariates, its model, untrained or its reference's, its optimiser.

On exit the stores fit together, hold cells to train on and cells to validate on, and the model has their genes and
categories.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cohortvi.config import Labels, Model
from cohortvi.files import digest, read_json
from cohortvi.inference import ranks
from cohortvi.inference.adam import Adam
from cohortvi.inference.covariates import (
    BATCH,
    SAMPLE,
    Columns,
    Sheet,
    cells_by_code,
    cells_by_value,
    moments,
    number,
)
from cohortvi.inference.device import choose_device, set_precision, training_output
from cohortvi.inference.fused_elbo import FusedElbo, is_plain
from cohortvi.inference.library import library_moments
from cohortvi.inference.mapping import Task, map_onto, open_reference
from cohortvi.inference.networks import Covariates
from cohortvi.inference.priors import VampPrior
from cohortvi.inference.reading import open_shards
from cohortvi.inference.run import Run
from cohortvi.inference.sparse import dense
from cohortvi.inference.subset import draw_cells, read_cells
from cohortvi.inference.terms import TOGETHER, Terms
from cohortvi.inference.vae import VAE
from cohortvi.store.loader import Loader
from cohortvi.store.sharded import ShardedCounts

# scvi-tools' value, kept by measurement: it damps the steps of parameters whose gradients are below it, such as those
# of rarely counted genes, which are mostly noise. Held-out ELBO on Kang et al. (2,000 genes, batch 128, 40 epochs),
# seeds 0 and 1: -437.67 and -437.00 with 0.01; -437.84 and -437.31 with 1e-8, which fits the training cells closer.
ADAM_EPS = 0.01
LEAST_LABELS = 2
EVALUATED_CELLS = 1024  # cells at a time in validation
# Settings that do not decide which model comes out, up to rounding.
PASSING = ("checkpoint_minutes", "device", "graph", "tensorboard")
MOST_EPOCHS = 400  # that `min_steps` makes of a cohort
# Uses of random numbers, each with its own stream.
INIT, TRAINING, VALIDATION, GAP, DIFFERENTIAL, EMBED, EXPRESSION, LIKELIHOOD = range(8)


@dataclass(frozen=True)
class Setup:
    """What stays the same while training."""

    model: Model
    seed: int
    train: ShardedCounts
    validation: Loader
    columns: Columns
    tables: dict[str, Tensor]  # covariates of the sheet, for each category of `sample`
    device: torch.device
    epochs: int  # as planned; 0 if nothing is trained
    planned: int  # steps of them
    shards: str  # digest of the manifests
    codes: dict[str, Tensor]  # of the stores' own, for each column of which the model has others
    task: Task
    unseen: set[tuple[int, int]]  # (covariate, code) of the batches and categories that no training cell has

    @property
    def key(self) -> str:
        """Digest of all that decides which steps are taken; checkpoints of another key are another run's."""
        tables = {name: table.tolist() for name, table in self.tables.items()}
        return digest(
            deciding(asdict(self.model)), self.seed, self.shards, self.columns.facts(), tables, self.task.facts
        )

    def covariates(self, obs: dict[str, Tensor]) -> Covariates:
        """Return the covariates of a minibatch with these columns of obs, on the CPU as these are."""
        own = {name: codes[obs[name]] for name, codes in self.codes.items()}
        of_sheet = {name: table[obs[SAMPLE]] for name, table in self.tables.items()}
        covariates = self.columns.covariates(obs | own | of_sheet, torch.device("cpu"))
        if self.model.labels is None:
            return covariates
        return covariates._replace(label_n=own[self.model.labels.column])


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of a model's settings that decide which model comes out."""
    return {name: value for name, value in settings.items() if name not in PASSING}


def prepare(
    train: Sequence[Path], validation: Sequence[Path], model: Model, *, sheet: Sheet, seed: int, threads: int
) -> tuple[Setup, Run]:
    """Open the shards of these manifests; return what stays the same, and the run before its first step.

    `threads`: that read shards. Errors: ValueError for shards that do not fit together or hold no cells, for a device
    that is not there, and for covariates that are missing, of the wrong kind or constant.
    """
    device = choose_device(model.device)
    set_precision(device, model.precision)
    known = open_reference(model)
    stores = [
        open_shards(paths, known.facts["genes"]) if known else ShardedCounts(paths) for paths in (train, validation)
    ]
    _check_sizes(*stores, model)
    columns = learn_columns(stores[0], model, sheet, known.columns if known else Columns((), {}, {}))
    tables = columns.sheet_tables(sheet, stores[0].categories[SAMPLE])
    names = [name for name in columns.names if name not in tables] + ([SAMPLE] if tables else [])
    codes = columns.recode({name: stores[0].categories[name] for name in names if name in stores[0].categories})
    if model.labels:
        names.append(model.labels.column)
        values = pd.Index(stores[0].categories[names[-1]])
        # Of a mapped model `labels` are its reference's, among which its own config may name some that say nothing.
        codes_l = np.where(values.isin(model.labels.unknown), -1, pd.Index(columns.labels).get_indexer(values))
        codes[model.labels.column] = torch.from_numpy(codes_l)
    _check_match(*stores, names)
    common = {"seed": seed, "columns": names, "threads": threads}
    common |= {"rank": ranks.rank(), "world": ranks.world()}
    shards = digest([read_json(path) for path in (*train, *validation)])
    seed_torch(seed, INIT, 0)
    vae = build(stores[0], model, columns)
    task, unseen = Task(stores[0].n_obs), set()
    if known is None:
        cells = cells_by_value(stores[0], columns, sheet).values()
        unseen = {(at, code) for at, found in enumerate(cells) for code, n in enumerate(found.values()) if not n}
        start(vae, stores[0], columns, sheet, seed=seed, threads=threads)
    else:
        task = map_onto(known, model.reference, vae, columns, stores, sheet, threads=threads)
    outputs = [training_output(device, store) for store in stores]
    where = task.where if task.n_obs else None
    loader = Loader(stores[0], batch_size=model.batch_size, where=where, output=outputs[0], **common)
    settings = {"batch_size": EVALUATED_CELLS, "shuffle": False, "output": outputs[1]}
    held_out = Loader(stores[1], where=task.where, **settings, **common)
    run = Run(vae, _optimizer(vae.to(device), model, task.only), loader, Terms(TOGETHER[device.type]))
    run.fused = FusedElbo(vae) if is_plain(vae) and model.draws == 1 else None
    steps = loader.n_steps(0)
    epochs = max(model.max_epochs, min(-(-model.min_steps // steps), MOST_EPOCHS)) if task.n_obs else 0
    plan = epochs, epochs * steps
    setup = Setup(model, seed, stores[0], held_out, columns, tables, device, *plan, shards, codes, task, unseen)
    return setup, run


def _optimizer(vae: VAE, model: Model, only: dict[str, Tensor] | None) -> Adam:
    """Return what moves the parameters; with `only`, these entries alone: all else of the model stands still."""
    named = dict(vae.named_parameters())
    if only is not None:
        vae.eval().requires_grad_(requires_grad=False)
        named = {name: named[name].requires_grad_() for name in only}
    # Weight decay is L2 in the gradient, as in scvi-tools.
    return Adam(named.items(), weight_decay=model.weight_decay, eps=ADAM_EPS, only=only)


def build(store: ShardedCounts, model: Model, columns: Columns) -> VAE:
    """Return an untrained model for the store's genes and the columns' categories."""
    return VAE(
        store.n_vars,
        len(columns.batches),
        n_latent=model.n_latent,
        n_hidden=model.n_hidden,
        n_layers=model.n_layers,
        dropout=model.dropout,
        likelihood=model.likelihood,
        dispersion=model.dispersion,
        n_categories=tuple(len(values) for values in columns.categories.values()),
        n_continuous=len(columns.continuous),
        encode_covariates=model.encode_covariates,
        library=model.library,
        posterior=model.posterior,
        prior=model.prior,
        n_components=model.n_components,
        n_labels=len(columns.labels),
        decoder=model.decoder,
        norm=model.norm,
        coding=model.coding,
        n_embedding=model.n_embedding,
    )


def start(vae: VAE, store: ShardedCounts, columns: Columns, sheet: Sheet, *, seed: int, threads: int) -> None:
    """Give an untrained model what it has of the training cells: pseudo-inputs, moments of the batches' log libraries.

    The latter take a pass over the counts. Errors: ValueError if there are fewer cells than pseudo-inputs.
    """
    if isinstance(vae.prior, VampPrior):
        n_components = len(vae.prior.logits_c)
        if store.n_obs < n_components:
            raise ValueError(
                f"n_components: found {n_components}; expected at most the {store.n_obs} training cells, since each "
                "pseudo-input begins as one of them. Lower models.*.n_components, or take another prior."
            )
        cells = read_cells(store, draw_cells(store, n_components, seed), columns, sheet)
        vae.prior.begin(dense(cells.x, torch.float32), cells.covariates)
    if vae.library == "latent":
        _, loc_b, scale_b = library_moments(store, seed=seed, threads=threads)
        vae.library_loc_b.copy_(loc_b)
        vae.library_scale_b.copy_(scale_b)


def learn_columns(train: ShardedCounts, model: Model, sheet: Sheet, known: Columns) -> Columns:
    """Return categories and moments of the model's covariates; the continuous ones take a pass over obs alone.

    `known`: those of its reference, whose categories come first and whose moments stay. Errors: ValueError
    for a column that neither sheet nor shards have or that is of the other kind, and for a constant.
    """
    _check_columns("categorical_covariates", model.categorical_covariates, [*sheet, *train.categories])
    numbers = [name for name in train.columns if name not in train.categories]
    _check_columns("continuous_covariates", model.continuous_covariates, [*sheet, *numbers])
    samples = train.categories[SAMPLE]

    def categories(name: str) -> tuple[str, ...]:
        return tuple(sorted({sheet[name][sample] for sample in samples}) if name in sheet else train.categories[name])

    def parts(name: str) -> Iterator[np.ndarray]:
        table = np.array([number(sheet[name], name, sample) for sample in samples]) if name in sheet else None
        for store in train.stores:
            values = store.column(name if table is None else SAMPLE, 0, store.n_obs)
            yield values if table is None else table[values]

    def after(first: tuple[str, ...], found: Sequence[str]) -> tuple[str, ...]:
        return (*first, *(value for value in found if value not in first))

    return Columns(
        after(known.batches, train.categories[BATCH]),
        {
            name: after(known.categories.get(name, ()), categories(name))
            for name in sorted(model.categorical_covariates)
        },
        known.continuous or {name: moments(name, parts(name)) for name in sorted(model.continuous_covariates)},
        known.labels or (learn_labels(train, model.labels) if model.labels else ()),
    )


def learn_labels(train: ShardedCounts, labels: Labels) -> tuple[str, ...]:
    """Return the labels that training cells have, sorted. Errors: ValueError if the column is none, or has but one."""
    _check_columns("labels.column", [labels.column], train.categories)
    cells = cells_by_code(train, labels.column)
    found = sorted(value for value, n in cells.items() if n and value not in labels.unknown)
    if len(found) < LEAST_LABELS:
        raise ValueError(
            f"labels: the training cells have {', '.join(map(repr, found)) or 'nothing'} in {labels.column!r} but for "
            f"unknown ones ({', '.join(map(repr, labels.unknown))}); expected at least two labels. Name another "
            "column, or take labels out of the model."
        )
    return tuple(found)


def _check_columns(setting: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{setting}: {name!r} is no such column of the sheet or the cells; expected one of "
                f"{', '.join(known) or 'none'}. Columns of the cells are those of cohort.keep_obs."
            )


def seed_torch(seed: int, use: int, step: int) -> None:
    """Seed torch's generators with the stream of (seed, use, step)."""
    state = int(np.random.SeedSequence([seed, use, step]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    # Not by torch.manual_seed: where there is no GPU it notes, for every call and for good, what to do when one comes.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(state)


def _check_sizes(train: ShardedCounts, validation: ShardedCounts, model: Model) -> None:
    # With fewer than 3 an epoch may end with one cell alone, of which batch norm has no statistics.
    least = max(3, 2 * ranks.world())  # nor may a rank be without cells
    if model.batch_size < least:
        raise ValueError(f"batch_size: found {model.batch_size}; expected at least {least}")
    for split, store in (("training", train), ("validation", validation)):
        least = max(2, ranks.world())
        if store.n_obs < least:
            raise ValueError(
                f"the {split} shards hold {store.n_obs} cells; expected at least {least}, for the held-out ELBO "
                "decides when to stop and which weights are kept. Change store.validation, or look at the ledger for "
                "lost samples."
            )


def _check_match(train: ShardedCounts, validation: ShardedCounts, names: Sequence[str]) -> None:
    found = [(list(store.var_names), *(store.categories.get(name) for name in names)) for store in (train, validation)]
    if found[0] != found[1]:
        raise ValueError(
            "the training and validation shards have other genes or categories; expected those of one cohort. "
            "Remove results/store/shards and run again."
        )
