"""Speed and peak memory of every rule from qc to shard, on a simulated cohort and on twice as many cells: `make bench`.

The cohort is drawn straight to zarr in chunks and run through the workflow's own rules to the shards; then as many
samples again are added to the sheet, and it is run again. What Snakemake's `benchmark:` measured (wall seconds and the
largest resident memory of the job, Snakemake's own process apart) is summed up per rule. Ends with an error if a rule
needs more than 2 GiB, or 10 % more of it for twice the cells.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "out"
RULES = ["qc", "extract", "gene_moments", "gene_fit", "gene_variance", "select_genes", "shard"]
LIMIT_MB, GROWTH = 2048, 1.10


def prepare(folder: Path, n_samples: int, shards: int, arguments: argparse.Namespace) -> list[str]:
    """Write sheet and config of a cohort of `n_samples` samples; return the shards to ask for."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"sample{i + 1:02d}\tresources/demo/sample{i + 1:02d}.zarr\trun{i // 5}" for i in range(n_samples)]
    (folder / "samples.tsv").write_text("\n".join(["sample\tpath\trun", *rows]) + "\n")
    config = {
        "cohort": {"sheet": "samples.tsv"},
        "genes": {"n_top": 2000},
        "store": {"shards": shards},
        "report": {"color_by": []},
        "simulate": {
            # As many as the larger cohort has: what is drawn must not depend on the size.
            "samples": 2 * arguments.cells // arguments.per_sample, "donors": 4,
            "runs": 1,  # runs differ in depth: the added samples must not be deeper than the first ones
            "cells": arguments.per_sample, "genes": arguments.genes, "failed_samples": 0, "median_counts": 2000,
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return [f"results/store/shards/train-{i:04d}.json" for i in range(shards)]


def run(folder: Path, targets: list[str], cores: int) -> None:
    """Run the workflow in `folder` to the shards."""
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--rerun-incomplete", *targets, "--quiet"]
    configs = [str(ROOT / "config/config.yaml"), str(folder / "config.yaml")]
    subprocess.run([*command, "--configfile", *configs], check=True)


def measure(folder: Path, cells: int) -> pd.DataFrame:
    """Return per rule the number of jobs, cells a second of one job's core, and the peak memory of the largest job."""
    rows = []
    for rule in RULES:
        files = sorted((folder / "benchmarks/out" / rule).glob("*.tsv")) or [folder / f"benchmarks/out/{rule}.tsv"]
        jobs = pd.concat([pd.read_csv(file, sep="\t") for file in files])
        seconds, peak = jobs["s"].sum(), pd.to_numeric(jobs["max_rss"], errors="coerce").max()
        rows.append({"rule": rule, "jobs": len(jobs), "cells_per_s": cells / seconds, "peak_mb": peak})
    return pd.DataFrame(rows).set_index("rule")


def main() -> None:
    """Run both cohorts and print the table of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--per-sample", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=4, help="for the smaller cohort; the larger has twice as many")
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    tables = []
    for factor in (1, 2):
        cells, folder = arguments.cells * factor, OUT / f"scale-{arguments.cells}x{arguments.genes}"
        targets = prepare(folder, cells // arguments.per_sample, arguments.shards * factor, arguments)
        run(folder, targets, arguments.cores)
        tables.append(measure(folder, cells))
    table = tables[0].join(tables[1], rsuffix="_2x")
    table["growth"] = table["peak_mb_2x"] / table["peak_mb"]
    digits = {"cells_per_s": 0, "cells_per_s_2x": 0, "peak_mb": 0, "peak_mb_2x": 0, "growth": 2}
    print(table.round(digits).to_markdown())
    over = table[(table[["peak_mb", "peak_mb_2x"]] > LIMIT_MB).any(axis=1) | (table["growth"] > GROWTH)]
    if len(over):
        sys.exit(f"over {LIMIT_MB} MB or grown by more than {GROWTH - 1:.0%}: {', '.join(over.index)}")


if __name__ == "__main__":
    main()
