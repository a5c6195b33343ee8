"""How far a model's posterior can be trusted, cell by cell: bounds on log p(x) and the gaps between them.

For a random subset of held-out and of training cells, with the decoder fixed: the ELBO of the encoder's posterior, of
the best diagonal and of the best full-covariance Gaussian for each cell alone, and log p(x) by importance sampling with
the first and with the last of them as proposal (inference/bounds.py). All in nats per cell.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from cohortvi.config import Gap
from cohortvi.inference.bounds import importance, log_weights, refine
from cohortvi.inference.checkpoint import load_model
from cohortvi.inference.covariates import SAMPLE, Columns, Sheet
from cohortvi.inference.criticism import Statistics, by_batch, calibration_ranks, coverage, replicates, statistics
from cohortvi.inference.device import choose_device
from cohortvi.inference.gap_summary import label_summary, summary
from cohortvi.inference.labels import label_probabilities
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.prepare import GAP, seed_torch
from cohortvi.inference.reading import open_shards
from cohortvi.inference.subset import Cells, draw_cells, names_of, read_cells, to_device
from cohortvi.inference.vae import VAE
from cohortvi.progress import Progress
from cohortvi.store.names import SPLITS

TOGETHER = 512  # cells that are fitted together
DRAWS = (1, 10, 100, 1000)  # of which importance-weighted bounds are told
PROPOSALS = ("encoder", "refined")
REPLICATES = 20  # of every cell, in posterior predictive checks
RANKED, BINS = 99, 10  # posterior draws that a simulated value is ranked among, and bins of the ranks


class Bounds(NamedTuple):
    """What is found of some cells: a column of the table each, (n,), and the bounds by number of draws, (n, K)."""

    columns: dict[str, Tensor]
    encoder_nk: Tensor
    refined_nk: Tensor
    loc_nk: Tensor
    kl_nk: Tensor


def gap(
    model: str | Path,
    shards: dict[str, Sequence[Path]],
    counts: Sequence[str | Path],
    settings: Gap,
    *,
    sheet: Sheet,
    seed: int,
    threads: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a table with a row for each cell of the subset, and what it says in sum (`gap_summary.summary`).

    `shards`: manifests by split; `counts`: those of the samples, which hold the cells' names; `sheet`: as for `fit`.
    Columns: cell, split, sample, row and the other columns of obs; n_counts; elbo, elbo_mean_field, elbo_full,
    log_p_encoder, log_p and its Monte Carlo error; the three gaps; effective sample size and Pareto k-hat of both
    proposals; of a model with labels predicted_label, label_probability. Errors: ValueError for shards that the model
    was not trained on, and beyond a limit that is to fail.
    """
    torch.set_num_threads(threads)
    vae, facts = load_model(model)
    device = choose_device(facts["settings"]["device"])
    vae.to(device).requires_grad_(requires_grad=False)  # the decoder is fixed
    columns = Columns.from_facts(facts)
    tables, bounds = [], {}
    for split in SPLITS:
        store = open_shards(shards[split], facts["genes"])
        cells = read_cells(store, draw_cells(store, settings.cells, seed), columns, sheet)
        bounds[split] = _bounds(vae, cells, settings, seed, device)
        if split == "validation":
            criticism = _criticism(vae, to_device(cells, device), columns, seed)
        obs = cells.obs.assign(cell=names_of(cells.obs, counts), split=split, n_counts=cells.x.library_n.numpy())
        if columns.labels:
            obs = obs.assign(**_labels(vae, to_device(cells, device), columns.labels))
        tables.append(obs.assign(**{name: value.cpu().numpy() for name, value in bounds[split].columns.items()}))
    table = pd.concat(tables, ignore_index=True)
    first = ["cell", "split", SAMPLE, "row"]
    table = table[[*first, *(name for name in table if name not in first)]]
    curves = [row for split, found in bounds.items() for row in _curve(split, found, settings.draws)]
    held_out = bounds["validation"]
    latent = {"kl": held_out.kl_nk.mean(0).tolist(), "variance": held_out.loc_nk.var(0, correction=0).tolist()}
    found = summary(table, curves, latent, settings) | criticism
    if columns.labels:
        labels = facts["settings"]["labels"]
        found["labels"] = label_summary(table, labels["column"], columns.labels, labels["unknown"])
    _check_limits(found["limits"])
    return table, found


def _bounds(vae: VAE, cells: Cells, settings: Gap, seed: int, device: torch.device) -> Bounds:
    n, parts = len(cells.obs), []
    with Progress(n) as progress:
        for start in range(0, n, TOGETHER):
            part = to_device(cells.part(start, min(start + TOGETHER, n)), device)
            parts.append(_bounds_of(vae, part, settings, seed, start))
            progress.report(min(start + TOGETHER, n), "gap")
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Bounds(columns, *(torch.cat(values) for values in zip(*(part[1:] for part in parts), strict=True)))


def _bounds_of(vae: VAE, cells: Cells, settings: Gap, seed: int, first: int) -> Bounds:
    """Return what is found of these cells, of which `first` is the first one's number."""
    log_joint = vae.log_joint(cells.x, cells.covariates)
    seed_torch(seed, GAP, first)
    noise_snk = torch.randn(settings.draws, len(cells.obs), vae.n_dimensions, device=vae.device)
    with torch.no_grad():
        encoder = vae.encode(cells.x, cells.covariates)
        start = DiagonalGaussian(*encoder.moments(noise_snk))
    mean_field = refine(log_joint, start, is_full=False, steps=settings.steps)
    full = refine(log_joint, mean_field, is_full=True, steps=settings.steps)
    with torch.no_grad():
        weights = [log_weights(log_joint, q, noise_snk).double() for q in (encoder, mean_field, full)]
    elbo, elbo_mean_field, elbo_full = (weights_sn.mean(0) for weights_sn in weights)
    best = elbo_mean_field if isinstance(encoder, DiagonalGaussian) else elbo_full
    by_encoder, by_full = (importance(weights[at], settings.draws) for at in (0, 2))
    columns = {
        "elbo": elbo,
        "elbo_mean_field": elbo_mean_field,
        "elbo_full": elbo_full,
        "log_p_encoder": by_encoder.bound_n,
        "log_p": by_full.bound_n,
        "log_p_error": by_full.error_n,
        "inference_gap": by_full.bound_n - elbo,
        "approximation_gap": by_full.bound_n - best,
        "approximation_gap_full": by_full.bound_n - elbo_full,
        "amortization_gap": best - elbo,
        "ess_encoder": by_encoder.ess_n,
        "ess": by_full.ess_n,
        "khat_encoder": khat(weights[0]),
        "khat": khat(weights[2]),
    }
    by_draws = [torch.stack([importance(w, k).bound_n for k in _told(settings.draws)], 1) for w in weights[::2]]
    return Bounds(columns, *by_draws, start.loc_nk, start.kl_by_dimension())


@torch.no_grad()
def _labels(vae: VAE, cells: Cells, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the likeliest label of each cell and its probability."""
    probabilities_nl = label_probabilities(vae, vae.encode(cells.x, cells.covariates)).cpu()
    probability_n, code_n = probabilities_nl.max(1)
    return {"predicted_label": np.array(labels, object)[code_n.numpy()], "label_probability": probability_n.numpy()}


def _criticism(vae: VAE, cells: Cells, columns: Columns, seed: int) -> dict[str, Any]:
    """Return posterior predictive checks by batch, and the ranks of simulation-based calibration by dimension."""
    seed_torch(seed, GAP, len(cells.obs))
    observed, checks = list(by_batch(cells.x, cells.covariates.batch_n)), []
    drawn = replicates(vae, cells.x, cells.covariates, REPLICATES)
    found_rbt = torch.tensor([[statistics(x_ng[rows_m]) for _, rows_m, _ in observed] for x_ng in drawn])
    for (code, rows_m, x_mg), found_rt in zip(observed, found_rbt.unbind(1), strict=True):
        for name, value, replicated_r in zip(Statistics._fields, statistics(x_mg), found_rt.T, strict=True):
            low, high = replicated_r.quantile(torch.tensor([0.05, 0.95])).tolist()
            row = {"batch": columns.batches[code], "cells": len(rows_m), "statistic": name, "observed": float(value)}
            checks.append(row | {"replicated": float(replicated_r.mean()), "low": low, "high": high})
    ranks_nk = calibration_ranks(vae, cells.x, cells.covariates, RANKED)
    histogram = [torch.histc(rank.float(), BINS, 0, RANKED + 1).int().tolist() for rank in ranks_nk.T]
    covered = coverage(ranks_nk, RANKED)
    return {"predictive": checks, "calibration": {"draws": RANKED, "histogram": histogram, "coverage": covered}}


def khat(log_weights_sn: Tensor) -> Tensor:
    """Return the Pareto shape of the largest weights of each cell, (s, n) -> (n,): above 0.7 they cannot be trusted.

    Vehtari, Simpson, Gelman, Yao, Gabry 2024 (JMLR 25:72).
    """
    # It takes what it is for, pointwise log-likelihoods: minus the log weights of leaving an observation out.
    return torch.from_numpy(np.asarray(array_stats.psislw(-log_weights_sn.T.cpu().numpy())[1]))


def _check_limits(limits: list[dict[str, Any]]) -> None:
    beyond = [limit for limit in limits if limit["verdict"] == "fail"]
    if beyond:
        found = "; ".join(
            f"{limit['name']} is {limit['found']:.3f}, at most {limit['fail']} wanted" for limit in beyond
        )
        raise ValueError(
            f"the posterior is further from the truth than gap.limits allow: {found}. Train the model longer or with "
            "another one of models.*; look at the cells with gap.limits.*.fail: null."
        )


def _told(draws: int) -> list[int]:
    return [k for k in DRAWS if draws % k == 0]


def _curve(split: str, bounds: Bounds, draws: int) -> Iterator[dict[str, Any]]:
    """Yield the mean bound by proposal and number of draws."""
    for proposal in PROPOSALS:
        means = getattr(bounds, f"{proposal}_nk").mean(0).tolist()
        yield from (
            {"split": split, "proposal": proposal, "draws": k, "bound": mean}
            for k, mean in zip(_told(draws), means, strict=True)
        )
