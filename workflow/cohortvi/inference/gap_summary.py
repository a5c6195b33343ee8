"""What the gaps of single cells say in sum: of held-out and training cells, of samples, batches and kept columns."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cohortvi.config import Gap, Limit
from cohortvi.inference.covariates import SAMPLE
from cohortvi.inference.labels import calibration
from cohortvi.log import logger

BOUNDS = ("elbo", "elbo_mean_field", "elbo_full", "log_p_encoder", "log_p")
GAPS = ("amortization_gap", "approximation_gap", "approximation_gap_full", "inference_gap")
WEIGHTS = ("ess_encoder", "ess", "khat_encoder", "khat")
UNRELIABLE = 0.7  # k-hat of importance weights that cannot be trusted
ACTIVE = 0.01  # variance over cells of the posterior means of an active unit (Burda et al. 2016, section 5.2)
WORST = 20  # cells told by name
FEWEST = 5  # cells of a group that is told
SURE = 3.0  # standard errors
ALIKE = 50  # training cells of about as many counts, whose gaps a cell's is compared with


def summary(
    table: pd.DataFrame, curves: list[dict[str, Any]], latent: dict[str, list[float]], settings: Gap
) -> dict[str, Any]:
    """Return what gap.json holds. `table`: a row a cell, as `gap.gap` makes it. Limits are those of held-out cells."""
    table = table.assign(excess_gap=excess_gap(table))
    splits = {split: _of_cells(part) for split, part in table.groupby("split", observed=True)}
    latent = {**latent, "active_units": sum(value > ACTIVE for value in latent["variance"])}
    overfit = {
        "mean": splits["validation"]["amortization_gap"]["mean"] - splits["train"]["amortization_gap"]["mean"],
        "se": math.hypot(*(found["amortization_gap"]["se"] for found in splits.values())),
    }
    worst = table.sort_values("amortization_gap", ascending=False, kind="stable").head(WORST)
    found = {
        "splits": splits,
        "overfit": overfit,
        "bounds": curves,
        "latent": latent,
        "groups": list(_groups(table)),
        "worst": worst[["cell", SAMPLE, "split", "n_counts", "amortization_gap", "khat"]].to_dict("records"),
    }
    held_out = splits["validation"]
    odd = max((row for row in found["groups"] if row["split"] == "validation"), key=_least_excess, default=None)
    values = {
        "amortization_gap": held_out["amortization_gap"]["mean"],
        "amortization_gap_p99": held_out["amortization_gap"]["p99"],
        "encoder_overfit": overfit["mean"],
        "unreliable_share": held_out["unreliable_share"],
        "group_excess": 0.0 if odd is None else _least_excess(odd),
    }
    limits = [_judge(name, value, getattr(settings.limits, name)) for name, value in values.items()]
    if odd and limits[-1]["verdict"] != "ok":
        logger.warning("gap: that is of %s %s, %d cells", odd["column"], odd["value"], odd["cells"])
    return found | {"limits": limits}


def excess_gap(table: pd.DataFrame) -> np.ndarray:
    """Return by how much each cell's amortization gap is above the mean of training cells of about as many counts.

    The gap grows with the counts, whatever the cell. What is left is what the encoder does not know of cells like this:
    of a type that was not trained on it is large. Columns split, n_counts, amortization_gap; nats, (n,).
    """
    training = table[table["split"] == "train"].sort_values("n_counts", kind="stable")
    width = min(ALIKE, len(training))
    sums = np.concatenate([[0.0], training["amortization_gap"].cumsum()])
    means = (sums[width:] - sums[:-width]) / width
    at = np.searchsorted(training["n_counts"], table["n_counts"]) - width // 2
    return table["amortization_gap"].to_numpy() - means[at.clip(0, len(means) - 1)]


def label_summary(table: pd.DataFrame, column: str, labels: Sequence[str], unknown: Sequence[str]) -> dict[str, Any]:
    """Return how the predictions agree with the labels of the held-out cells that have one, which were not trained on.

    `unknown`: values of the column that are no label to this model, though they may be to its reference. `labels` of
    what is returned: for each, cells that have it, cells predicted to, and cells of which both are true. With the
    fields of a Calibration where there are such cells.
    """
    known = table[(table["split"] == "validation") & table[column].isin(set(labels) - set(unknown))]
    is_right = known["predicted_label"] == known[column]
    found = {"column": column, "cells": len(known), "labels": []}
    for label in labels:
        is_here = known[column] == label
        row = {"label": label, "cells": int(is_here.sum()), "predicted": int((known["predicted_label"] == label).sum())}
        found["labels"].append(row | {"found": int((is_here & is_right).sum())})
    if len(known):
        found |= calibration(known["label_probability"].to_numpy(), is_right.to_numpy())._asdict()
    return found


def _of_cells(cells: pd.DataFrame) -> dict[str, Any]:
    """Return mean, its standard error over cells and quantiles of every column, and the share of unreliable weights."""
    found: dict[str, Any] = {"cells": len(cells)}
    for name in (*BOUNDS, *GAPS, *WEIGHTS):
        values = cells[name]
        spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        quantiles = {f"p{round(100 * q)}": float(values.quantile(q)) for q in (0.5, 0.9, 0.99)}
        found[name] = {"mean": float(values.mean()), "se": spread} | quantiles
    for name in ("khat_encoder", "khat"):
        found[f"unreliable_share{name.removeprefix('khat')}"] = float((cells[name] > UNRELIABLE).mean())
    return found


def _groups(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the mean gaps of every sample, batch and value of a kept text column, by split."""
    texts = [name for name in table if table[name].dtype == object and name not in ("cell", "split")]
    for column in texts:
        for (split, value), cells in table.groupby(["split", column], observed=True, sort=True):
            if len(cells) >= FEWEST:
                row = {"column": column, "value": value, "split": split, "cells": len(cells)}
                row |= {name: float(cells[name].mean()) for name in ("elbo", "log_p", *GAPS, "ess", "excess_gap")}
                row["excess_se"] = float(cells["excess_gap"].std(ddof=1)) / math.sqrt(len(cells))
                yield row | {"unreliable_share": float((cells["khat"] > UNRELIABLE).mean())}


def _least_excess(group: dict[str, Any]) -> float:
    """Return what the excess gap of a group's cells is at least: its mean less SURE standard errors."""
    return group["excess_gap"] - SURE * group["excess_se"]


def _judge(name: str, value: float, limit: Limit) -> dict[str, Any]:
    """Return the verdict on a value: ok, warn or fail."""
    verdict = "ok"
    for word, bound in (("warn", limit.warn), ("fail", limit.fail)):
        verdict = word if bound is not None and value > bound else verdict
    if verdict != "ok":
        logger.warning("gap: %s of held-out cells is %.3f, beyond gap.limits (%s)", name, value, verdict)
    return {"name": name, "found": value, "warn": limit.warn, "fail": limit.fail, "verdict": verdict}
