"""Denoised expression of every cell of a cohort: expression.zarr, and its means by group of cells.

A store of cells (atlas/cell_store.py): X holds the posterior mean of each cell's expected UMI of the genes asked for,
in a cell with `library` UMI of all genes of the model, and layer `std` the standard deviation of the same.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cohortvi.atlas.cell_store import Block, write_cells
from cohortvi.config import Expression
from cohortvi.faults import hint
from cohortvi.files import read_columns
from cohortvi.inference.expression import GroupMoments, denoised
from cohortvi.inference.prepare import EXPRESSION
from cohortvi.inference.reading import Source

COLUMNS = ("column", "group", "gene", "mean", "sd", "cells")
GENE_ADVICE = "Models see the genes that were selected: name it in genes.always to have it among them."
BATCH_ADVICE = "Name batches that the model was trained on, or none for each cell's own."


class Groups:
    """The groups of all cells by some columns, and the moments of their expression as it is computed."""

    def __init__(self, cells: str | Path, columns: Sequence[str], n_obs: int, genes: Sequence[str], draws: int):
        """`cells`: the table of all cells, parquet. Errors: ValueError if they are not n_obs."""
        table, self.genes = read_columns(cells, columns), genes
        if len(table) != n_obs:
            raise ValueError(f"{cells}: found {len(table)} cells; expected the {n_obs} of the counts. Make it again")
        self.groups = {column: pd.Categorical(table[column]).remove_unused_categories() for column in columns}
        self.moments = {
            column: GroupMoments(len(groups.categories), len(genes), draws) for column, groups in self.groups.items()
        }

    def add(self, start: int, mean_ng: np.ndarray, std_ng: np.ndarray) -> None:
        """Take in consecutive cells, the first of which has this number; those without a group are in none."""
        for column, groups in self.groups.items():
            codes_n = groups.codes[start : start + len(mean_ng)]
            has_n = codes_n >= 0
            self.moments[column].add(codes_n[has_n], mean_ng[has_n], std_ng[has_n])

    def table(self) -> pd.DataFrame:
        """Return COLUMNS: a row for each column, group and gene."""
        parts = []
        for column, moments in self.moments.items():
            groups, n_genes = self.groups[column].categories.astype(str), len(self.genes)
            found = {"column": column, "group": np.repeat(groups, n_genes)}
            found |= {"gene": np.tile(np.array(self.genes, dtype=object), len(groups))}
            found |= {"mean": moments.mean.ravel(), "sd": moments.sd.ravel()}
            parts.append(pd.DataFrame(found | {"cells": np.repeat(moments.cells, n_genes)}))
        return pd.concat(parts, ignore_index=True)


def expression(
    source: Source, settings: Expression, cells: str | Path | None, out: str | Path, *, seed: int, chunk_cells: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Write the store `out` for all cells of the source, in order; return its manifest and the table by group.

    `cells`: the table of all cells (parquet), needed if `settings.groups` names columns of it. mean and sd of a group
    are those of a draw from the posterior of a random cell of it. What is found of a cell depends on (seed, sample,
    row) alone, up to rounding. Memory: a chunk of cells over all genes, a shard of the store, a row for each group, and
    a code for each cell and column. Errors: ValueError for genes and batches that the model does not know.
    """
    genes = _places("expression.genes", settings.genes, source.facts["genes"], GENE_ADVICE)
    batches = _places("expression.batches", settings.batches, source.columns.batches, BATCH_ADVICE)
    groups = Groups(cells, settings.groups, source.n_obs, settings.genes, settings.draws) if settings.groups else None

    def blocks() -> Iterator[Block]:
        first, genes_g = 0, torch.tensor(genes, device=source.device)
        for code, reader in enumerate(source.stores()):
            names = reader.obs.index.to_numpy(dtype=object)
            for chunk in source.chunks(reader, chunk_cells):
                noise_snk = source.noise(reader, chunk, settings.draws, (seed, EXPRESSION))
                found = denoised(source.vae, chunk.x, chunk.covariates, noise_snk, genes_g, batches)
                values = [settings.library * moment.cpu().numpy() for moment in found]
                if groups is not None:
                    groups.add(first + chunk.start, *values)
                written = tuple(moment.astype(np.float32) for moment in values)
                yield Block(names[chunk.start : chunk.stop], np.full(len(values[0]), code), written)
            first += reader.n_obs

    facts = {"n_vars": len(genes), "library": settings.library, "draws": settings.draws}
    facts |= {"batches": list(settings.batches)}
    shapes = {"X": (len(genes),), "layers/std": (len(genes),)}
    described = {"cohortvi": facts | {"batches": np.array(settings.batches, dtype=object)}}
    manifest = write_cells(out, source.samples, shapes, blocks(), lambda: facts, genes=settings.genes, uns=described)
    return manifest, pd.DataFrame(columns=COLUMNS) if groups is None else groups.table()


def _places(where: str, names: Sequence[str], known: Sequence[str], advice: str) -> list[int]:
    """Return where these names stand among those that the model knows."""
    places, faults = {name: at for at, name in enumerate(known)}, []
    for name in names:
        if name not in places:
            faults.append(f"{name!r} is none of the model's {len(known)}; {hint(name, known, 3)}")
    if faults:
        raise ValueError(f"{where}: {' '.join(faults)} {advice}")
    return [places[name] for name in names]
