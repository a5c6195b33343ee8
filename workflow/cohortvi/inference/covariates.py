"""What a model is told of the cells beside their counts, and how these values become tensors.

Values come from columns of the stores' obs or, where they are the same for a whole sample, from the sheet. Categories
and moments are learnt from the training cells once, kept with the model, and used for every cell after.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cohortvi.inference.networks import Covariates
from cohortvi.store.sharded import ShardedCounts

BATCH, SAMPLE = "batch", "sample"

Sheet = Mapping[str, Mapping[str, str]]  # {column: {sample: value}}


@dataclass(frozen=True)
class Columns:
    """The batch, the categorical and the continuous covariates of a model, by name of their column.

    The model takes the covariates of a kind in the order of their names, which JSON keeps.
    """

    batches: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    continuous: dict[str, tuple[float, float]]  # mean and standard deviation over the training cells
    labels: tuple[str, ...] = ()  # what cells may be, in the order of the prior's components; not a covariate

    @property
    def names(self) -> tuple[str, ...]:
        """Every column, in the order in which the model takes them."""
        return (BATCH, *self.categories, *self.continuous)

    def covariates(self, obs: Mapping[str, Tensor], device: torch.device) -> Covariates:
        """Return the cells' covariates out of integer codes and raw continuous values, each (n,)."""
        scaled = [(obs[name].float() - mean) / std for name, (mean, std) in self.continuous.items()]
        return Covariates(
            obs[BATCH].to(device),
            tuple(obs[name].to(device) for name in self.categories),
            torch.stack(scaled, dim=1).to(device) if scaled else None,
        )

    def sheet_tables(self, sheet: Sheet, samples: Sequence[str]) -> dict[str, Tensor]:
        """Return for every column of the sheet what each of `samples` has there: codes, or raw continuous values.

        Errors: ValueError for a sample without value, a category that the model does not know, and text for a number.
        """
        tables: dict[str, Tensor] = {}
        for name, values in sheet.items():
            if name in self.categories:
                codes = [_code(self.categories[name], values, name, sample) for sample in samples]
                tables[name] = torch.tensor(codes, dtype=torch.int64)
            elif name in self.continuous:
                tables[name] = torch.tensor([number(values, name, sample) for sample in samples])
        return tables

    def recode(self, stores: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Return the code here of each code of the stores' columns, whose categories these are, where they differ.

        Errors: ValueError for a category that the model does not know.
        """
        found: dict[str, Tensor] = {}
        for name, known in {BATCH: self.batches, **self.categories}.items():
            values = stores.get(name, known)
            if tuple(values) != known:
                codes = {value: code for code, value in enumerate(known)}
                new = [value for value in values if value not in codes]
                if new:
                    raise ValueError(
                        f"{name} {', '.join(map(repr, new))} of the shards is not among the model's "
                        f"{', '.join(known)}; expected the shards that it was trained on. Train the model again."
                    )
                found[name] = torch.tensor([codes[value] for value in values])
        return found

    def beside(self, known: "Columns") -> dict[str, list[str]]:
        """Return the values of each column that `known`, whose values are the first of these, does not have."""
        found = {BATCH: list(self.batches[len(known.batches) :])}
        found |= {name: list(values[len(known.categories[name]) :]) for name, values in self.categories.items()}
        return {name: values for name, values in found.items() if values}

    def facts(self) -> dict[str, Any]:
        """Return what `from_facts` restores, JSON-able."""
        return {
            "batches": list(self.batches),
            "categories": {name: list(values) for name, values in self.categories.items()},
            "continuous": {name: list(moments) for name, moments in self.continuous.items()},
            "labels": list(self.labels),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Columns":
        """Restore the columns of a saved model."""
        return cls(
            tuple(facts["batches"]),
            {name: tuple(values) for name, values in sorted(facts["categories"].items())},
            {name: (mean, std) for name, (mean, std) in sorted(facts["continuous"].items())},
            tuple(facts["labels"]),
        )


def cells_by_value(store: ShardedCounts, columns: Columns, sheet: Sheet) -> dict[str, dict[str, int]]:
    """Return how many cells of the store have each value of the batch and of the categorical covariates, by column.

    `sheet` gives the values of its columns, by sample. Takes a pass over obs.
    """
    found = {}
    for name, known in {BATCH: columns.batches, **columns.categories}.items():
        found[name] = dict.fromkeys(known, 0)
        for value, n in cells_by_code(store, SAMPLE if name in sheet else name).items():
            found[name][sheet[name][value] if name in sheet else value] += n
    return found


def cells_by_code(store: ShardedCounts, name: str) -> dict[str, int]:
    """Return how many cells of the store have each value of a column of its obs, in the order of their codes."""
    values = store.categories[name]
    cells = np.zeros(len(values), np.int64)
    for shard, size in enumerate(store.sizes):
        cells += np.bincount(store.column(shard, name, 0, size), minlength=len(values))
    return dict(zip(values, cells.tolist(), strict=True))


def _code(known: Sequence[str], values: Mapping[str, str], name: str, sample: str) -> int:
    if values.get(sample) not in known:
        raise ValueError(
            f"sheet: {name} of sample {sample!r} is {values.get(sample)!r}; expected one of {', '.join(known)}, which "
            "the model was trained on. Correct the sheet, or train the model again."
        )
    return known.index(values[sample])


def number(values: Mapping[str, str], name: str, sample: str) -> float:
    """Return a sample's value of a continuous covariate. Errors: ValueError if it is not a finite number."""
    try:
        value = float(values.get(sample, ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"sheet: {name} of sample {sample!r} is {values.get(sample)!r}; expected a number, since "
            f"continuous_covariates names {name}. Correct the sheet, or take the column out of the model."
        )
    return value


def moments(name: str, parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return mean and standard deviation of a continuous covariate whose values come in parts.

    Parts are merged by their moments (Chan, Golub, LeVeque 1983), in float64. Errors: ValueError if all are equal.
    """
    n, mean, squares = 0, 0.0, 0.0
    for part in parts:
        values = part.astype(np.float64)
        if len(values):
            shift, total = values.mean() - mean, n + len(values)
            squares += ((values - values.mean()) ** 2).sum() + shift**2 * n * len(values) / total
            mean, n = mean + shift * len(values) / total, total
    if squares == 0:
        raise ValueError(
            f"continuous_covariates: column {name!r} is {mean} in all {n} training cells; expected values that differ. "
            "Take it out of the model."
        )
    return float(mean), float((squares / n) ** 0.5)
