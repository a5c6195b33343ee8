"""What steps gave, in sums over their cells: asked of a GPU for many steps at once, since to ask is to wait for it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cohortvi.inference import ranks

TOGETHER = {"cpu": 1, "cuda": 32}  # steps that are looked at at once, by type of device
NAMES = ("loss", "reconstruction", "kl")


class Noted(NamedTuple):
    """A step, as an error tells of it."""

    step: int
    rows: np.ndarray  # of the shards
    n_obs: int  # of all ranks
    kl_weight: float


class Terms:
    """ELBO terms of steps that were not looked at yet, and of the last one that was."""

    def __init__(self, together: int):
        """`together`: steps that are looked at at once."""
        self.together = together
        self.waiting: list[tuple[Noted, Tensor]] = []
        self.last: dict[str, float] = {}

    def add(self, noted: Noted, terms_3: Tensor, sums: dict[str, float]) -> None:
        """Take a step's sums of NAMES, (3,), to be added to `sums` by the time that `settle` returns, if not now.

        Errors: as `settle`.
        """
        self.waiting.append((noted, terms_3))
        if len(self.waiting) == self.together:
            self.settle(sums)

    def settle(self, sums: dict[str, float]) -> None:
        """Add the terms of all steps noted to `sums`, those of all ranks, with their cells.

        Errors: ValueError with step, rows and both terms of the first step at which they are not finite.
        """
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        found = ranks.total(torch.cat([terms_3 for _, terms_3 in waiting]).tolist())
        for at, (noted, _) in enumerate(waiting):
            self.last = {"cells": noted.n_obs} | dict(zip(NAMES, found[3 * at : 3 * at + 3], strict=True))
            _check(noted, self.last)
            for name, value in self.last.items():
                sums[name] += value

    def line(self) -> str:
        """Return the means of the last step that was looked at, as a line."""
        return "  ".join(f"{name} {self.last[name] / self.last['cells']:.2f}" for name in NAMES if self.last)


def _check(noted: Noted, found: dict[str, float]) -> None:
    loss, reconstruction, kl = (found[name] / noted.n_obs for name in NAMES)
    if not math.isfinite(loss + reconstruction + kl):
        raise ValueError(
            f"the loss is not finite at step {noted.step}: loss {loss}, reconstruction {reconstruction}, "
            f"kl {kl} nats per cell, kl_weight {noted.kl_weight}, rows {noted.rows.tolist()} of the "
            "shards; expected finite terms. Lower models.*.learning_rate, and look at the counts and covariates of "
            "these cells."
        )
