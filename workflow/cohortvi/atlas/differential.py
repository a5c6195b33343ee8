"""Genes that differ between groups of cells: by the model, and by pseudobulk over replicates beside it.

The model's draws say how sure it is of each cell; they know nothing of how much donors differ. Pseudobulk does: each
replicate's cells of a group are one sum, and replicates are what is tested. A gene to be trusted has both.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from cohortvi.atlas.pseudobulk import MIN_CELLS, pseudobulk
from cohortvi.config import Comparison, Differential
from cohortvi.inference.covariates import Sheet
from cohortvi.inference.differential import (
    Population,
    changes,
    draw_population,
    expected_fdr,
    join_populations,
    pair_cells,
)
from cohortvi.inference.networks import Covariates, observed_library
from cohortvi.inference.prepare import DIFFERENTIAL, seed_torch
from cohortvi.inference.reading import Source, covariates_of
from cohortvi.inference.sparse import Counts, dense
from cohortvi.inference.subset import counts_of, shares
from cohortvi.log import logger
from cohortvi.store.counts import CountsReader

TOGETHER = 256  # cells whose posteriors are drawn together
RARE = 0.05  # UMI in a cell of median library, below which expression is taken for none
COLUMNS = (
    *("comparison", "stratum", "gene", "p_change", "fdr", "is_changed", "lfc", "lfc_sd", "mean_first", "mean_second"),
    *("cells_first", "cells_second", "same_batch", "pseudobulk_lfc", "pseudobulk_p", "pseudobulk_fdr", "replicates"),
)


class Contrast(NamedTuple):
    """Two groups of cells, by their rows in the table of all cells."""

    comparison: str
    stratum: str
    first: np.ndarray
    second: np.ndarray


def contrasts(cells: pd.DataFrame, comparisons: dict[str, Comparison]) -> Iterator[Contrast]:
    """Yield the groups of every comparison, one for each value of its `within`; those with too few cells are told of.

    Errors: ValueError for columns and values that the cells do not have.
    """
    for name, wanted in comparisons.items():
        values = _column(cells, name, wanted.column)
        for value in (wanted.group, *([] if wanted.reference is None else [wanted.reference])):
            if not (values == value).any():
                known = ", ".join(map(repr, sorted(set(values))[:12]))
                raise ValueError(
                    f"differential.comparisons.{name}: no cell has {wanted.column} {value!r}; expected one of {known}"
                )
        is_first = values == wanted.group
        is_second = ~is_first if wanted.reference is None else values == wanted.reference
        strata = np.full(len(cells), "all") if wanted.within is None else _column(cells, name, wanted.within)
        for stratum in sorted(set(strata)):
            groups = [np.flatnonzero(chosen & (strata == stratum)) for chosen in (is_first, is_second)]
            if min(map(len, groups)) < MIN_CELLS:
                sizes = " and ".join(str(len(group)) for group in groups)
                logger.info("%s, %s: %s cells; at least %d are needed, left out", name, stratum, sizes, MIN_CELLS)
                continue
            yield Contrast(name, str(stratum), *groups)


def _column(cells: pd.DataFrame, comparison: str, column: str) -> np.ndarray:
    if column not in cells:
        known = ", ".join(name for name in cells.columns)
        raise ValueError(f"differential.comparisons.{comparison}: no column {column!r}; expected one of {known}")
    return cells[column].astype(str).to_numpy()


def differential(
    model: str | Path,
    counts: Sequence[str | Path],
    cells: pd.DataFrame,
    settings: Differential,
    *,
    sheet: Sheet,
    seed: int,
    threads: int,
    chunk_cells: int,
) -> pd.DataFrame:
    """Return a row for every contrast and gene of the model, the likeliest change first: COLUMNS.

    `counts`: manifests, whose cells in order are the rows of `cells`. p_change, fdr and is_changed: by the model;
    lfc: of `group` over `reference`, log2. Errors: ValueError as `contrasts`, and for a model of other genes or values.
    """
    source = Source(model, counts, sheet=sheet, threads=threads)
    if len(cells) != source.n_obs:
        raise ValueError(
            f"cells: found {len(cells)}; expected the {source.n_obs} of the counts. Make cells.parquet again"
        )
    found, readers = list(contrasts(cells, settings.comparisons)), list(source.stores())
    samples = cells["sample"].astype(str).to_numpy()
    genes = pd.Index(source.facts["genes"])
    replicates = cells[settings.replicate].astype(str).to_numpy() if found else np.empty(0)
    groups = [contrast[2:] for contrast in found]
    bulk = pseudobulk([Path(path) for path in counts], genes, groups, replicates, chunk_cells)
    parts = [
        _table(source, readers, contrast, samples, settings, (seed, DIFFERENTIAL, number)).assign(**sums)
        for number, (contrast, sums) in enumerate(zip(found, bulk, strict=True))
    ]
    ordered = [part.sort_values("p_change", ascending=False, kind="stable") for part in parts]
    return pd.concat(ordered, ignore_index=True) if ordered else pd.DataFrame(columns=COLUMNS)


def _table(
    source: Source,
    readers: Sequence[CountsReader],
    contrast: Contrast,
    samples: np.ndarray,
    settings: Differential,
    stream: tuple[int, int, int],
) -> pd.DataFrame:
    """Return what the model says of a contrast, in the order of its genes; random numbers follow from `stream`."""
    generator = np.random.default_rng(stream)
    seed_torch(*stream)
    drawn = [_draw(source, readers, _choose(rows, samples, settings.cells, generator)) for rows in contrast[2:]]
    batches = [population.covariates.batch_n.cpu().numpy() for population, _ in drawn]
    *pairs, shared = pair_cells(*batches, settings.pairs, generator)
    name = f"{contrast.comparison}, {contrast.stratum}"
    if not shared:
        logger.info(
            "%s: no batch has cells of both: what batches do to genes is not told from what the groups do", name
        )
    sides = [population.take(rows) for (population, _), rows in zip(drawn, pairs, strict=True)]
    library = max(1.0, float(np.median(np.concatenate([libraries for _, libraries in drawn]))))
    found = changes(source.vae, *sides, delta=settings.delta, pseudocount=RARE / library, seed=stream[2])
    fdr_g = expected_fdr(found.p_g)
    logger.info("%s: %d of %d genes change", name, (fdr_g <= settings.fdr).sum(), len(fdr_g))
    columns = {
        "comparison": contrast.comparison,
        "stratum": contrast.stratum,
        "gene": source.facts["genes"],
        "p_change": found.p_g,
        "fdr": fdr_g,
        "is_changed": fdr_g <= settings.fdr,
        "lfc": found.lfc_g,
        "lfc_sd": found.sd_g,
        "mean_first": found.first_g,
        "mean_second": found.second_g,
        "cells_first": len(contrast.first),
        "cells_second": len(contrast.second),
        "same_batch": shared,
    }
    return pd.DataFrame(columns)


def _draw(source: Source, readers: Sequence[CountsReader], rows: np.ndarray) -> tuple[Population, np.ndarray]:
    """Return posterior draws of the cells with these numbers, ascending, and their UMI over the model's genes."""
    parts, libraries, first = [], [], 0
    for reader in readers:
        here = rows[(rows >= first) & (rows < first + reader.n_obs)] - first
        first += reader.n_obs
        told = covariates_of(reader, source.columns, source.sheet) if len(here) else {}
        for start in range(0, len(here), TOGETHER):
            x, covariates = _read(source, reader, here[start : start + TOGETHER], told)
            parts.append(draw_population(source.vae, x, covariates))
            libraries.append(observed_library(x)[:, 0].cpu().numpy())
    return join_populations(parts), np.concatenate(libraries)


def _read(
    source: Source, reader: CountsReader, rows: np.ndarray, told: dict[str, np.ndarray]
) -> tuple[Counts, Covariates]:
    x = counts_of([reader.read(row, row + 1) for row in rows.tolist()], len(source.facts["genes"]))
    values = {name: torch.from_numpy(column[rows]) for name, column in told.items()}
    covariates = source.columns.covariates(values, source.device)
    return (x if source.device.type == "cpu" else dense(x, torch.float32).to(source.device)), covariates


def _choose(rows: np.ndarray, samples: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Return at most so many of these cells' rows, ascending, of every sample its share."""
    names, codes = np.unique(samples[rows], return_inverse=True)
    taken = shares(np.bincount(codes, minlength=len(names)), most)
    return np.sort(
        np.concatenate([generator.choice(rows[codes == code], size, replace=False) for code, size in enumerate(taken)])
    )
