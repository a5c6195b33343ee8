"""Labels for the cells of donors without any, by our model with labels and by scANVI: `make bench-label-transfer`.

Kang et al. 2018, 8 donors, 13 cell types; a seed hides those of 4 donors at random. Both have their defaults and one
thread; scANVI (Xu et al. 2021, Molecular Systems Biology 17:e9620) begins from an SCVI trained first, as scvi-tools
advises. Judged on the hidden donors' cells: accuracy, F1 by type (their mean), expected calibration error (15 bins).
Runs of scANVI are kept in peers.json. Reads kang_ifnb_13999 in the folder that COHORTVI_TEST_DATA names.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
from cohorts import quiet, read_kang, write_shards
from peers import once
from sklearn.metrics import f1_score

from cohortvi.config import Model
from cohortvi.inference.labels import calibration, label_probabilities
from cohortvi.inference.networks import Covariates
from cohortvi.inference.train import fit
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
UNKNOWN = "NA"
TOGETHER = 2000  # cells encoded together


def hide(cells: ad.AnnData, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hide the types of half the donors; return all true types and which cells are theirs."""
    types = cells.obs["cell_type"].astype(str).to_numpy()
    donors = np.array(sorted(cells.obs["donor"].unique()))
    chosen = np.random.default_rng(seed).permutation(donors)[: len(donors) // 2]
    is_hidden = cells.obs["donor"].isin(chosen).to_numpy()
    cells.obs["cell_type"] = np.where(is_hidden, UNKNOWN, types)
    return types, is_hidden


def judge(probabilities: pd.DataFrame, types: np.ndarray) -> dict[str, float]:
    """Return what the probabilities, columns being types, are worth."""
    predicted = probabilities.idxmax(axis=1).to_numpy()
    found = calibration(probabilities.max(axis=1).to_numpy(), predicted == types)
    f1 = f1_score(types, predicted, average="macro")
    return {"accuracy": found.accuracy, "f1": float(f1), "calibration_error": found.error}


@torch.no_grad()
def ours(cells: ad.AnnData, model: Model, seed: int) -> tuple[pd.DataFrame, float]:
    """Return the probabilities of our model, and seconds of processor time to train it."""
    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(cells, Path(name))
        began = time.process_time()
        common = {"sheet": {}, "seed": seed, "checkpoints": Path(name) / "checkpoints", "threads": 1}
        with torch.enable_grad():
            vae, _, facts = fit(*shards, model, **common)
        seconds = time.process_time() - began
    batches = cells.obs["sample"].astype(str)
    batch_n, parts = torch.from_numpy(pd.Index(facts["batches"]).get_indexer(batches).astype(np.int64)), []
    for start in range(0, cells.n_obs, TOGETHER):
        x_ng = torch.from_numpy(cells.X[start : start + TOGETHER].toarray())
        qz = vae.encode(x_ng, Covariates(batch_n[start : start + TOGETHER]))
        parts.append(label_probabilities(vae, qz).numpy())
    return pd.DataFrame(np.concatenate(parts), columns=facts["labels"]), seconds


def scanvi(cells: ad.AnnData, seed: int) -> tuple[pd.DataFrame, float]:
    """Return the probabilities of scANVI, and seconds of processor time to train SCVI and it."""
    import scvi

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(cells, batch_key="sample", labels_key="cell_type")
    began = time.process_time()
    options = {"accelerator": "cpu", "enable_progress_bar": False}
    first = scvi.model.SCVI(cells)
    first.train(**options)
    model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category=UNKNOWN)
    model.train(**options)
    return model.predict(soft=True), time.process_time() - began


def compare(seed: int, model: Model) -> dict[str, float]:
    """Return what both are worth with the labels that a seed hides."""
    cells = read_kang()
    types, is_hidden = hide(cells, seed)
    found, seconds = ours(cells, model, seed)
    row = {"seed": seed, "our_seconds": seconds}
    row |= {f"our_{name}": value for name, value in judge(found[is_hidden], types[is_hidden]).items()}

    def theirs() -> dict[str, float]:
        found, seconds = scanvi(cells, seed)
        return {"seconds": seconds} | judge(found[is_hidden], types[is_hidden])

    found = once(f"label_transfer {seed}", "scvi-tools", theirs)
    return row | {f"scanvi_{name}": value for name, value in found.items()}


def main() -> None:
    """Print a row a seed, then mean and spread."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weight", type=float, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"] | {"device": "cpu"}
    labels = {"column": "cell_type", "unknown": [UNKNOWN], "weight": arguments.weight}
    model = build(Model, values | {"prior": "mixture", "prior_shrinkage": 0.0, "labels": labels})
    rows = []
    for seed in arguments.seeds:
        rows.append(compare(seed, model))
        print(json.dumps(rows[-1]), flush=True)
    print(pd.DataFrame(rows).drop(columns="seed").agg(["mean", "std"]).round(4).T.to_markdown())


if __name__ == "__main__":
    main()
