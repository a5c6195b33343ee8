"""Quality side by side, in one table: scvi-tools, our models, PCA and Harmony on four cohorts: `make bench-quality`.

Kang (16 batches), covid (6), mixology (5; five cell lines, known by genotype) and onek1k (40 donors), 2,000 genes by
scanpy's seurat_v3 over batches, the same for all (onek1k has 1,000). Every model with its own defaults, on one thread;
15 % of the cells are held out, others for each seed. scib-metrics with its defaults, but that NMI and ARI are those of
Leiden at the resolution of the best NMI, on all cells or a random SCORED of them, the same for all methods: bio
conservation, batch correction, and total, 0.6 of the first and 0.4 of the second (Luecken et al. 2022). log p(x): of
held-out cells, nats per cell (quality_methods.py). Semi-supervised models are told the types of the cells that are not
held out, by which they are then scored. Types of covid are transferred from Kang (cohorts.py), and no truth.

Each (cohort, method, seed) is a line of benchmarks/quality.csv, which is kept with the code: the command makes what is
not there, and what is of other settings or versions anew, and the table is made of what is there. Means and standard
deviations over seeds; `minus scVI`: of the same seed, mean and deviation.
"""

import argparse
import itertools
import logging
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
import yaml
from cohorts import COHORTS, transferred_types
from peers import alone
from quality_methods import METHODS, OURS, ROOT, Found, Task, made_by, why_not
from threadpoolctl import threadpool_limits

from cohortvi.files import replacing

KEPT = ROOT / "benchmarks/quality.csv"
OUT = ROOT / "benchmarks/out/quality"  # models of scvi-tools, and what --epochs and --set make
KEYS = ["cohort", "method", "seed"]
NAMES = ["mixology", "covid", "onek1k", "kang"]
SCORED = 8000  # most cells that scib-metrics sees
SHOWN = {"Bio conservation": 3, "Batch correction": 3, "Total": 3, "Leiden ARI": 3, "Leiden NMI": 3, "log p(x)": 1}
REFERENCE = "scVI"  # what differences are to


@cache
def read(name: str) -> ad.AnnData:
    """Return a cohort with cell_type, missing where unknown."""
    cells = COHORTS[name]()
    if "cell_type" not in cells.obs:
        cells.obs["cell_type"] = transferred_types(cells)
    return cells


def scores(latent_nk: np.ndarray, task: Task) -> dict[str, float]:
    """Return scib-metrics' scores of a place for each cell, over cells of known type."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    rows = np.flatnonzero(task.cells.obs["cell_type"].notna())
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:SCORED])
    obs = task.cells.obs.iloc[rows][["sample", "cell_type"]].astype(str)
    scored = ad.AnnData(obs=obs, obsm={"latent": np.array(latent_nk[rows], np.float32), "pca": task.pca_nk[rows]})
    wanted = BioConservation(nmi_ari_cluster_labels_leiden=True, nmi_ari_cluster_labels_kmeans=False)
    common = {"pre_integrated_embedding_obsm_key": "pca", "n_jobs": 1, "progress_bar": False}
    judge = Benchmarker(scored, "sample", "cell_type", ["latent"], wanted, BatchCorrection(), **common)
    judge.benchmark()
    return {name: float(value) for name, value in judge.get_results().loc["latent"].items()}


def read_kept(kept: Path) -> pd.DataFrame:
    """Return the results that are there: KEYS, made_by, seconds, log p(x) and scores."""
    return pd.read_csv(kept) if kept.exists() else pd.DataFrame(columns=[*KEYS, "made_by"])


def keep(result: dict[str, str | float], kept: Path) -> None:
    """Put a result among those that are there, in place of an older one; other processes may do the same."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with alone(kept):
        rows = pd.concat([read_kept(kept), pd.DataFrame([result])]).drop_duplicates(KEYS, keep="last").sort_values(KEYS)
        with replacing(kept) as path:
            rows.to_csv(path, index=False, float_format="%.6g")


def run(cohorts: list[str], methods: list[str], seeds: list[int], epochs: int | None, kept: Path) -> None:
    """Make the results that are not there; tell of each that is made or cannot be."""
    for cohort, seed in itertools.product(cohorts, seeds):
        rows = read_kept(kept)
        there = set(zip(*(rows[name] for name in (*KEYS, "made_by")), strict=True))
        todo = [method for method in methods if (cohort, method, seed, made_by(method)) not in there]
        if not todo:
            continue
        cells = read(cohort)
        with tempfile.TemporaryDirectory() as folder:
            task = Task(cells, seed, Path(folder), OUT / f"{cohort}-scvi-{seed}-{epochs or 'all'}", epochs)
            for method in todo:
                reason = why_not(method)
                if reason:
                    print(f"{cohort}, {method}, seed {seed}: left out, {reason}", flush=True)
                    continue
                result = one(task, cohort, method)
                keep(result, kept)
                told = {name: round(result[name], places) for name, places in SHOWN.items() if name in result}
                print(f"{cohort}, {method}, seed {seed}: {told}, {result['seconds']:.0f} s", flush=True)


def one(task: Task, cohort: str, method: str) -> dict[str, str | float]:
    """Return one result."""
    found: Found = METHODS[method](task)
    log_p = {} if found.log_p is None else {"log p(x)": found.log_p}
    facts = {"cohort": cohort, "method": method, "seed": task.seed, "made_by": made_by(method)}
    facts |= {"seconds": found.seconds}
    return facts | log_p | scores(found.latent_nk, task)


def collect(cohorts: list[str], methods: list[str], seeds: list[int], kept: Path) -> pd.DataFrame:
    """Return a row for each result that is there, with the differences to REFERENCE of the same seed."""
    rows = read_kept(kept)
    rows = rows[rows["cohort"].isin(cohorts) & rows["method"].isin(methods) & rows["seed"].isin(seeds)]
    keys, compared = ["cohort", "seed"], ["Total", "log p(x)"]
    rows = rows.reindex(columns=[*rows.columns, *(name for name in compared if name not in rows)])
    reference = rows.loc[rows["method"] == REFERENCE, [*keys, *compared]]
    beside = rows[keys].merge(reference, on=keys, how="left")[compared].set_axis(rows.index)
    return rows.assign(**{f"{name} minus {REFERENCE}": rows[name] - beside[name] for name in compared})


def table(rows: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Return a cohort's table: mean ± standard deviation over seeds, `-` where there is nothing."""
    columns = SHOWN | {f"Total minus {REFERENCE}": 3, f"log p(x) minus {REFERENCE}": 1, "seconds": 0}
    lines = {}
    for method in methods:
        own = rows[rows["method"] == method]
        cells = {name: spread(own[name].dropna(), places) for name, places in columns.items()}
        lines[method] = {"seeds": len(own)} | cells
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")


def spread(values: pd.Series, places: int) -> str:
    """Return mean ± standard deviation, the mean of one, or `-`."""
    if values.empty:
        return "-"
    mean = f"{values.mean():.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{places}f}"


def main() -> None:
    """Make what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="at most so many, to try the command; its results are kept apart")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of ours; also kept apart")
    parser.add_argument("--table", action="store_true", help="of what is there; nothing is run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
    quiet = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
    for name in (*quiet, "cohortvi", "harmonypy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for text in arguments.set:
        name, value = text.split("=")
        for changes in OURS.values():
            changes[name] = yaml.safe_load(value)
    trial = [*arguments.set, *([] if arguments.epochs is None else [f"{arguments.epochs}_epochs"])]
    kept = OUT / f"{' '.join(trial)}.csv" if trial else KEPT
    which = arguments.cohorts, arguments.methods, arguments.seeds
    if not arguments.table:
        with threadpool_limits(1):
            run(*which, arguments.epochs, kept)
    rows = collect(*which, kept)
    if rows.empty:
        raise SystemExit(f"{kept}: found no result; run the command without --table")
    for cohort in arguments.cohorts:
        print(f"\n{cohort}\n\n{table(rows[rows['cohort'] == cohort], arguments.methods).to_markdown()}")


if __name__ == "__main__":
    main()
