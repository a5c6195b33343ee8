"""A random subset of a cohort's cells, spread over its samples, as tensors for a trained model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from cohortvi.inference.covariates import SAMPLE, Columns, Sheet
from cohortvi.inference.networks import Covariates
from cohortvi.inference.sparse import Counts, SparseCounts, dense, sparse_counts, take_rows
from cohortvi.store.layout import Rows
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts


class Cells(NamedTuple):
    """Some cells: counts (n, g), covariates, and a table with their sample, raw row and other columns of obs."""

    x: Counts
    covariates: Covariates
    obs: pd.DataFrame

    def part(self, start: int, stop: int) -> "Cells":
        """Return cells start:stop."""
        rows = slice(start, stop)
        return Cells(take_rows(self.x, rows), self.covariates.take(rows), self.obs.iloc[start:stop])


def draw_cells(store: ShardedCounts, n: int, seed: int) -> list[np.ndarray]:
    """Return the rows of each store, ascending, that a draw of n cells takes: of each sample its share.

    Every sample has at least one if n is no smaller than their number; the whole if there are no more than n cells.
    """
    n_samples = len(store.categories[SAMPLE])
    codes = [store.column(shard, SAMPLE, 0, size) for shard, size in enumerate(store.sizes)]
    sizes = sum((np.bincount(code, minlength=n_samples) for code in codes), np.zeros(n_samples, np.int64))
    generator, taken = np.random.default_rng(seed), shares(sizes, n)
    ranks = [np.sort(generator.choice(size, share, replace=False)) for size, share in zip(sizes, taken, strict=True)]
    seen, found = np.zeros(n_samples, np.int64), []
    for code in codes:
        order, counts = np.argsort(code, kind="stable"), np.bincount(code, minlength=n_samples)
        starts = np.cumsum(counts) - counts
        here = [rank[(rank >= s) & (rank < s + c)] - s for rank, s, c in zip(ranks, seen, counts, strict=True)]
        places = np.concatenate([start + rank for start, rank in zip(starts, here, strict=True)])
        found.append(np.sort(order[places]))
        seen += counts
    return found


def shares(sizes: np.ndarray, n: int) -> np.ndarray:
    """Return how many of n cells each sample gives: in proportion to its size, by largest remainders, at least one."""
    if n >= sizes.sum():
        return sizes
    least = np.minimum(sizes, 1) if n >= (sizes > 0).sum() else np.zeros_like(sizes)
    wanted = np.maximum(sizes * (n / sizes.sum()), least)
    wanted = least + (wanted - least) * ((n - least.sum()) / max((wanted - least).sum(), 1e-300))
    taken = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), sizes)
    for at in np.argsort(taken - wanted, kind="stable")[: n - taken.sum()]:
        taken[at] += 1
    return taken


def read_cells(store: ShardedCounts, rows: Sequence[np.ndarray], columns: Columns, sheet: Sheet) -> Cells:
    """Return the cells at these rows of each store, as CSR; `columns`: the model's; `sheet`: as for `fit`."""
    parts = [store.stores[shard].read(row, row + 1) for shard, found in enumerate(rows) for row in found.tolist()]
    x = counts_of(parts, store.n_vars)
    tables = columns.sheet_tables(sheet, store.categories[SAMPLE])
    wanted = [SAMPLE, *(name for name in columns.names if name not in tables)]
    codes = {name: torch.from_numpy(_taken(store.column, name, rows, store.sizes)) for name in wanted}
    recoded = columns.recode({name: store.categories[name] for name in wanted if name in store.categories})
    codes |= {name: table[codes[name]] for name, table in recoded.items()}
    codes |= {name: table[codes[SAMPLE]] for name, table in tables.items()}
    covariates = columns.covariates(codes, torch.device("cpu"))
    obs = {name: _taken(store.values, name, rows, store.sizes) for name in store.columns}
    return Cells(x, covariates, pd.DataFrame(obs))


def counts_of(cells: Sequence[Rows], n_vars: int) -> SparseCounts:
    """Return counts that were read one cell at a time as a model on the CPU takes them."""
    ends = np.concatenate([[0], np.cumsum([len(cell.indices) for cell in cells])]).astype(np.int64)
    indices = np.concatenate([cell.indices for cell in cells]).astype(np.int32)
    data = np.concatenate([cell.data for cell in cells]).astype(np.float32)
    return sparse_counts(*map(torch.from_numpy, (ends, indices, data)), n_vars)


def _taken(read: Callable, name: str, rows: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    parts = [read(at, name, 0, size)[found] for at, (found, size) in enumerate(zip(rows, sizes, strict=True))]
    return np.concatenate([np.asarray(part) for part in parts])


def names_of(obs: pd.DataFrame, counts: Sequence[str | Path]) -> np.ndarray:
    """Return the names of the cells with these samples and raw rows, out of the counts stores of their samples."""
    names = np.empty(len(obs), object)
    for path in counts:
        reader = open_counts(path)
        (sample,) = reader.manifest["samples"]
        here = np.flatnonzero(obs[SAMPLE] == sample)
        if len(here):
            of_rows = pd.Series(reader.obs.index.to_numpy(object), index=reader.obs["row"].to_numpy())
            names[here] = of_rows.loc[obs["row"].to_numpy()[here]].to_numpy()
    return names


def to_device(cells: Cells, device: torch.device) -> Cells:
    """Return the cells where a model on this device takes them: dense on a GPU."""
    if device.type == "cpu":
        return cells
    return Cells(dense(cells.x, torch.float32).to(device), cells.covariates.to(device), cells.obs)
