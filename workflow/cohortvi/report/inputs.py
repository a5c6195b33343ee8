"""What the report reads, and how it becomes small: tables of all cells are reduced while they are read.

No more than one sample's QC table is in memory at a time, and of a model's cells no more than the codes of samples and
clusters (about 20 bytes a cell) and the cells that are drawn.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cohortvi import files
from cohortvi.cohort.sheet import file_name
from cohortvi.files import read_json
from cohortvi.report.words import natural

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
N_BINS = 600
LOG_RANGE = 7.0  # counts up to 10^7
BATCH_ROWS = 1 << 18
DRAWN = 7  # use of random numbers that no other figure has


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, as the rules of inference and atlas write them."""

    facts: Path
    history: Path
    clusters: Path
    layout: Path
    cells: Path
    markers: Path
    metrics: Path
    gap: Path
    gap_cells: Path
    differential: Path  # there if the config names comparisons
    likelihood: Path  # there if the config asks for it

    @classmethod
    def within(cls, folder: Path) -> "ModelFiles":
        """Return the files of results/models/{model}."""
        tables = (folder / f"{name}.parquet" for name in ("history", "clusters", "layout", "cells", "markers"))
        gap = folder / "gap.json", folder / "gap.parquet"
        asked = folder / "differential.parquet", folder / "likelihood.json"
        return cls(folder / "model.json", *tables, folder / "metrics.json", *gap, *asked)


@dataclass(frozen=True)
class ReportInputs:
    """All that the report reads.

    `sheet`: {sample: {column: value}}, what the sheet says beside the path, `batch` among it, in order of the samples.
    `qc`: {sample: (parquet, json)}; `fits`: {batch: parquet}; `models`: {name: files}; `benchmarks`: a folder with
    {rule}.tsv or {rule}/{job}.tsv as Snakemake writes them, or None.
    """

    sheet: Mapping[str, Mapping[str, str]]
    qc: Mapping[str, tuple[Path, Path]]
    fits: Mapping[str, Path]
    genes: Path
    ledger: Path
    models: Mapping[str, ModelFiles]
    benchmarks: Path | None

    @classmethod
    def within(
        cls,
        results: Path,
        sheet: Mapping[str, Mapping[str, str]],
        models: Iterable[str],
        benchmarks: Path | None,
    ) -> "ReportInputs":
        """Return the inputs as they lie under the folder `results`."""
        cohort = results / "cohort"
        batches = sorted({row["batch"] for row in sheet.values()})
        return cls(
            sheet=sheet,
            qc={name: (cohort / f"qc/{name}.parquet", cohort / f"qc/{name}.json") for name in sheet},
            fits={batch: cohort / f"genes/fits/{file_name(batch)}.parquet" for batch in batches},
            genes=cohort / "genes.parquet",
            ledger=cohort / "ledger.tsv",
            models={name: ModelFiles.within(results / "models" / name) for name in models},
            benchmarks=benchmarks,
        )


def read_columns(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of a parquet table without its index, which names every cell.

    Errors: ValueError that names the columns the table does not have.
    """
    _check_columns(path, columns)
    return files.read_columns(path, columns)


def read_rows(path: Path, columns: Sequence[str], rows: np.ndarray) -> pd.DataFrame:
    """Return columns of the rows at positions (m,), in the order of the positions, a batch of the file at a time.

    Errors: ValueError that names the columns the table does not have.
    """
    _check_columns(path, columns)
    order = np.argsort(rows, kind="stable")
    wanted, parts, start = rows[order], [], 0
    file = pq.ParquetFile(path)
    for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
        first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
        parts.append(batch.take(pa.array(wanted[first:last] - start)))
        start += batch.num_rows
    table = pa.Table.from_batches(parts).unify_dictionaries().to_pandas().reset_index(drop=True)
    return table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    found = pq.read_schema(path).names
    unknown = [name for name in columns if name not in found]
    if unknown:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, unknown))}; found {', '.join(found)}. Name columns of the sheet "
            "or of cohort.keep_obs in report.color_by"
        )


def read_ledger(path: Path) -> pd.DataFrame:
    """Return the ledger, a row per sample in their natural order; `quarantined` is text."""
    ledger = pd.read_csv(path, sep="\t", dtype={"sample": str, "quarantined": str}, keep_default_na=False)
    return ledger.iloc[sorted(range(len(ledger)), key=lambda i: natural(ledger["sample"].iloc[i]))]


@dataclass(frozen=True)
class Spread:
    """How a metric lies over the cells of one sample, on the axis it is drawn on (log10(1 + x) if `is_log`).

    counts (N_BINS,): cells a bin of the range [0, top]; quantiles: at QUANTILES; low, high: effective bounds or None.
    """

    sample: str
    counts: np.ndarray
    top: float
    is_log: bool
    quantiles: np.ndarray
    low: float | None
    high: float | None
    quarantined: bool = False


def effective(bounds: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Return the tighter one of the fixed and the MAD bound on each side."""
    low = [bounds[side] for side in ("low", "mad_low") if side in bounds]
    high = [bounds[side] for side in ("high", "mad_high") if side in bounds]
    return max(low, default=None), min(high, default=None)


def read_facts(inputs: ReportInputs) -> dict[str, dict]:
    """Return the QC facts of every sample, in the natural order of their names."""
    return {name: read_json(inputs.qc[name][1]) for name in sorted(inputs.qc, key=natural)}


def cross(rows: pd.Series, columns: pd.Series) -> pd.DataFrame:
    """Return how many cells (n,) have each pair of categories; rows in natural order and without empty ones."""
    rows, columns = rows.astype("category"), columns.astype("category")
    shape = len(rows.cat.categories), len(columns.cat.categories)
    counts = np.zeros(shape, np.int64)
    for start in range(0, len(rows), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        np.add.at(counts, (rows.cat.codes.to_numpy()[part], columns.cat.codes.to_numpy()[part]), 1)
    table = pd.DataFrame(counts, rows.cat.categories.astype(str), columns.cat.categories.astype(str))
    return table.loc[sorted(table.index[counts.any(1)], key=natural)]


def read_spreads(inputs: ReportInputs, facts: Mapping[str, dict]) -> dict[str, list[Spread]]:
    """Return {metric: a Spread per sample}, over all cells that came in; doublet scores over those with one."""
    spreads: dict[str, list[Spread]] = {}
    for name in facts:
        path = inputs.qc[name][0]
        bounds = dict(facts[name]["bounds"])
        threshold = facts[name]["doublets"]["threshold"]
        bounds["doublet_score"] = {} if threshold is None else {"high": threshold}
        shown = ["n_genes_by_counts", "total_counts", "pct_counts_mt", "doublet_score"]
        shown += [metric for metric, sides in bounds.items() if sides and metric not in shown]
        known = set(pq.read_schema(path).names)
        cells = read_columns(path, [metric for metric in shown if metric in known])
        for metric, values in cells.items():
            finite = values.to_numpy(float)[np.isfinite(values.to_numpy(float))]
            spread = _spread(name, metric, finite, bounds.get(metric, {}))
            quarantined = facts[name]["quarantined"] is not None
            spreads.setdefault(metric, []).append(replace(spread, quarantined=quarantined))
    return {metric: found for metric, found in spreads.items() if any(spread.counts.sum() for spread in found)}


def _spread(sample: str, metric: str, values: np.ndarray, bounds: Mapping[str, float]) -> Spread:
    is_log = metric in {"n_genes_by_counts", "total_counts"}
    top = LOG_RANGE if is_log else 100.0 if metric.startswith("pct_") else 1.0
    scale = np.log10 if is_log else lambda x: x
    drawn = scale(values + is_log)
    counts = np.histogram(drawn, bins=N_BINS, range=(0, top))[0]
    quantiles = np.quantile(drawn, QUANTILES) if len(drawn) else np.full(len(QUANTILES), np.nan)
    low, high = (None if x is None else float(scale(max(x, 0) + is_log)) for x in effective(bounds))
    return Spread(sample, counts, top, is_log, quantiles, low, high)


def draw_rows(samples: pd.Series, most: int, seed: int) -> np.ndarray:
    """Return positions (m,) of at most `most` cells, the same share of every sample, in an order drawn as well.

    The choice within a sample follows from (seed, sample, its size); where nothing is left out, all cells are drawn.
    """
    share = min(1.0, most / max(len(samples), 1))
    samples, chosen = samples.astype("category"), []
    order = np.argsort(samples.cat.codes.to_numpy(), kind="stable")
    ends = np.cumsum(np.bincount(samples.cat.codes, minlength=len(samples.cat.categories)))
    for name, positions in zip(samples.cat.categories, np.split(order, ends[:-1]), strict=True):
        key = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8])
        n_drawn = int(share * len(positions) + 1e-9)
        chosen.append(np.random.default_rng([seed, DRAWN, key]).permutation(positions)[:n_drawn])
    rows = np.sort(np.concatenate([np.empty(0, int), *chosen]))
    return np.random.default_rng([seed, DRAWN]).permutation(rows)


def read_benchmarks(folder: Path | None) -> pd.DataFrame:
    """Return per rule: jobs, seconds (sum), longest (seconds), rss (MB, largest), cpu_seconds (sum); longest first."""
    columns = ["rule", "jobs", "seconds", "longest", "rss", "cpu_seconds"]
    rows = []
    for path in sorted(folder.rglob("*.tsv")) if folder else []:
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        table = pd.read_csv(path, sep="\t", na_values=["NA", "-"])
        if list(table)[:2] != ["s", "h:m:s"]:  # not one of Snakemake's
            continue
        seconds, rss, cpu = (table[name].astype(float) for name in ("s", "max_rss", "cpu_time"))
        rows.append((rule, len(table), seconds.sum(), seconds.max(), rss.max(), cpu.sum()))
    jobs = pd.DataFrame(rows, columns=columns)
    how = {"jobs": "sum", "seconds": "sum", "longest": "max", "rss": "max", "cpu_seconds": "sum"}
    return jobs.groupby("rule", as_index=False).agg(how).sort_values("seconds", ascending=False, kind="stable")
