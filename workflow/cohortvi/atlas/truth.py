"""What was recovered of a simulated cohort's truth: cell types, doublets, dying cells, effects of batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from cohortvi.files import read_table
from cohortvi.inference.networks import Covariates
from cohortvi.inference.vae import VAE

EFFECT_CELLS = 1_000


def read_truth(paths: Sequence[Path]) -> pd.DataFrame:
    """Return the simulated cells of all samples; index sample_barcode, columns cell_type, doublet, dying ..."""
    return pd.concat([read_table(path) for path in paths])


def true_types(truth: pd.DataFrame, names: pd.Index) -> pd.Series:
    """Return the simulated type of the named cells, "" for doublets, which have two."""
    known = truth.loc[names]
    return known["cell_type"].astype(str).where(~known["doublet"], "")


def doublets_found(truth: pd.DataFrame, cells: pd.DataFrame) -> dict[str, float | int | None]:
    """Return precision, recall and AUC of the doublet calls over all cells that were scored."""
    scored = cells[cells["doublet_score"].notna()]
    true, called = truth.loc[scored.index, "doublet"].to_numpy(), scored["predicted_doublet"].to_numpy()
    hits = int((true & called).sum())
    return {
        "n_true": int(true.sum()),
        "n_called": int(called.sum()),
        "precision": hits / int(called.sum()) if called.any() else None,
        "recall": hits / int(true.sum()) if true.any() else None,
        "auc": float(roc_auc_score(true, scored["doublet_score"])) if 0 < true.sum() < len(true) else None,
    }


def dying_removed(truth: pd.DataFrame, reasons: pd.Series) -> dict[str, int]:
    """Return how many dying cells the good samples had, and how many of them QC removed."""
    dying = truth.loc[reasons.index, "dying"].to_numpy() & ~truth.loc[reasons.index, "failed"].to_numpy()
    return {"n_true": int(dying.sum()), "n_removed": int((dying & (reasons != "").to_numpy()).sum())}


def quarantined(truth: pd.DataFrame, cells: pd.DataFrame) -> dict[str, list[str]]:
    """Return the samples that were simulated as failed, and those of which QC kept no cell."""
    samples = pd.Series([name.rsplit("_", 1)[0] for name in cells.index], index=cells.index)
    failed, kept = truth.loc[cells.index, "failed"].to_numpy(), (cells["reason"] == "").to_numpy()
    return {
        "failed": sorted(samples[failed].unique()),
        "quarantined": sorted(set(samples) - set(samples[kept])),
    }


def batch_effects(
    vae: VAE, latent_nk: np.ndarray, batches: Sequence[str], effects: Mapping[str, np.ndarray]
) -> dict | None:
    """Return the log fold change of each gene between the first and the last batch: as decoded and as simulated.

    `latent_nk` (n, k): the first EFFECT_CELLS of them are decoded as if of either batch; `batches`: the model's;
    `effects`: mean log effect (g,) of each of the cohort's on the model's genes. None if the model knows one of them,
    or further covariates, whose effects could not be told apart.
    """
    here = [batch for batch in batches if batch in effects]  # a reference may know others
    if len(here) < 2 or vae.settings["n_categories"] or vae.settings["n_continuous"]:
        return None
    z_nk = torch.as_tensor(latent_nk[:EFFECT_CELLS])
    logs = []
    for code in (batches.index(here[0]), batches.index(here[-1])):
        covariates = Covariates(torch.full((len(z_nk),), code), (), None)
        with torch.inference_mode():
            logs.append(vae.decode(z_nk, torch.ones(len(z_nk), 1), covariates).log_px_rate_ng.double().mean(0).numpy())
    true, estimated = effects[here[-1]] - effects[here[0]], logs[1] - logs[0]
    # The shares of a cell sum to one, so a shift common to all genes is no effect.
    true, estimated = true - true.mean(), estimated - estimated.mean()
    return {
        "batches": [here[0], here[-1]],
        "correlation": float(np.corrcoef(true, estimated)[0, 1]),
        "true": true.tolist(),
        "estimated": estimated.tolist(),
    }
