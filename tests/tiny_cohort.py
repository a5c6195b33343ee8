"""A cohort of a few hundred simulated cells as counts stores and shards, for tests that train on it.

As a script it trains on such a cohort in child processes that it kills at random moments, until one ends by itself:

    python tests/tiny_cohort.py COHORT OUT --kills 3 --signal KILL --seed 0

OUT/undisturbed and OUT/killed then hold model.safetensors and model.json; the last line says how many kills hit.
"""

import argparse
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cohortvi.config import EarlyStopping, Labels, Model, Store, Validation
from cohortvi.files import write_json
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.train import fit
from cohortvi.store.counts import write_counts
from cohortvi.store.names import shard_names
from cohortvi.store.shards import write_shard

N_VARS = 30
STORE = Store(shards=2, validation=Validation(fraction=0.2, by="cell"), reshuffle=0)
MODEL = Model(
    likelihood="nb",
    dispersion="gene",
    n_latent=3,
    n_hidden=16,
    n_layers=1,
    dropout=0.1,
    categorical_covariates=("sex",),
    continuous_covariates=("age",),
    encode_covariates=False,
    coding="one_hot",
    n_embedding=3,
    library="observed",
    posterior="diagonal",
    prior="standard_normal",
    n_components=5,
    prior_shrinkage=0.3,
    labels=None,
    decoder="nonlinear",
    norm="batch",
    draws=1,
    batch_size=32,
    learning_rate=4e-3,  # 1e-3 for its small minibatches
    learning_rate_warmup=0.1,
    learning_rate_decay=0.0,
    clip=1000.0,
    weight_decay=1e-6,
    max_epochs=6,
    min_steps=0,
    kl_warmup=0.5,
    early_stopping=EarlyStopping(patience=1.0, min_delta=0.1),
    checkpoint_minutes=10.0,
    tensorboard=False,
    device="cpu",
    precision="tf32",
    graph=True,
    reference=None,
)


VARIANTS = {
    "full": {"posterior": "full", "prior": "mixture", "library": "latent", "norm": "layer"},
    "flow": {
        "posterior": "flow",
        "prior": "vamp",
        "decoder": "linear",
        "coding": "embedding",
        "encode_covariates": True,
    },
    "told": {"encode_covariates": True, "prior": "vamp", "coding": "embedding", "n_layers": 2, "posterior": "full"},
    "weighted": {"draws": 4, "norm": "none", "dispersion": "gene-cell", "likelihood": "zinb", "library": "latent"},
    "labelled": {"labels": Labels("kind", ("c",), 20.0), "prior": "mixture", "dispersion": "gene-label"},
}  # with each setting that MODEL has not


def simulate(n_obs: int, seed: int) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """Counts (n, 30) of three cell types at unequal depth, one cell without any; obs with the model's columns."""
    r = np.random.default_rng(seed)
    kind = r.integers(0, 3, n_obs)
    fractions = np.random.default_rng(7).dirichlet(np.full(N_VARS, 0.5), 3)[kind]
    depth = 100 * np.exp(r.normal(0, 0.4, (n_obs, 1)))
    x = r.poisson(r.gamma(2.0, depth * fractions / 2)).astype(np.uint32)
    x[0] = 0
    columns = {"row": np.arange(n_obs), "sex": r.choice(["f", "m"], n_obs), "age": r.normal(50.0, 9.0, n_obs)}
    columns["kind"] = np.array(["a", "b", "c"])[kind]
    return sp.csr_matrix(x), pd.DataFrame(columns, index=[f"cell{i}" for i in range(n_obs)])


def write_cohort(folder: Path, n_obs: int = 150) -> list[Path]:
    """Write a cohort of two simulated samples, `n_obs` cells each; return the counts' manifests."""
    return write_samples(folder, {f"s{i}": simulate(n_obs, seed=i) for i in range(2)})


def write_samples(
    folder: Path,
    samples: dict[str, tuple[sp.csr_matrix, pd.DataFrame]],
    *,
    shards: bool = True,
    first: int = 0,
    store: Store = STORE,
) -> list[Path]:
    """Write counts stores of these samples, batches run{first} and so on, and shards; return the counts' manifests."""
    counts = []
    for i, (name, (x, obs)) in enumerate(samples.items(), first):
        manifest = folder / "counts" / f"{name}.json"
        var = pd.DataFrame(index=[f"gene{j}" for j in range(x.shape[1])])
        obs = obs.set_index(f"{name}_" + obs.index).assign(sample=name, batch=f"run{i}")
        write_json(write_counts([x], obs, var, manifest.with_suffix(".zarr"), sample=name), manifest)
        counts.append(manifest)
    for name in shard_names(store) if shards else []:
        split, shard = name.split("-")
        path = folder / "shards" / name
        facts = write_shard(counts, split, int(shard), path.with_suffix(".zarr"), seed=0, store=store)
        write_json(facts, path.with_suffix(".json"))
    return counts


def manifests(folder: Path, split: str) -> list[Path]:
    """Return the manifests of a cohort's shards."""
    return sorted((folder / "shards").glob(f"{split}-*.json"))


def fit_model(folder: Path, sheet: dict, **changes) -> Path:
    """Train a model of MODEL with these changes on a cohort's shards for a few steps, and return its path."""
    model = dataclasses.replace(MODEL, max_epochs=2, **changes)
    splits = manifests(folder, "train"), manifests(folder, "validation")
    vae, _, facts = fit(*splits, model, sheet=sheet, seed=0, checkpoints=folder / "checkpoints", threads=1)
    save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
    return folder / "model.safetensors"


def train(cohort: Path, out: Path, checkpoints: Path) -> None:
    """Train with a checkpoint at every step, and write the model."""
    model = Model(**{**vars(MODEL), "checkpoint_minutes": 0.0})
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    vae, _, facts = fit(*splits, model, sheet={}, seed=0, checkpoints=checkpoints, threads=1)
    save_model(vae, facts, out / "model.safetensors", out / "model.json")


def in_child(cohort: Path, out: Path, checkpoints: Path, stop: tuple[int, float] | None = None) -> int:
    """Train in a child process, send it stop = (signal, after seconds), and return its wait status."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            train(cohort, out, checkpoints)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(0)
    if stop:
        time.sleep(stop[1])
        os.kill(child, stop[0])  # a child that has ended is not reaped yet: its number is still its own
    return os.waitpid(child, 0)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    moments, number = random.Random(a.seed), getattr(signal, f"SIG{a.signal}")
    began = time.monotonic()
    if in_child(a.cohort, a.out / "undisturbed", a.out / "undisturbed-checkpoints"):
        raise SystemExit("the undisturbed run failed")
    whole, hits = time.monotonic() - began, 0
    for kill in range(a.kills):
        # a fresh run every few kills, or the later ones would find it finished
        out, checkpoints = a.out / f"killed{kill // 3}", a.out / f"killed{kill // 3}-checkpoints"
        hits += in_child(a.cohort, out, checkpoints, (number, moments.uniform(0, 0.6 * whole))) != 0
    for last in range((a.kills + 2) // 3):
        if in_child(a.cohort, a.out / f"killed{last}", a.out / f"killed{last}-checkpoints"):
            raise SystemExit("a resumed run failed")
    print(f"{hits} of {a.kills} hit")


if __name__ == "__main__":
    main()
