"""log p(x) of every cell of a cohort by importance sampling, with the encoder's posterior as proposal.

    log p(x) ~ log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x),   z_s ~ q(z | x)

(inference/bounds.py). The estimate lies below log p(x) in expectation, by about half its squared Monte Carlo error;
where the effective sample size is but a few draws, neither it nor the error can be trusted. All in nats.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cohortvi.files import write_tables
from cohortvi.inference.bounds import Importance, importance, log_weights
from cohortvi.inference.networks import Covariates
from cohortvi.inference.prepare import LIKELIHOOD
from cohortvi.inference.reading import Source
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE
from cohortvi.progress import Progress

TOGETHER = 512  # cells whose posteriors are drawn from together, at most


def marginal_log_likelihood(source: Source, draws: int, *, seed: int, chunk_cells: int) -> Iterator[pd.DataFrame]:
    """Yield a table for each counts store of the source that has cells, in order: a row a cell, by name.

    Columns: sample; log_p and its Monte Carlo error, log_p_error, of so many draws; ess, their effective sample size.
    What is found of a cell depends on (seed, sample, row) alone, up to rounding. Memory: a store's table, and a chunk.
    """
    done, samples = 0, list(source.samples)
    with Progress(source.n_obs) as progress:
        for code, reader in enumerate(source.stores()):
            if not reader.n_obs:
                continue  # without a name in it an index has no type, and parquet holds one type
            found = np.empty((3, reader.n_obs))
            for chunk in source.chunks(reader, min(chunk_cells, TOGETHER)):
                noise_snk = source.noise(reader, chunk, draws, (seed, LIKELIHOOD))
                parts = _importance(source.vae, chunk.x, chunk.covariates, noise_snk)
                found[:, chunk.start : chunk.stop] = torch.stack(list(parts)).cpu().numpy()
                progress.report(done + chunk.stop, "log p(x)")
            done += reader.n_obs
            columns = dict(zip(("log_p", "log_p_error", "ess"), found, strict=True))
            sample = pd.Categorical.from_codes(np.full(reader.n_obs, code), samples)
            yield pd.DataFrame({"sample": sample, **columns}, reader.obs.index.rename("cell"))


@torch.no_grad()
def _importance(vae: VAE, x: Counts, covariates: Covariates, noise_snk: Tensor) -> Importance:
    weights_sn = log_weights(vae.log_joint(x, covariates), vae.encode(x, covariates), noise_snk)
    return importance(weights_sn.double(), len(noise_snk))


def write_likelihood(tables: Iterable[pd.DataFrame], path: str | Path) -> dict[str, Any]:
    """Write these tables, one after the other, as the parquet `path`; return what they say by sample and in sum.

    Of each: cells; mean of log p(x), its standard error over cells, se (null of one cell); root mean square of the
    Monte Carlo errors; mean effective sample size.
    """
    found: dict[str, _Moments] = {}

    def seen() -> Iterator[pd.DataFrame]:
        for table in tables:
            found.update({str(name): _moments(cells) for name, cells in table.groupby("sample", observed=True)})
            yield table

    write_tables(seen(), path)
    samples = [{"sample": name, **_summary([moments])} for name, moments in found.items()]
    return {"samples": samples, "all": _summary(list(found.values()))}


class _Moments(NamedTuple):
    """Of some cells: number, mean of log_p; sums of its squares about it, of squared errors, of sample sizes."""

    cells: int
    mean: float
    squares: float
    errors: float
    ess: float


def _moments(cells: pd.DataFrame) -> _Moments:
    mean = float(cells["log_p"].mean())
    squares, errors = ((values**2).sum() for values in (cells["log_p"] - mean, cells["log_p_error"]))
    return _Moments(len(cells), mean, float(squares), float(errors), float(cells["ess"].sum()))


def _summary(parts: list[_Moments]) -> dict[str, Any]:
    n = sum(part.cells for part in parts)
    mean = sum(part.cells * part.mean for part in parts) / n
    squares = sum(part.squares + part.cells * (part.mean - mean) ** 2 for part in parts)
    return {
        "cells": n,
        "mean": mean,
        "se": math.sqrt(squares / (n - 1) / n) if n > 1 else None,
        "error": math.sqrt(sum(part.errors for part in parts) / n),
        "ess": sum(part.ess for part in parts) / n,
    }
