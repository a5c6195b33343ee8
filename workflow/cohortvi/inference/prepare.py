"""What a training run starts from: its stores, its covariates, its untrained model and its optimiser.

On exit the stores fit together, hold cells to train on and cells to validate on, and the model has their genes and
categories.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cohortvi.config import Model
from cohortvi.files import digest, read_json
from cohortvi.inference import ranks
from cohortvi.inference.adam import Adam
from cohortvi.inference.covariates import BATCH, SAMPLE, Columns, Sheet, moments, number
from cohortvi.inference.networks import Covariates, observed_library
from cohortvi.inference.priors import VampPrior
from cohortvi.inference.run import Run
from cohortvi.inference.sparse import Counts, dense, sparse_counts
from cohortvi.inference.subset import draw_cells, read_cells
from cohortvi.inference.vae import VAE
from cohortvi.store import batches
from cohortvi.store.loader import Loader
from cohortvi.store.sharded import ShardedCounts

# scvi-tools' value, kept by measurement: it damps the steps of parameters whose gradients are below it, such as those
# of rarely counted genes, which are mostly noise. Held-out ELBO on Kang et al. (2,000 genes, batch 128, 40 epochs),
# seeds 0 and 1: -437.67 and -437.00 with 0.01; -437.84 and -437.31 with 1e-8, which fits the training cells closer.
ADAM_EPS = 0.01
MIN_LIBRARY_VARIANCE = 1e-4  # of the log libraries of a batch
EVALUATED_CELLS = 1024  # cells at a time in validation
INIT, TRAINING, VALIDATION, GAP, DIFFERENTIAL = range(5)  # uses of random numbers, each with its own stream


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
    planned: int  # steps of max_epochs epochs
    shards: str  # digest of the manifests

    @property
    def key(self) -> str:
        """Digest of all that decides which steps are taken; checkpoints of another key are another run's."""
        passing = ("checkpoint_minutes", "device", "tensorboard")
        settings = {name: value for name, value in asdict(self.model).items() if name not in passing}
        tables = {name: table.tolist() for name, table in self.tables.items()}
        return digest(settings, self.seed, self.shards, self.columns.facts(), tables)

    def covariates(self, obs: dict[str, Tensor]) -> Covariates:
        """Return the covariates of a minibatch with these columns of obs."""
        of_sheet = {name: table[obs[SAMPLE]] for name, table in self.tables.items()}
        return self.columns.covariates(obs | of_sheet, self.device)


def prepare(
    train: Sequence[Path], validation: Sequence[Path], model: Model, *, sheet: Sheet, seed: int, threads: int
) -> tuple[Setup, Run]:
    """Open the shards of these manifests; return what stays the same, and the run before its first step.

    `threads`: that read shards. Errors: ValueError for shards that do not fit together or hold no cells, for a device
    that is not there, and for covariates that are missing, of the wrong kind or constant.
    """
    device = choose_device(model.device)
    stores = ShardedCounts(train), ShardedCounts(validation)
    _check_sizes(*stores, model)
    columns = learn_columns(stores[0], model, sheet)
    tables = columns.sheet_tables(sheet, stores[0].categories[SAMPLE])
    names = [name for name in columns.names if name not in tables] + ([SAMPLE] if tables else [])
    _check_match(*stores, names)
    common = {"seed": seed, "columns": names, "output": output_for(device), "threads": threads}
    common |= {"rank": ranks.rank(), "world": ranks.world()}
    loader = Loader(stores[0], batch_size=model.batch_size, **common)
    held_out = Loader(stores[1], batch_size=EVALUATED_CELLS, shuffle=False, **common)
    shards = digest([read_json(path) for path in (*train, *validation)])
    seed_torch(seed, INIT, 0)
    vae = build(stores[0], model, columns)
    start(vae, stores[0], columns, sheet, seed=seed, threads=threads)
    vae.to(device)
    # Weight decay is L2 in the gradient, as in scvi-tools.
    optimizer = Adam(vae.named_parameters(), weight_decay=model.weight_decay, eps=ADAM_EPS)
    run = Run(vae, optimizer, loader)
    planned = model.max_epochs * loader.n_steps(0)
    return Setup(model, seed, stores[0], held_out, columns, tables, device, planned, shards), run


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
        n, total, squares = (torch.zeros(len(columns.batches), dtype=torch.float64) for _ in range(3))
        common = {"batch_size": EVALUATED_CELLS, "seed": seed, "shuffle": False, "threads": threads}
        for minibatch in Loader(store, columns=[BATCH], output="csr", **common):
            batch_n = minibatch.obs[BATCH]
            log_library_n = observed_library(sparse_counts(*minibatch.x_ng))[:, 0].log().double()
            n.index_add_(0, batch_n, torch.ones_like(log_library_n))
            total.index_add_(0, batch_n, log_library_n)
            squares.index_add_(0, batch_n, log_library_n**2)
        loc_b = total / n.clamp(min=1)
        vae.library_loc_b.copy_(loc_b)
        vae.library_scale_b.copy_((squares / n.clamp(min=1) - loc_b**2).clamp(min=MIN_LIBRARY_VARIANCE).sqrt())


def learn_columns(train: ShardedCounts, model: Model, sheet: Sheet) -> Columns:
    """Return categories and moments of the model's covariates; the continuous ones take a pass over obs alone.

    Errors: ValueError for a column that neither sheet nor shards have or that is of the other kind, and for a constant.
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

    return Columns(
        tuple(train.categories[BATCH]),
        {name: categories(name) for name in sorted(model.categorical_covariates)},
        {name: moments(name, parts(name)) for name in sorted(model.continuous_covariates)},
    )


def _check_columns(setting: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{setting}: {name!r} is no such column of the sheet or the cells; expected one of "
                f"{', '.join(known) or 'none'}. Columns of the cells are those of cohort.keep_obs."
            )


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here. Errors: ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, but this process sees no GPU; set auto or cpu, or run where there is one")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def output_for(device: torch.device) -> str:
    """Return the output of loaders (store/loader.py) that a model on this device takes fastest."""
    return "csr" if device.type == "cpu" else "dense"


def on_device(x: batches.Counts, device: torch.device) -> Counts:
    """Return counts of a loader with this output (`output_for`) as models take them, on their device."""
    return sparse_counts(*x) if isinstance(x, batches.Csr) else x.to(device)


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
