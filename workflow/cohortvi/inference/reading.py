"""A trained model and the counts stores of the cells that it is asked about, read in chunks as the model takes them.

What it is told of them are columns of their obs and the sheet, in its own codes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cohortvi.inference.checkpoint import load_model
from cohortvi.inference.covariates import BATCH, Columns, Sheet
from cohortvi.inference.device import choose_device, on_device, output_for
from cohortvi.inference.networks import Covariates
from cohortvi.inference.noise import noise_of
from cohortvi.inference.sparse import Counts
from cohortvi.store.counts import CountsReader
from cohortvi.store.loader import Loader
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts


class Chunk(NamedTuple):
    """Consecutive cells of a store, start:stop, their counts (n, g) and covariates where the model is."""

    start: int
    stop: int
    x: Counts
    covariates: Covariates


class Source:
    """A trained model on its device, its weights fixed, and the counts stores, in order."""

    def __init__(self, model: str | Path, counts: Sequence[str | Path], *, sheet: Sheet, threads: int):
        """`counts`: manifests; `sheet`: as `fit` takes it. Errors: ValueError for a store with none of its genes."""
        torch.set_num_threads(threads)
        vae, self.facts = load_model(model)
        self.device = choose_device(self.facts["settings"]["device"])
        self.vae = vae.to(self.device).requires_grad_(requires_grad=False)
        self.columns, self.sheet = Columns.from_facts(self.facts), sheet
        self.counts, self.samples = list(counts), {}
        for reader in self.stores():
            check_genes(reader, self.facts["genes"])
            self.samples |= reader.manifest["samples"]
        self.n_obs = sum(self.samples.values())

    def stores(self) -> Iterator[CountsReader]:
        """Open the counts stores, one after the other: a store that is not looked at any more takes no memory."""
        return (open_counts(path, self.facts["genes"]) for path in self.counts)

    def chunks(self, reader: CountsReader, chunk_cells: int, *, is_told: bool = True) -> Iterator[Chunk]:
        """Yield the cells of a store, in order; without `is_told` the covariates are no one's: all codes are 0.

        The next chunk is written over this one's counts. Errors: ValueError for a value that the model does not know.
        """
        values = covariates_of(reader, self.columns, self.sheet) if is_told and reader.n_obs else {}
        settings = {"batch_size": chunk_cells, "seed": 0, "shuffle": False, "output": output_for(self.device)}
        for x, _, rows in Loader(ShardedCounts([reader]), **settings):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            here = {name: torch.from_numpy(column[start:stop]) for name, column in values.items()}
            unknown = Covariates(torch.zeros(len(rows), dtype=torch.int64, device=self.device))
            covariates = self.columns.covariates(here, self.device) if here else unknown
            yield Chunk(start, stop, on_device(x, self.device), covariates)

    def noise(self, reader: CountsReader, chunk: Chunk, draws: int, stream: Sequence[int]) -> Tensor:
        """Return the noise of draws from the posteriors of a chunk's cells, (draws, n, k); `stream`: seed and use."""
        (sample,) = reader.manifest["samples"]
        rows = reader.obs["row"].to_numpy()[chunk.start : chunk.stop]
        noise_nsk = noise_of(rows, (draws, self.vae.n_dimensions), stream, sample)
        return torch.from_numpy(noise_nsk).to(self.device).transpose(0, 1)


def covariates_of(reader: CountsReader, columns: Columns, sheet: Sheet) -> dict[str, np.ndarray]:
    """Return {name: (n,)} for every covariate of the model: codes int64, or raw continuous values.

    `sheet`: as `fit` takes it. Errors: ValueError for a value that the model was not trained on.
    """
    tables = columns.sheet_tables(sheet, list(reader.manifest["samples"]))
    found = {name: np.repeat(table.numpy(), reader.n_obs) for name, table in tables.items()}
    for name, known in {BATCH: columns.batches, **columns.categories}.items():
        if name not in found:
            found[name] = _codes(reader, name, known)
    rest = [name for name in columns.continuous if name not in found]
    return found | {name: reader.column(name, 0, reader.n_obs) for name in rest}


def open_shards(manifests: Sequence[str | Path], genes: Sequence[str]) -> ShardedCounts:
    """Return shards, to be read over a model's genes in its order. Errors: ValueError if they lack one."""
    store = ShardedCounts(manifests)
    if list(store.var_names) == list(genes):
        return store
    missing = [gene for gene in genes if gene not in store.var_names]
    if missing:
        raise ValueError(
            f"{store.stores[0].path}: it lacks {len(missing)} of the {len(genes)} genes of the model "
            f"({', '.join(missing[:3])} ...); expected all of them. Train the model again, or name its genes in "
            "genes.frozen."
        )
    return ShardedCounts(manifests, genes=genes)


def check_genes(reader: CountsReader, genes: list[str]) -> None:
    """Raise ValueError if a store with cells has none of the model's genes."""
    if reader.n_obs and not reader.var.index.isin(genes).any():
        raise ValueError(
            f"{reader.path}: it has none of the {len(genes)} genes of the model ({', '.join(genes[:3])} ...); expected "
            "names as the model knows them. Check cohort.gene_key, or train the model again."
        )


def _codes(reader: CountsReader, name: str, known: Sequence[str]) -> np.ndarray:
    values = pd.Index(reader.categories(name) or [])
    codes = pd.Index(known).get_indexer(values)[reader.column(name, 0, reader.n_obs)]
    if (codes < 0).any():
        new = sorted(set(values) - set(known))
        raise ValueError(
            f"{reader.path}: {name} {', '.join(map(repr, new))} is not among the model's {', '.join(known)}; expected "
            "values that it was trained on. Train the model again, or one with encode_covariates: false."
        )
    return codes.astype(np.int64)
