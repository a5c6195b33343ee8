"""Differential expression where the changes are known, beside scvi-tools': `make bench-differential`.

8,000 simulated cells of 5 types and 8 donors, 2,000 genes, half of each donor's cells treated. Treatment changes a
tenth of the genes, up or down, of every type alike, by 0.5 to 2 (log2). Both models are trained with their defaults,
NB, on all cells; both compare treated and untreated cells within each type, delta 0.25, at an expected FDR of 0.05,
change mode. A gene that is called is false if its true fold change, of fractions, is not above delta; power: the
share called of the genes whose true change is above 0.5 and that have at least 0.1 UMI in a cell. What scvi-tools
finds is kept in peers.json.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import yaml
from cohorts import quiet, write_shards
from peers import once

from cohortvi.atlas.differential import differential
from cohortvi.config import Comparison, Differential, Model
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.train import fit
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
N_CELLS, N_GENES, TYPES, DONORS = 8_000, 2_000, 5, 8
DELTA, FDR = 0.25, 0.05


def simulate(seed: int) -> tuple[ad.AnnData, np.ndarray, np.ndarray]:
    """Return cells, the true log2 fold changes of fractions (types, g), and mean UMI a cell (types, g)."""
    r = np.random.default_rng(seed)
    type_n, donor_n, treated_n = (
        r.integers(TYPES, size=N_CELLS),
        r.integers(DONORS, size=N_CELLS),
        r.random(N_CELLS) < 0.5,
    )
    base_tg = np.exp(r.normal(0, 1.5, N_GENES) + r.normal(0, 0.6, (TYPES, N_GENES)))
    effect_g = np.where(r.random(N_GENES) < 0.1, r.choice([-1, 1], N_GENES) * r.uniform(0.5, 2, N_GENES), 0.0)
    donor_dg = np.exp(r.normal(0, 0.2, (DONORS, N_GENES)))
    mean_ng = base_tg[type_n] * donor_dg[donor_n] * np.exp2(effect_g * treated_n[:, None])
    mean_ng /= mean_ng.sum(1, keepdims=True)
    depth_n1 = 2500 * np.exp(r.normal(0, 0.4, (N_CELLS, 1)))
    theta_g = np.exp(r.normal(0.7, 0.5, N_GENES))
    x = sp.csr_matrix(r.poisson(depth_n1 * mean_ng * r.gamma(theta_g, 1 / theta_g, mean_ng.shape)).astype(np.float32))
    fractions = [base_tg / base_tg.sum(1, keepdims=True), base_tg * np.exp2(effect_g)]
    fractions[1] /= fractions[1].sum(1, keepdims=True)
    obs = pd.DataFrame({"sample": donor_n, "type": type_n, "arm": np.where(treated_n, "treated", "control")}, dtype=str)
    obs.index = [f"cell{i}" for i in range(N_CELLS)]
    obs["sample"] = obs["sample"].astype("category")
    cells = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]))
    return cells, np.log2(fractions[1] / fractions[0]), 2500 * fractions[0]


def ours(cells: ad.AnnData, model: Model, seed: int) -> dict[str, np.ndarray]:
    """Return {type: genes called}, by this project."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = write_shards(cells, folder)
        vae, _, facts = fit(*splits, model, sheet={}, seed=seed, checkpoints=folder / "checkpoints", threads=1)
        save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
        donors = list(cells.obs["sample"].cat.categories)
        table = pd.concat([cells.obs[cells.obs["sample"] == donor] for donor in donors])
        wanted = {"arm": Comparison("arm", "treated", "control", "type")}
        settings = Differential(wanted, "sample", cells=1000, pairs=5000, delta=DELTA, fdr=FDR)
        counts = [folder / f"{donor}.json" for donor in donors]
        common = {"sheet": {}, "seed": seed, "threads": 1, "chunk_cells": 1000}
        found = differential(folder / "model.safetensors", counts, table, settings, **common)
    return {kind: rows.loc[rows["is_changed"], "gene"].to_numpy() for kind, rows in found.groupby("stratum")}


def theirs(cells: ad.AnnData, seed: int) -> dict[str, np.ndarray]:
    """Return {type: genes called}, by scvi-tools."""
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(cells, batch_key="sample")
    model = scvi.model.SCVI(cells, gene_likelihood="nb")
    model.train(accelerator="cpu", enable_progress_bar=False)
    called = {}
    for kind in sorted(set(cells.obs["type"])):
        groups = [(cells.obs["type"] == kind) & (cells.obs["arm"] == arm) for arm in ("treated", "control")]
        found = model.differential_expression(
            idx1=groups[0].to_numpy(),
            idx2=groups[1].to_numpy(),
            mode="change",
            delta=DELTA,
            fdr_target=FDR,
            silent=True,
        )
        called[kind] = found.index[found[f"is_de_fdr_{FDR}"]].to_numpy()
    return called


def judge(called: dict[str, np.ndarray], lfc_tg: np.ndarray, mean_tg: np.ndarray) -> dict[str, float]:
    """Return false discovery proportion and power, means over types."""
    rates = []
    for kind, names in called.items():
        genes = np.array([int(name.removeprefix("gene")) for name in names], int)
        lfc_g, mean_g = np.abs(lfc_tg[int(kind)]), mean_tg[int(kind)]
        wanted = np.flatnonzero((lfc_g > 0.5) & (mean_g >= 0.1))
        rates.append(((lfc_g[genes] <= DELTA).mean() if len(genes) else 0.0, np.isin(wanted, genes).mean(), len(genes)))
    return dict(zip(("fdr", "power", "called"), np.mean(rates, axis=0), strict=True))


def their_rates(cells: ad.AnnData, seed: int, lfc_tg: np.ndarray, mean_tg: np.ndarray) -> dict[str, float]:
    """Return what the genes that scvi-tools calls are worth."""
    return judge(theirs(cells, seed), lfc_tg, mean_tg)


def main() -> None:
    """Print a row a run."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"]
    model = replace(build(Model, values), device="cpu")
    for seed in arguments.seeds:
        cells, lfc_tg, mean_tg = simulate(seed)
        print({"who": "cohortvi", "seed": seed, **judge(ours(cells, model, seed), lfc_tg, mean_tg)}, flush=True)
        if not arguments.only_ours:
            rates = once(f"differential {seed}", "scvi-tools", partial(their_rates, cells, seed, lfc_tg, mean_tg))
            print({"who": "scvi-tools", "seed": seed, **rates}, flush=True)


if __name__ == "__main__":
    main()
