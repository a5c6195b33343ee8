"""New batches mapped onto a model that has not seen them, on published cohorts: `make bench-mapping`.

Some batches are left out, a reference is trained on the others with the defaults, and the left-out ones are mapped onto
it: as it is, by surgery, and, to compare, with a model trained anew on all batches. Of the left-out batches' held-out
cells: ELBO, nats per cell, the same noise for all; share of their cell types that the 15 nearest cells of the other
batches in the latent space tell (Kang alone has types); processor seconds of the training, each on one thread.
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
from cohorts import COHORTS, write_shards
from sklearn.neighbors import KNeighborsClassifier

from cohortvi.config import Model, Reference
from cohortvi.inference.checkpoint import load_model, save_model
from cohortvi.inference.networks import Covariates
from cohortvi.inference.train import fit
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
LEFT_OUT = {
    "kang": ("107-ctrl", "107-stim", "1244-ctrl", "1244-stim"),
    "covid": ("nCoV_PBMC_16", "nCoV_PBMC_17"),
}


def train(shards: tuple[list[Path], list[Path]], model: Model, folder: Path) -> tuple[float, dict]:
    """Train a model and write it; return the processor seconds it took, and its facts."""
    began = time.process_time()
    vae, _, facts = fit(*shards, model, sheet={}, seed=0, checkpoints=folder / "checkpoints", threads=1)
    save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
    return time.process_time() - began, facts


@torch.no_grad()
def places(cells: ad.AnnData, folder: Path) -> np.ndarray:
    """Return the posterior means of cells by a model, told their batches if it asks for them, (n, k)."""
    vae, facts = load_model(folder / "model.safetensors")
    codes = pd.Index(facts["batches"]).get_indexer(cells.obs["sample"].astype(str)).clip(0)
    x_ng = torch.from_numpy(cells[:, facts["genes"]].X.toarray())
    return vae.encode(x_ng, Covariates(torch.from_numpy(codes))).loc_nk.numpy()


def told_types(cells: ad.AnnData, is_new: np.ndarray, folder: Path) -> float:
    """Return the share of the new cells whose type the nearest of the others tell."""
    if "cell_type" not in cells.obs:
        return float("nan")
    types, z_nk = cells.obs["cell_type"].astype(str).to_numpy(), places(cells, folder)
    return float(KNeighborsClassifier(15).fit(z_nk[~is_new], types[~is_new]).score(z_nk[is_new], types[is_new]))


def measure(name: str, model: Model) -> pd.DataFrame:
    """Return a row for each way to place the left-out batches of a cohort."""
    cells = COHORTS[name]()
    is_new = cells.obs["sample"].isin(LEFT_OUT[name]).to_numpy()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        parts = {"old": cells[~is_new], "new": cells[is_new], "all": cells}
        shards = {part: write_shards(found, root / part) for part, found in parts.items()}
        for is_told in (False, True):
            plain = replace(model, encode_covariates=is_told)
            base, whole = root / f"reference-{is_told}", root / f"whole-{is_told}"
            train(shards["old"], plain, base)
            seconds, _ = train(shards["all"], plain, whole)
            ways = {"as it is": (base, False, 0.0), "surgery": (base, True, 0.0), "anew": (whole, False, seconds)}
            for way, (known, surgery, before) in ways.items():
                out = root / f"{way}-{is_told}"
                mapped = replace(plain, reference=Reference(str(known), surgery), kl_warmup=0.0)
                took, facts = train(shards["new"], mapped, out)
                row = {"cohort": name, "encoder told": is_told, "placed": way, "ELBO": facts["best_validation_elbo"]}
                row |= {"types told": told_types(cells, is_new, out), "seconds": took + before}
                rows.append(row | {"trained": facts["reference"]["n_trained"] or facts["n_parameters"] * (before > 0)})
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table."""
    logging.getLogger("cohortvi").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", nargs="+", choices=sorted(LEFT_OUT), default=list(LEFT_OUT))
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    model = replace(build(Model, config["models"]["nb"]), device="cpu")
    if arguments.epochs:
        model = replace(model, max_epochs=arguments.epochs, min_steps=0)
    print(pd.concat([measure(name, model) for name in arguments.cohorts]).round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
