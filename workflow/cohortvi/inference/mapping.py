"""A model that is mapped onto an earlier one, its reference: what that is, what is new, and which cells have it.

Batches and categories of the reference come first and keep their codes and parameters, and so their cells their places;
new ones follow. Training and the held-out ELBO look at the cells that have something new alone: the others have no
parameter left to learn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cohortvi.cohort.references import FILES, read_facts, shape_faults
from cohortvi.config import Model, Reference
from cohortvi.files import digest
from cohortvi.inference.checkpoint import load_model
from cohortvi.inference.covariates import BATCH, SAMPLE, Columns, Sheet, cells_by_value
from cohortvi.inference.library import library_moments
from cohortvi.inference.surgery import extend
from cohortvi.inference.vae import VAE
from cohortvi.store.sharded import ShardedCounts

SHOWN = 5  # values listed in a message


class Known(NamedTuple):
    """The reference of a model: its weights, facts and columns, and a digest of its files."""

    vae: VAE
    facts: dict[str, Any]
    columns: Columns
    digest: str


class New(NamedTuple):
    """What a reference does not know: values by column, and by the columns of the stores that tell who has them."""

    values: dict[str, list[str]]
    of_stores: dict[str, list[str]]

    @property
    def query(self) -> str | None:
        """Which cells have something new, as loaders take it (`where`); None if nothing is new."""
        return " or ".join(f"`{name}` in {values!r}" for name, values in self.of_stores.items()) or None


def open_reference(model: Model) -> Known | None:
    """Return the reference of a model, None if it has none. Errors: ValueError for one of another shape."""
    if model.reference is None:
        return None
    folder = Path(model.reference.path)
    faults = list(shape_faults(read_facts(folder)["settings"], model))
    if faults:
        raise ValueError(f"{folder}: this reference is of another shape: {'; '.join(faults)}")
    vae, facts = load_model(folder / FILES[0])
    return Known(vae, facts, Columns.from_facts(facts), content(model.reference))


def content(reference: Reference) -> str:
    """Return a digest of a reference's files."""
    return digest(*((Path(reference.path) / name).read_bytes() for name in FILES))


def news(known: Columns, columns: Columns, sheet: Sheet, samples: Sequence[str]) -> New:
    """Return what `columns` has beside `known`; `samples`: those of the stores, of which the sheet has values."""
    values, of_stores = columns.beside(known), {}
    for name, found in values.items():
        if name in sheet:
            mine = {sample for sample in samples if sheet[name].get(sample) in found}
            of_stores[SAMPLE] = sorted({*of_stores.get(SAMPLE, ()), *mine})
        else:
            of_stores[name] = found
    return New(values, of_stores)


def count_new(store: ShardedCounts, new: New) -> int:
    """Return how many cells of a store have something new."""
    n = 0
    for shard, size in enumerate(store.sizes):
        is_new = np.zeros(size, bool)
        for name, values in new.of_stores.items():
            codes = [code for code, value in enumerate(store.categories[name]) if value in values]
            is_new |= np.isin(store.column(shard, name, 0, size), codes)
        n += int(is_new.sum())
    return n


def check_new(stores: Sequence[ShardedCounts], new: New, columns: Columns, sheet: Sheet) -> None:
    """Check that values which the reference does not know are not held out as a whole; `stores`: to train on, held out.

    They would learn nothing, and the held-out ELBO, looking at their cells, would not see what others learn. Errors:
    ValueError.
    """
    trained, held_out = (cells_by_value(store, columns, sheet) for store in stores)
    lost = {
        name: [value for value in values if held_out[name][value] and not trained[name][value]]
        for name, values in new.values.items()
    }
    if any(lost.values()):
        raise _no_cell("training", lost)


def _no_cell(split: str, values: dict[str, list[str]]) -> ValueError:
    shown = "; ".join(f"{name} {', '.join(some[:SHOWN])}" for name, some in values.items() if some)
    return ValueError(
        f"the {split} shards hold no cell of {shown}, which the reference does not know; expected some in both splits. "
        "Change store.validation (by: cell), or look at the ledger for lost samples."
    )


class Task(NamedTuple):
    """What a run is to train, on which cells, and what a mapped model's facts say of its reference."""

    n_obs: int  # training cells; 0: nothing is trained
    where: str | None = None  # the cells that are looked at, as loaders take it; None: all
    only: dict[str, Tensor] | None = None  # the entries of parameters that are trained; None: all
    facts: dict[str, Any] | None = None  # of a mapped model


def map_onto(
    known: Known,
    reference: Reference,
    vae: VAE,
    columns: Columns,
    stores: Sequence[ShardedCounts],
    sheet: Sheet,
    *,
    threads: int,
) -> Task:
    """Give an untrained model the parameters of its reference; return what is left to train, on which cells.

    `stores`: to train on and held out. Errors: ValueError if no held-out cell has anything new, or a new value is held
    out as a whole.
    """
    new = news(known.columns, columns, sheet, stores[0].categories[SAMPLE])
    only = extend(vae, known.vae)
    if vae.library == "latent":
        _begin_libraries(vae, known, columns, stores[0], threads)
    if not reference.surgery:
        only = {}
    if new.query and not count_new(stores[1], new):
        raise _no_cell("validation", new.values)
    if only:
        check_new(stores, new, columns, sheet)
    facts = {
        "path": reference.path,
        "digest": known.digest,
        "surgery": reference.surgery,
        "new": new.values,
        "n_trained": sum(int(moves.sum()) for moves in only.values()),
        "validation_elbo": known.facts["best_validation_elbo"],
    }
    return Task(count_new(stores[0], new) if only else 0, new.query, only, facts)


@torch.no_grad()
def _begin_libraries(vae: VAE, known: Known, columns: Columns, store: ShardedCounts, threads: int) -> None:
    """Give new batches that have training cells the moments of their libraries; others keep the known ones' mean."""
    moments = library_moments(store, seed=0, threads=threads)
    for batch, n, loc, scale in zip(store.categories[BATCH], *(values.tolist() for values in moments), strict=True):
        code = columns.batches.index(batch)
        if n and code >= len(known.columns.batches):
            vae.library_loc_b[code], vae.library_scale_b[code] = loc, scale
