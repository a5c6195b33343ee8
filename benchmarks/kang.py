"""Our model beside scvi-tools' SCVI on the cohort of Kang et al. 2018, in one process: `make bench-kang`.

16 batches (8 donors x 2 conditions), the 2,000 genes most variable over them out of those detected in both
conditions. Same cells, genes, epochs, batch size and KL warm-up for both (scvi-tools' own would end at a weight of
0.1), NB likelihood, constant learning rates: scvi-tools' default and twice as much. A tenth of the cells is for
testing: neither trained on nor validated on. Test ELBO: scvi-tools' own evaluator for both, our weights copied over.
ARI and NMI: Leiden against the published cell types, the best over the same resolutions. Reads
kang_ifnb_13999/kang_ifnb_13999.h5ad in the folder that COHORTVI_TEST_DATA names.
"""

import argparse
import itertools
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
import yaml
from cohorts import read_kang, write_shards
from scvi_weights import SAME, to_scvi_state
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cohortvi.config import EarlyStopping, Model
from cohortvi.inference.schedule import REFERENCE_BATCH
from cohortvi.inference.train import fit
from cohortvi.store.opening import open_counts
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
RESOLUTIONS = np.round(np.arange(0.2, 2.01, 0.2), 1)


def agreement(latent_nk: np.ndarray, labels: pd.Series) -> tuple[float, float]:
    """Return the best ARI and the best NMI of Leiden clusters with the labels over RESOLUTIONS."""
    graph = ad.AnnData(obs=pd.DataFrame(index=labels.index), obsm={"X": latent_nk})
    sc.pp.neighbors(graph, use_rep="X", transformer="sklearn", random_state=0)
    found = []
    for resolution in RESOLUTIONS:
        sc.tl.leiden(graph, resolution, flavor="igraph", n_iterations=2, directed=False, random_state=0)
        clusters = graph.obs["leiden"]
        found.append((adjusted_rand_score(labels, clusters), normalized_mutual_info_score(labels, clusters)))
    return max(ari for ari, _ in found), max(nmi for _, nmi in found)


def judge(model, cells: ad.AnnData, test: np.ndarray) -> dict[str, float]:
    """Return the test cells' ELBO (nats per cell, mean of three draws), ARI and NMI of what lies in an SCVI model."""
    model.module.eval()
    elbo = np.mean([float(model.get_elbo(indices=test, batch_size=1024)) for _ in range(3)])
    ari, nmi = agreement(model.get_latent_representation(batch_size=1024), cells.obs["cell_type"])
    return {"test ELBO": elbo, "ARI": ari, "NMI": nmi}


def train_scvi(cells: ad.AnnData, split: list[np.ndarray], settings: Model, seed: int):
    """Return scvi-tools' model after all epochs; `split`: the rows to train on, to validate on and to test on."""
    import scvi

    scvi.settings.seed = seed
    model = scvi.model.SCVI(cells, gene_likelihood="nb")
    warmup = round(settings.kl_warmup * settings.max_epochs)
    model.train(
        max_epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"lr": settings.learning_rate, "n_epochs_kl_warmup": warmup},
        datasplitter_kwargs={"external_indexing": split},
    )
    return model


def main() -> None:
    """Train both with every rate and seed; print a row a run, then means and spreads."""
    import scvi

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"]
    every_epoch = EarlyStopping(patience=1.0, min_delta=0.0)
    # No warm-up, decay or clipping, which scvi-tools has not: what is compared are the models, not the schedules.
    plain = {"batch_size": REFERENCE_BATCH, "learning_rate_warmup": 0.0, "learning_rate_decay": 0.0, "clip": None}
    plain |= {"kl_warmup": 0.5, "max_epochs": arguments.epochs, "min_steps": 0, "early_stopping": every_epoch}
    plain |= {"device": "cpu"} | SAME
    defaults = replace(build(Model, values), **plain)
    cells = read_kang()
    scvi.model.SCVI.setup_anndata(cells, batch_key="sample")
    test = np.sort(np.random.default_rng(0).permutation(cells.n_obs)[: cells.n_obs // 10])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train, validation = write_shards(cells[np.setdiff1d(np.arange(cells.n_obs), test)], Path(folder))
        names = [np.concatenate([open_counts(path).obs.index for path in paths]) for paths in (train, validation)]
        split = [*(np.flatnonzero(cells.obs_names.isin(found)) for found in names), test]
        print(f"cells to train on, validate on and test on: {[len(part) for part in split]}", flush=True)
        for rate, seed in itertools.product(arguments.learning_rates, arguments.seeds):
            settings = replace(defaults, learning_rate=rate)
            model = train_scvi(cells, split, settings, seed)
            rows.append({"learning rate": rate, "model": "scvi-tools 1.4.2", "seed": seed, **judge(model, cells, test)})
            print(rows[-1], flush=True)
            saved = Path(folder) / f"checkpoints-{rate}-{seed}"
            vae, _, _ = fit(
                train, validation, settings, sheet={}, seed=seed, checkpoints=saved, threads=arguments.threads
            )
            model.module.load_state_dict(to_scvi_state(vae), strict=False)
            rows.append({"learning rate": rate, "model": "cohortvi", "seed": seed, **judge(model, cells, test)})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.round(3).to_markdown(index=False))
    spread = table.drop(columns="seed").groupby(["learning rate", "model"]).agg(["mean", "std"])
    print(spread.round(3).to_markdown())


if __name__ == "__main__":
    main()
