"""How far the posterior can be trusted on Kang et al. 2018, and on a cell type that was left out: `make bench-gap`.

Two models with the defaults: one trained on all types, one on all but one. Rule gap's measures of 1,000 held-out and
1,000 training cells, or of held-out and left-out cells, by cell type: nats per cell, medians over cells of the
effective sample size (of 1,000 draws of the encoder). Below each table stand the types nearest to what rule gap's
group_excess warns of: a gap of held-out cells above that of training cells with as many counts. Reads kang_ifnb_13999
in the folder that COHORTVI_TEST_DATA names.
"""

import argparse
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
from cohorts import read_kang, write_samples, write_shards

from cohortvi.config import Gap, Model
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.gap import gap
from cohortvi.inference.gap_summary import FEWEST, SURE, excess_gap
from cohortvi.inference.train import fit
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
SHOWN = ["elbo", "amortization_gap", "excess_gap", "approximation_gap", "ess_encoder", "khat_encoder"]


def measure(cells: ad.AnnData, trained: np.ndarray, held_out: np.ndarray, model: Model, settings: Gap) -> pd.DataFrame:
    """Train on some cells; return rule gap's table of the held-out ones and as many of the others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = write_shards(cells[trained], folder / "trained")
        others = write_shards(cells[held_out], folder / "held_out")
        common = {"sheet": {}, "seed": 0, "threads": torch.get_num_threads()}
        vae, _, facts = fit(*splits, model, checkpoints=folder / "checkpoints", **common)
        save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
        began = time.perf_counter()
        found, _ = gap(
            folder / "model.safetensors",
            {"train": splits[0], "validation": [path for paths in others for path in paths]},
            write_samples(cells, folder / "all"),
            settings,
            **common,
        )
        print(f"{len(found)} cells in {time.perf_counter() - began:.0f} s")
    return found.assign(excess_gap=excess_gap(found))


def show(found: pd.DataFrame, title: str, limit: float) -> None:
    """Print means by cell type, medians of the sample size, and the types of an excess beyond the limit."""
    means = found.groupby(["split", "cell_type"], sort=True)[SHOWN].mean()
    means["ess_encoder"] = found.groupby(["split", "cell_type"], sort=True)["ess_encoder"].median()
    means.insert(0, "cells", found.groupby(["split", "cell_type"], sort=True).size())
    print(f"\n{title}\n{means.round(2).to_markdown()}")
    by_type = found[found["split"] == "validation"].groupby("cell_type", sort=True)["excess_gap"]
    least = (by_type.mean() - SURE * by_type.std() / by_type.size() ** 0.5)[by_type.size() >= FEWEST]
    told = ", ".join(f"{name} {value:.2f}" for name, value in least.nlargest(3).items())
    print(f"least excess, warned of beyond {limit}: {told}", flush=True)


def main() -> None:
    """Print both tables."""
    logging.getLogger("cohortvi").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left-out", default="CD14 Mono")
    arguments = parser.parse_args()
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    model = replace(build(Model, config["models"]["nb"]), device="cpu")
    settings = build(Gap, config["gap"])
    limit = settings.limits.group_excess.warn
    cells = read_kang()
    cells.obs["row"] = np.arange(cells.n_obs)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
    is_test = np.random.default_rng(0).random(cells.n_obs) < 0.15
    found = measure(cells, np.flatnonzero(~is_test), np.flatnonzero(is_test), model, settings)
    show(found, "All types trained on", limit)
    is_left = (cells.obs["cell_type"] == arguments.left_out).to_numpy()
    found = measure(cells, np.flatnonzero(~is_test & ~is_left), np.flatnonzero(is_test | is_left), model, settings)
    show(found, f"{arguments.left_out} left out of training", limit)


if __name__ == "__main__":
    main()
