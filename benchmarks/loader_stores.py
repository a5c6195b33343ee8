"""The data sets of the loader benchmarks and the stores made of them, under benchmarks/out/loader.

What is there and was made by the same code, or the same versions, is left as it is.
"""

import sys
from pathlib import Path
from typing import Any

import h5py
from loader_peers import PEERS
from loader_worker import run
from simulated import PRESETS, write_h5ad

from cohortvi.digest import code
from cohortvi.files import digest, read_json, remove, write_json

HERE = Path(__file__).parent
OUT = HERE / "out"


def data_set(name: str, cells: int | None) -> dict[str, Any]:
    """Return n_obs, n_vars, n_batches, nnz, folder and h5ad of A or B, of at most so many cells; simulate it first."""
    preset = PRESETS[name]
    preset = preset._replace(n_obs=min(preset.n_obs, cells or preset.n_obs))
    folder = OUT / "loader" / f"{name}-{preset.n_obs}"
    h5ad, key = folder / "source.h5ad", folder / f"{code(HERE / 'simulated.py')}.code"
    if not key.exists():
        print(f"simulating {name}: {preset.n_obs:,} cells x {preset.n_vars:,} genes", flush=True)
        remove(folder)
        folder.mkdir(parents=True)
        write_h5ad(preset, h5ad)
        key.touch()
    with h5py.File(h5ad) as file:
        nnz = len(file["X/data"])
    sizes = {"n_obs": preset.n_obs, "n_vars": preset.n_vars, "n_batches": preset.n_batches, "nnz": nnz}
    return {**sizes, "folder": str(folder), "h5ad": str(h5ad)}


def store(
    data: dict[str, Any], loader: str = "cohortvi", python: str = sys.executable, cores: int = 2
) -> dict[str, Any]:
    """Return the path of a loader's store of a data set, and what writing it took; write it first.

    Errors: loader_worker.Failed if it can't be written.
    """
    is_ours = PEERS[loader].environment == "own"
    versions = code(HERE / "loaders.py") if is_ours else (HERE / f"requirements-{loader}.txt").read_text()
    key = digest(versions, code(HERE / "loader_worker.py"))  # what was written, and how it was measured
    folder = Path(data["folder"]) / loader
    note = folder / f"{key}.json"
    if not note.exists():
        print(f"writing {data['folder']} for {loader}", flush=True)
        remove(folder)
        folder.mkdir()
        write_json(
            run(python, {"kind": "write", "loader": loader, "h5ad": data["h5ad"], "folder": str(folder)}, cores), note
        )
    return read_json(note)
