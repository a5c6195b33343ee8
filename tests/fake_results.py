"""A results/ folder as the rules before `report` leave it, drawn from a seed: for tests of the page alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from cohortvi.cohort.sheet import file_name
from cohortvi.config import Gap
from cohortvi.files import write_json, write_table
from cohortvi.inference.gap_summary import label_summary, summary
from cohortvi.report.inputs import ReportInputs
from cohortvi.typed import build

CONFIG = Path(__file__).parents[1] / "config/config.yaml"
VERDICT = "0 cells left, fewer than qc.gate.min_cells = 200"
SHOWN = {"leiden_0.2": 5, "leiden_0.5": 8, "leiden_1": 11}
BENCHMARK = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


@dataclass(frozen=True)
class Fake:
    """What to make; `failed`: the last sample is quarantined; `types`: clusters; `many`: categories of `pool`."""

    samples: int = 8
    cells: int = 1250
    genes: int = 2000
    runs: int = 2
    models: tuple[str, ...] = ("nb", "zinb")
    truth: bool = True
    labels: bool = True
    failed: bool = True
    types: int = 8
    many: int = 0
    title: str = "The demo cohort"
    color_by: tuple[str, ...] = ("donor", "run")


def make(root: Path, fake: Fake) -> tuple[ReportInputs, dict]:
    """Write the files under `root`; return the report's inputs and config."""
    rng = np.random.default_rng(1)
    names = [f"sample{i + 1:02d}" for i in range(fake.samples)]
    sheet = {name: _row(i, fake) for i, name in enumerate(names)}
    cells = pd.concat([_qc(root, name, sheet[name], fake, rng) for name in names])
    _genes(root, sorted({row["batch"] for row in sheet.values()}), fake, rng)
    for i, model in enumerate(fake.models):
        _model(root / "models" / model, model, cells, fake, np.random.default_rng([2, i]))
    _ledger(root, names, cells, fake)
    _benchmarks(root.parent / "benchmarks", names, fake)
    inputs = ReportInputs.within(root, sheet, fake.models, root.parent / "benchmarks")
    return inputs, _config(fake)


def _row(i: int, fake: Fake) -> dict[str, str]:
    run = f"run{i * fake.runs // fake.samples + 1}"
    return {"batch": run, "donor": f"D{i % 4 + 1}", "run": run, "condition": ("control", "stimulated")[i % 2]}


def _qc(root: Path, name: str, row: dict, fake: Fake, rng: np.random.Generator) -> pd.DataFrame:
    n, last = fake.cells, fake.failed and name == f"sample{fake.samples:02d}"
    depth = (1800 if row["batch"] == "run1" else 2300) * np.exp(rng.normal(0, 0.35, n)) * (0.03 if last else 1)
    dying = rng.random(n) < 0.05
    depth[dying] *= 0.3
    total = rng.poisson(depth)
    mt = np.where(dying, rng.uniform(25, 80, n), rng.gamma(6, 0.7, n))
    score = np.clip(np.where(rng.random(n) < 0.05, rng.normal(0.42, 0.08, n), rng.gamma(3, 0.028, n)), 0, 1)
    table = pd.DataFrame(
        {
            "row": np.arange(n),
            "n_genes_by_counts": np.minimum((2000 * (1 - np.exp(-total / 2200))).astype(int), total),
            "total_counts": total,
            "pct_counts_mt": mt,
            "pct_counts_ribo": rng.normal(22, 5, n).clip(0),
            "pct_counts_hb": rng.exponential(0.1, n),
        },
        index=[f"AAAC{i:05d}-1" for i in range(n)],
    )
    bounds = {
        "n_genes_by_counts": {"low": 100.0, "mad_low": 210.0 + 3 * rng.integers(20)},
        "total_counts": {"low": 200.0, "mad_high": 9000.0 + 100 * rng.integers(20)},
        "pct_counts_mt": {"high": 20.0, "mad_high": 9.0 + rng.random()},
    }
    reason = np.full(n, "", dtype=object)
    for metric, sides in bounds.items():
        for side, edge in sides.items():
            broken = table[metric] <= edge if side.endswith("low") else table[metric] >= edge
            reason[(reason == "") & broken] = f"{metric}_{side}"
    passing = reason == ""
    table["doublet_score"] = np.where(passing & (not last), score, np.nan)
    table["predicted_doublet"] = passing & (score > 0.25) & (not last)
    reason[table["predicted_doublet"]] = "doublet"
    reason[(reason == "") & last] = "quarantined"
    table["reason"] = reason
    removed = table.loc[table["reason"] != "", "reason"].value_counts().to_dict()
    kept = table[table["reason"] == ""]
    facts = {
        "sample": name,
        "n_obs": n,
        "n_kept": len(kept),
        "removed": removed,
        "quarantined": VERDICT if last else None,
        "kept_by_override": None,
        "median_genes": float(kept["n_genes_by_counts"].median()) if len(kept) else 0.0,
        "median_counts": float(kept["total_counts"].median()) if len(kept) else 0.0,
        "bounds": bounds,
        "doublets": {"enabled": True, "threshold": None if last else 0.25},
        "n_vars": fake.genes,
    }
    write_table(table, root / f"cohort/qc/{name}.parquet")
    write_json(facts, root / f"cohort/qc/{name}.json")
    return table.assign(sample=name, **row, barcode=[f"{name}_{barcode}" for barcode in table.index])


def _genes(root: Path, batches: list[str], fake: Fake, rng: np.random.Generator) -> None:
    g = fake.genes
    names = pd.Index([f"GENE{i + 1:05d}" for i in range(g)])
    base = np.exp(rng.normal(-2.2, 1.6, g))
    extra = np.exp(np.abs(rng.normal(0, 0.5, g)))
    for batch in batches:
        mean = base * np.exp(rng.normal(0, 0.1, g))
        trend = mean + mean**2 / 2
        variance = trend * extra * np.exp(rng.normal(0, 0.1, g))
        fit = {"n_obs": 400 * fake.cells // 100, "mean": mean, "variance": variance, "fitted": np.log10(trend * 1.3)}
        write_table(pd.DataFrame(fit, index=names), root / f"cohort/genes/fits/{file_name(batch)}.parquet")
    chosen = pd.Series(extra, index=names).rank(ascending=False) <= g // 5
    table = {"symbol": names, "means": base, "variances": base * extra, "variances_norm": extra}
    table |= {"highly_variable_rank": np.where(chosen, 1.0, np.nan), "highly_variable_nbatches": 1}
    write_table(pd.DataFrame(table | {"highly_variable": chosen}, index=names), root / "cohort/genes.parquet")


def _model(folder: Path, model: str, every: pd.DataFrame, fake: Fake, rng: np.random.Generator) -> None:
    kept = every[every["reason"] == ""].set_index("barcode")
    n, k = len(kept), fake.types
    kind = rng.choice(k, n, p=(weights := 0.8 ** np.arange(k)) / weights.sum())
    angle, radius = np.arange(k) * 2.4, 2.6 * np.sqrt(np.arange(k) + 1)
    centres = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    places = centres[kind] + rng.normal(0, 1, (n, 2)) * (0.6 + 0.5 * rng.random(k))[kind][:, None]
    places += 0.25 * (kept["batch"] == "run1").to_numpy()[:, None]
    counts = SHOWN | {"leiden_0.5": k}
    clusters = {
        name: pd.Categorical((kind % n_clusters).astype(str), [str(i) for i in range(n_clusters)])
        for name, n_clusters in counts.items()
    }
    write_table(pd.DataFrame(clusters, index=kept.index), folder / "clusters.parquet")
    write_table(pd.DataFrame(places, kept.index, ["umap_1", "umap_2"]), folder / "layout.parquet")
    cells = kept.drop(columns=["row", "reason", "predicted_doublet"])
    cells["cell_type"] = [f"type {i}" for i in kind]
    if has_labels := _has_labels(model, fake):
        cells["predicted_label"] = cells["cell_type"]
        cells["label_probability"] = rng.beta(9, 1, n)
    cells["pool"] = [f"pool {i:03d}" for i in rng.integers(max(fake.many, 1), size=n)]
    text = cells.select_dtypes(object).columns
    write_table(cells.astype(dict.fromkeys(text, "category")), folder / "cells.parquet")
    history, best = _history(model, rng)
    write_table(history, folder / "history.parquet")
    write_json(_facts(model, history, best, kept, fake), folder / "model.json")
    write_table(_markers(k, fake, rng), folder / "markers.parquet")
    _gap(folder, cells if has_labels else kept, rng)
    write_json(_metrics(counts, fake, rng), folder / "metrics.json")
    write_table(_changes(fake), folder / "differential.parquet")
    write_json(_likelihood(kept), folder / "likelihood.json")


def _has_labels(model: str, fake: Fake) -> bool:
    """Whether the model has labels: one of several has."""
    return fake.labels and model == "nb" and len(fake.models) > 1


def _changes(fake: Fake) -> pd.DataFrame:
    """Three of the genes change in each of two clusters."""
    rng, parts = np.random.default_rng(1), []
    for stratum in ("0", "1"):
        p = np.sort(np.append(rng.random(fake.genes - 3) * 0.3, [0.99, 0.995, 1.0]))[::-1]
        columns = {"comparison": "arm", "stratum": stratum, "gene": [f"G{i}" for i in range(len(p))], "p_change": p}
        columns |= {"fdr": 1 - p, "is_changed": p > 0.9, "lfc": rng.normal(0, 1, len(p)), "lfc_sd": 0.3}
        columns |= {"mean_first": 1e-3, "mean_second": 1e-3, "cells_first": 120, "cells_second": 80, "same_batch": True}
        bulk = {"pseudobulk_lfc": 0.5, "pseudobulk_p": 1e-6, "pseudobulk_fdr": 1.5e-5, "replicates": 4}
        parts.append(pd.DataFrame(columns | bulk))
    return pd.concat(parts, ignore_index=True)


def _likelihood(kept: pd.DataFrame) -> dict:
    found = {"mean": -612.5, "se": 1.234, "error": 0.0567, "ess": 12.34}
    samples = [{"sample": name, "cells": int(n), **found} for name, n in kept["sample"].value_counts().items()]
    return {"samples": samples, "all": {"cells": len(kept), **found, "se": None}}


def _history(model: str, rng: np.random.Generator) -> tuple[pd.DataFrame, int]:
    n = 34
    epoch = np.arange(1, n + 1)
    weight = np.minimum(1, epoch / 20)
    reconstruction = 612 + 190 * np.exp(-epoch / 2.2) + rng.normal(0, 0.25, n) + 3 * weight
    kl = 9 + 14 * np.exp(-epoch / 9) * (1 - np.exp(-epoch / 2)) + rng.normal(0, 0.05, n)
    held_out = reconstruction + 1.5 + 0.05 * np.maximum(epoch - 25, 0) + rng.normal(0, 0.2, n) - (model == "zinb") * 0.8
    table = {"epoch": epoch, "step": 60 * epoch, "train_loss": reconstruction + weight * kl}
    table |= {"train_reconstruction": reconstruction, "train_kl": kl, "kl_weight": weight, "learning_rate": 1e-3}
    table |= {"validation_elbo": -held_out - kl, "validation_reconstruction": held_out, "validation_kl": kl + 0.1}
    table = pd.DataFrame(
        table | {"cells_per_second": 15_000.0, "seconds": 0.5, "waiting_seconds": 0.01, "peak_memory_mb": 700.0}
    )
    return table, int(table.loc[table["kl_weight"] == 1, "validation_elbo"].idxmax()) + 1


def _facts(model: str, history: pd.DataFrame, best: int, kept: pd.DataFrame, fake: Fake) -> dict:
    settings = yaml.safe_load(CONFIG.read_text())["models"]["nb"] | {"likelihood": model}
    return {
        "settings": settings,
        "genes": [f"GENE{i + 1:05d}" for i in range(fake.genes // 5)],
        "batches": sorted(kept["batch"].unique()),
        "categories": {},
        "continuous": {},
        "labels": [f"type {i}" for i in range(fake.types)] if _has_labels(model, fake) else [],
        "seed": 0,
        "shards": "9f2c11d07be4a860",
        "n_obs": int(len(kept) * 0.9),
        "n_parameters": 274_708,
        "n_steps": int(history["step"].iloc[-1]),
        "n_epochs": len(history),
        "planned_epochs": len(history),
        "kl_weight": 1.0,
        "best_epoch": best,
        "best_validation_elbo": float(history["validation_elbo"].iloc[best - 1]),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
    }


def _gap(folder: Path, cells: pd.DataFrame, rng: np.random.Generator) -> None:
    chosen = cells.iloc[np.sort(rng.choice(len(cells), min(len(cells), 600), replace=False))]
    n = len(chosen)
    elbo, amortized, approximate = rng.normal(-620, 90, n), rng.gamma(2, 0.6, n), rng.gamma(3, 0.2, n)
    split = np.where(rng.random(n) < 0.5, "train", "validation")
    columns = {"cell": chosen.index, "split": split, "sample": chosen["sample"].to_numpy(object), "row": np.arange(n)}
    columns |= {"batch": chosen["batch"].to_numpy(object), "n_counts": chosen["total_counts"].to_numpy(), "elbo": elbo}
    columns |= {"elbo_mean_field": elbo + amortized, "elbo_full": elbo + amortized + approximate / 2}
    log_p = elbo + amortized + approximate
    columns |= {"log_p_encoder": log_p - 0.1, "log_p": log_p, "log_p_error": 0.03}
    columns |= {"inference_gap": log_p - elbo, "approximation_gap": approximate, "amortization_gap": amortized}
    columns |= {"approximation_gap_full": approximate / 2, "ess_encoder": rng.uniform(10, 200, n)}
    columns |= {
        "ess": rng.uniform(200, 700, n),
        "khat_encoder": rng.normal(0.7, 0.2, n),
        "khat": rng.normal(0.4, 0.2, n),
    }
    is_labelled = "predicted_label" in cells
    if is_labelled:
        columns |= {name: chosen[name].to_numpy() for name in ("cell_type", "predicted_label", "label_probability")}
    table = pd.DataFrame(columns)
    level = float(elbo.mean())
    curves = [
        {"split": split, "proposal": proposal, "draws": 10**i, "bound": level + loss * (1 - 0.5**i)}
        for split in ("train", "validation")
        for proposal, loss in (("encoder", 1.5), ("refined", 0.5))
        for i in range(4)
    ]
    latent = {"kl": rng.gamma(1, 0.8, 10).tolist(), "variance": rng.uniform(0, 1, 10).tolist()}
    settings = build(Gap, yaml.safe_load(CONFIG.read_text())["gap"])
    write_table(table, folder / "gap.parquet")
    values = {"zero_fraction": 0.8, "library_mean": 900.0, "library_sd": 0.4, "variance_over_mean": 1.5}
    checks = [
        {"batch": batch, "cells": 50, "statistic": name, "observed": value, "replicated": 1.01 * value}
        | {"low": 0.98 * value, "high": 1.04 * value}
        for batch in sorted(cells["batch"].unique())
        for name, value in values.items()
    ]
    ranks = rng.multinomial(300, np.full(10, 0.1), 10).tolist()
    covered = {level: rng.uniform(level - 0.05, level + 0.05, 10).tolist() for level in (0.5, 0.9)}
    criticism = {"predictive": checks, "calibration": {"draws": 99, "histogram": ranks, "coverage": covered}}
    if is_labelled:
        criticism["labels"] = label_summary(table, "cell_type", sorted(cells["cell_type"].unique()), [])
    write_json(summary(table, curves, latent, settings) | criticism, folder / "gap.json")


def _markers(k: int, fake: Fake, rng: np.random.Generator) -> pd.DataFrame:
    g = min(fake.genes // 5, 120)
    names = [f"GENE{i + 1:05d}" for i in range(g)]
    tables = []
    for cluster in range(k):
        change = rng.normal(-0.3, 0.5, g)
        own = np.arange(g) % k == cluster
        change[own] += np.linspace(4, 0, own.sum())
        pct_in = np.clip(0.3 + 0.16 * change, 0.01, 0.99)
        table = {"cluster": str(cluster), "gene": names, "symbol": names, "score": 12 * change, "logfoldchange": change}
        table |= {"mean": np.clip(0.5 + 0.6 * change, 0, None), "pct_in": pct_in, "pct_out": 0.2 * pct_in}
        table |= {"pval": 10.0 ** -np.abs(40 * change), "pval_adj": 10.0 ** -np.abs(39 * change)}
        if k == 1:  # nothing to compare with
            table |= {"score": 0.0, "logfoldchange": 30.0, "pct_out": 0.0, "pval": 1.0, "pval_adj": 1.0}
        ordered = pd.DataFrame(table).sort_values("score", ascending=False)
        ordered.insert(3, "rank", np.arange(g))
        tables.append(ordered)
    return pd.concat(tables, ignore_index=True)


def _metrics(counts: dict[str, int], fake: Fake, rng: np.random.Generator) -> dict:
    def scores() -> dict:
        return {"ari": float(rng.uniform(0.85, 0.98)), "nmi": float(rng.uniform(0.85, 0.98)), "n_labelled": 7000}

    clusters = {
        name: {"n_clusters": n, "silhouette": 0.31, "labels": {"cell_type": scores()} if fake.labels else {}}
        for name, n in counts.items()
    }
    true = rng.normal(0, 0.25, 400) * (rng.random(400) < 0.5)
    last = [f"sample{fake.samples:02d}"] if fake.failed else []
    effects = {"batches": ["run1", "run2"], "correlation": 0.913, "true": true.tolist()}
    effects["estimated"] = (0.9 * true + rng.normal(0, 0.06, 400)).tolist()
    truth = {
        "types": {name: scores() for name in counts},
        "doublets": {"precision": 0.91, "recall": 0.62, "auc": 0.88, "n_true": 430, "n_called": 293},
        "dying": {"n_true": 512, "n_removed": 509},
        "effects": effects if fake.runs > 1 else None,
        "quarantined": last,
        "failed": last,
    }
    mixing = 0.94 if fake.runs > 1 else None
    return {"clusters": clusters, "batch_mixing": mixing, "truth": truth if fake.truth else None}


def _ledger(root: Path, names: list[str], cells: pd.DataFrame, fake: Fake) -> None:
    reasons = sorted(set(cells["reason"]) - {""})
    rows = []
    for i, name in enumerate(names):
        found = cells.loc[cells["sample"] == name, "reason"]
        kept = int((found == "").sum())
        row = {"sample": name, "cells_in": len(found)} | {f"removed_{r}": int((found == r).sum()) for r in reasons}
        row |= {"kept": kept, "quarantined": VERDICT if fake.failed and i == len(names) - 1 else "", "counts": kept}
        row |= {"train": kept - kept // 10, "validation": kept // 10}
        rows.append(row | {f"{stage}_{model}": kept for model in fake.models for stage in ("latent", "atlas")})
    pd.DataFrame(rows).to_csv(root / "cohort/ledger.tsv", sep="\t", index=False)


def _benchmarks(folder: Path, names: list[str], fake: Fake) -> None:
    jobs = {f"{rule}/{name}": 4.0 + i for i, rule in enumerate(("qc", "gene_moments", "extract")) for name in names}
    slow = enumerate(("train", "layout", "markers"))
    jobs |= {f"{rule}/{model}": 61.0 + 9 * i for i, rule in slow for model in fake.models}
    for i, (name, seconds) in enumerate({**jobs, "select_genes": 2.0, "ledger": 0.8}.items()):
        path = folder / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        memory = "NA" if name == "ledger" else f"{400 + 31 * i:.2f}"
        path.write_text(f"{BENCHMARK}{seconds}\t0:00:04\t{memory}\t900\t380\t390\t1\t1\t98.2\t{seconds * 1.1:.2f}\n")


def _config(fake: Fake) -> dict:
    config = yaml.safe_load(CONFIG.read_text())
    config["models"] = {name: config["models"]["nb"] | {"likelihood": name} for name in fake.models}
    config["report"] |= {"title": fake.title, "color_by": list(fake.color_by)}
    config["genes"]["n_top"] = fake.genes // 5
    arm = {"column": "arm", "group": "treated", "reference": "control", "within": "leiden_0.5"}
    config["differential"]["comparisons"] = {"arm": arm} if fake.labels else {}
    config["likelihood"]["draws"] = 100 if fake.labels else None
    labels, truth = ["cell_type"] if fake.labels else [], "truth" if fake.truth else None
    config["atlas"]["metrics"] = {"labels": labels, "truth": truth}
    return config
