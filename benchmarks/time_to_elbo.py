"""How soon our model is as good as scvi-tools' SCVI at its end, and how good it is at its own: `make bench-elbo`.

Both with their defaults, on one thread, from the same training cells. A tenth of a cohort's cells is for testing:
neither trained on nor validated on; of the others a tenth is our validation set, on which scvi-tools does not train
either. Judged by scvi-tools' own evaluators, our weights copied over: the ELBO of the test cells (mean of three draws),
and log p(x) by importance sampling (1,000 draws) of 500 of them. Time is that of the processor: training with all that
belongs to it, validation included, the judging excluded. Runs of scvi-tools are kept in peers.json. Reads real cohorts
in the folder that COHORTVI_TEST_DATA names.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
from cohorts import COHORTS, quiet, write_shards
from peers import once
from scvi_weights import elbo_by_scvi, to_scvi_state

from cohortvi.config import Model
from cohortvi.inference import train
from cohortvi.inference.prepare import prepare
from cohortvi.store.opening import open_counts
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
JUDGED = 500  # test cells whose log p(x) is estimated
DRAWS = 1000


def judge(model: Any, test: np.ndarray, *, marginal: bool) -> dict[str, float]:
    """Return what scvi-tools finds of the model's test cells: nats per cell."""
    found = {"elbo": elbo_by_scvi(model, test)}
    if marginal:
        cells = test[:: max(1, len(test) // JUDGED)][:JUDGED]
        options = {"n_mc_samples": DRAWS, "n_mc_samples_per_pass": 10, "batch_size": 500}
        found["log_likelihood"] = float(model.get_marginal_ll(indices=cells, **options))
    return found


def new_scvi(cells: ad.AnnData, seed: int, **options: Any) -> Any:
    """Return an untrained SCVI of scvi-tools."""
    import scvi

    scvi.settings.seed = seed
    return scvi.model.SCVI(cells, **options)


def scvi_run(cells: ad.AnnData, split: list[np.ndarray], seed: int) -> dict[str, float]:
    """Train scvi-tools' model with its defaults; return seconds of processor time and what it is worth."""
    model = new_scvi(cells, seed)
    began = time.process_time()
    model.train(accelerator="cpu", enable_progress_bar=False, datasplitter_kwargs={"external_indexing": split})
    seconds = time.process_time() - began
    return {"seconds": seconds} | judge(model, split[2], marginal=True)


def our_epochs(
    cells: ad.AnnData, shards: tuple[list[Path], list[Path]], test: np.ndarray, model: Model, seed: int
) -> Iterator[dict[str, float]]:
    """Train our model; yield epoch, seconds of processor time so far and the test ELBO, and at the end the last row."""
    began = time.process_time()
    setup, run = prepare(*shards, model, sheet={}, seed=seed, threads=1)
    seconds = time.process_time() - began
    judged = new_scvi(cells, 0, gene_likelihood=model.likelihood, encode_covariates=model.encode_covariates)
    if list(setup.columns.batches) != list(cells.obs["sample"].cat.categories):
        raise ValueError("our batches are not in scvi-tools' order: our weights would be judged with others' batches")
    while not run.finished:
        began = time.process_time()
        for minibatch in run.minibatches():
            train.take_step(setup, run, minibatch)
        train.close_epoch(setup, run, train.validate(setup, run, lambda: None))
        seconds += time.process_time() - began
        judged.module.load_state_dict(to_scvi_state(run.vae), strict=False)
        yield {"epoch": len(run.history), "seconds": seconds} | judge(judged, test, marginal=False)
    vae, _, _ = train.result(setup, run)
    judged.module.load_state_dict(to_scvi_state(vae), strict=False)
    last = {"epoch": run.best_epoch, "seconds": seconds, "validation_elbo": run.best_elbo}
    yield last | judge(judged, test, marginal=True)


def compare(name: str, seeds: list[int], model: Model) -> Iterator[dict[str, Any]]:
    """Yield a row for each seed: both models' ELBO, log likelihood and seconds, and ours to scvi-tools' ELBO."""
    import scvi

    cells = COHORTS[name]()
    scvi.model.SCVI.setup_anndata(cells, batch_key="sample")
    test = np.sort(np.random.default_rng(0).permutation(cells.n_obs)[: cells.n_obs // 10])
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(cells[np.setdiff1d(np.arange(cells.n_obs), test)], Path(folder))
        names = [np.concatenate([open_counts(path).obs.index for path in paths]) for paths in shards]
        split = [*(np.flatnonzero(cells.obs_names.isin(found)) for found in names), test]
        for seed in seeds:
            theirs = once(f"time_to_elbo {name} {seed}", "scvi-tools", partial(scvi_run, cells, split, seed))
            *epochs, last = our_epochs(cells, shards, test, model, seed)
            reached = [row["seconds"] for row in epochs if row["elbo"] >= theirs["elbo"]]
            yield {
                "cohort": name,
                "seed": seed,
                **{f"scvi_{key}": value for key, value in theirs.items()},
                **{f"our_{key}": last[key] for key in theirs},
                "epochs": len(epochs),
                "our_validation_elbo": last["validation_elbo"],
                "seconds_to_elbo": min(reached, default=float("nan")),
                "ratio": theirs["seconds"] / min(reached, default=float("nan")),
            }


def main() -> None:
    """Print a row a run, then the means over seeds."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", nargs="+", default=["kang", "covid", "S"], choices=COHORTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than config.yaml's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"] | {"device": "cpu"}
    changes = {name: yaml.safe_load(value) for name, value in (text.split("=") for text in arguments.set)}
    model = build(Model, values | changes)
    rows = []
    for name in arguments.cohorts:
        for row in compare(name, arguments.seeds, model):
            rows.append(row)
            print(json.dumps(row | changes), flush=True)
    print(pd.DataFrame(rows).groupby("cohort").mean().round(2).T.to_markdown())


if __name__ == "__main__":
    main()
