"""What a model with labels says of cells without one, and how well its probabilities are calibrated.

    p(y | x) = E_q(z | x)[p(y | z)],   p(y | z) = p(z, y) / sum_y' p(z, y')

n cells, l labels, s draws.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cohortvi.inference.posteriors import Posterior
from cohortvi.inference.vae import VAE

DRAWS = 32  # of each cell's posterior, the same for all cells
BINS = 15  # of the confidence, as in Guo et al. 2017


@torch.no_grad()
def label_probabilities(vae: VAE, qz: Posterior) -> Tensor:
    """Return p(y | x) of each cell by draws of its posterior, (n, l)."""
    noise_snk = torch.randn(DRAWS, 1, vae.n_dimensions, generator=torch.Generator().manual_seed(0)).to(vae.device)
    draws = (qz.draw(noise_nk)[0] for noise_nk in noise_snk)
    return sum(vae.log_label(z_nk).exp() for z_nk in draws) / DRAWS


class Calibration(NamedTuple):
    """How often the likeliest label is right, and how far from it the probabilities say it is."""

    accuracy: float
    confidence: float  # mean probability of the likeliest label
    error: float  # expected calibration error
    bins: list[dict[str, float]]  # cells, confidence and accuracy of every bin that has cells


def calibration(confidence_n: np.ndarray, is_right_n: np.ndarray) -> Calibration:
    """Return how the probability of each cell's likeliest label agrees with how often this label is the true one.

    The expected calibration error is the mean over cells of |accuracy - confidence| of their bin, bins being of equal
    width in confidence (Guo, Pleiss, Sun, Weinberger 2017, equation 3).
    """
    bin_n = np.minimum((confidence_n * BINS).astype(int), BINS - 1)
    bins = [
        {
            "cells": int((bin_n == at).sum()),
            "confidence": float(confidence_n[bin_n == at].mean()),
            "accuracy": float(is_right_n[bin_n == at].mean()),
        }
        for at in np.unique(bin_n)
    ]
    error = sum(row["cells"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(is_right_n)
    return Calibration(float(is_right_n.mean()), float(confidence_n.mean()), error, bins)
