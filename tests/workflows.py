"""Running the workflow in a copy of the repository, as a user would in a clone."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".snakemake",
    "results",
    "resources",
    "logs",
    "runs",
    "out",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)

# A cohort that runs to the report in about a minute.
TINY = {
    "simulate": {"samples": 4, "cells": 250, "genes": 400, "types": 3, "failed_samples": 0, "donors": 2},
    "genes": {"n_top": 150, "span": 0.5},
    "qc": {"gate": {"min_cells": 20, "min_median_genes": 10}, "doublets": {"min_cells": 50}},
    "store": {"shards": 2},
    "models": {"nb": {"max_epochs": 4, "min_steps": 0, "n_hidden": 32}},
    "gap": {"cells": 50, "steps": 30, "draws": 100},
    "likelihood": {"draws": 10},
    "atlas": {"clusters": {"resolutions": [0.5], "shown": 0.5}, "embed": {"samples": 2}},
    "differential": {
        "comparisons": {"donor": {"column": "donor", "group": "donor0", "reference": None, "within": "run"}}
    },
    "expression": {"genes": ["RPL1", "RPS2"], "batches": ["run1"], "groups": ["donor", "leiden_0.5"], "draws": 3},
    "report": {"color_by": ["donor"]},
}

# The jobs that gather the whole cohort.
GATHER = {"select_genes": 1, "train": 1, "gap": 1, "embed": 1, "neighbors": 1, "cluster": 1, "layout": 1, "cells": 1,
          "markers": 1, "metrics": 1, "atlas": 1, "ledger": 1, "report": 1}  # fmt: skip


def demo_clone(target: Path) -> Path:
    """Return a clone with the demo cohort, of which rule gap looks at few cells."""
    clone = copy_repository(target)
    config = clone / "config/config.yaml"
    text = config.read_text()
    for name, value, few in (("cells", 1000, 100), ("steps", 300, 50), ("draws", 1000, 100)):
        assert f"  {name}: {value} #" in text
        text = text.replace(f"  {name}: {value} #", f"  {name}: {few} #")
    config.write_text(text)
    return clone


def copy_repository(target: Path, source: Path = ROOT) -> Path:
    """Copy what a clone holds, uncommitted changes included, without results."""
    shutil.copytree(source, target, ignore=NOT_COPIED)
    return target


def tiny_clone(target: Path, n_samples: int = 4) -> Path:
    """Return a clone with a tiny cohort: tiny.yaml over config.yaml, and a sheet of `n_samples` rows."""
    clone = copy_repository(target)
    (clone / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    write_sheet(clone, n_samples)
    return clone


def cohort_clone(target: Path, sheet: pd.DataFrame, values: dict) -> Path:
    """Return a clone with a sheet and what differs from config.yaml, which is written as tiny.yaml."""
    clone = copy_repository(target)
    sheet.to_csv(clone / "config/samples.tsv", sep="\t", index=False)
    (clone / "tiny.yaml").write_text(yaml.safe_dump(values))
    return clone


def write_sheet(clone: Path, n_samples: int) -> None:
    """Write the sheet of the first simulated samples; two samples a run."""
    rows = [
        f"sample{i:02d}\tresources/demo/sample{i:02d}.zarr\tdonor{i % 2}\trun{(i + 1) // 2}"
        for i in range(1, n_samples + 1)
    ]
    (clone / "config/samples.tsv").write_text("\n".join(["sample\tpath\tdonor\trun", *rows]) + "\n")


def environment(clone: Path) -> dict[str, str]:
    """The clone's own package comes first, whatever is installed; threads that wait leave the cores to other tests."""
    own = {"PYTHONPATH": str(clone / "workflow"), "PYTHONUTF8": "1", "OMP_WAIT_POLICY": "passive"}
    return os.environ | own


def command(*arguments: str, tiny: bool = True) -> list[str]:
    """Return the command line of Snakemake."""
    configfiles = ["--configfile", "config/config.yaml", "tiny.yaml"] if tiny else []
    return [sys.executable, "-m", "snakemake", "--cores", "2", *arguments, *configfiles]


def run(clone: Path, *arguments: str, tiny: bool = True, check: bool = True) -> subprocess.CompletedProcess:
    """Run Snakemake in the clone; with `check`, a failure shows its output."""
    done = subprocess.run(
        command(*arguments, tiny=tiny), cwd=clone, env=environment(clone), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stdout[-8000:]
    return done


def planned(clone: Path, *arguments: str) -> Counter:
    """Return how many jobs of each rule `snakemake -n` would run; `all` does not count."""
    text = run(clone, "--dry-run", *arguments).stdout
    if "Nothing to be done" in text:
        return Counter()
    table = text[text.index("Job stats:") :]
    jobs = Counter({name: int(n) for name, n in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)})
    del jobs["total"], jobs["all"]
    return jobs


def planned_samples(clone: Path, rule: str) -> set[str]:
    """Return the samples for which `snakemake -n` would run a rule."""
    text = run(clone, "--dry-run").stdout
    blocks = re.findall(rf"^rule {rule}:\n((?:    .*\n)+)", text, re.MULTILINE)
    return {found for block in blocks for found in re.findall(r"wildcards: sample=(\S+)", block)}


def assert_same_results(first: Path, second: Path, model: str = "nb") -> None:
    """Compare what must not depend on how often a run was killed, where, or by whom it was run; bit for bit."""
    folders = [clone / "results/models" / model for clone in (first, second)]
    for name in ("model.safetensors", "model.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    for name in ("clusters.parquet", "layout.parquet", "markers.parquet"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(folder / name) for folder in folders), check_exact=True)
    import anndata as ad

    latents = [ad.read_zarr(folder / "latent.zarr") for folder in folders]
    assert latents[0].obs_names.equals(latents[1].obs_names)
    for name in ("X_latent", "X_latent_std"):
        np.testing.assert_array_equal(latents[0].obsm[name], latents[1].obsm[name])
    ledgers = [(clone / "results/cohort/ledger.tsv").read_bytes() for clone in (first, second)]
    assert ledgers[0] == ledgers[1]
