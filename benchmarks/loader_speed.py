"""Our loader beside others, interleaved, every measurement in a fresh process on the same cores: `make bench-loader`.

Simulates data sets A (500,000 cells x 2,000 genes) and B (100,000 x 20,000), writes them in each loader's format, and
measures loaders in turn, round after round, so that what else the machine does strikes all alike: cells a second with
the store in the page cache, cores used, peak memory above that of imports, 99th percentile of the gaps between
minibatches, seconds to the first one; our loader and annbatch as its README sets it also with a cold cache; and how
well ours mixes cells (loader_quality.py). What a loader cannot do is reported as skipped, with the reason.

All numbers go to benchmarks/out/loader.json. `--tables` makes of them the tables in README.md and docs/loader.svg.
Others get virtual environments of their own from requirements-*.txt, unless interpreters that have them are given.
"""

import argparse
import datetime
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from loader_peers import PEERS
from loader_plot import write_plot
from loader_stores import OUT, data_set, store
from loader_tables import number, put_between_markers, tables
from loader_worker import Failed, run
from simulated import PRESETS

from cohortvi.files import read_json, write_json

ROOT = Path(__file__).parent.parent
MIXED = 1_024  # batch size of the comparisons with a cold cache and of mixing
COLD = {"cohortvi": {"dense": "dense", "csr": "csr"}, "annbatch": {"dense": "32x256", "csr": "32x256"}}


def environment(name: str, python: str) -> str:
    """Return an interpreter that has requirements-NAME.txt, in a virtual environment; Failed if it can't be made."""
    folder, requirements = OUT / f"env-{name}", Path(__file__).parent / f"requirements-{name}.txt"
    wanted, installed, made = requirements.read_text(), folder / "installed.txt", str(folder / "bin/python")
    if not installed.exists() or installed.read_text() != wanted:
        print(f"making {folder}", flush=True)
        try:
            for command in (
                [python, "-m", "venv", "--clear", folder],
                [made, "-m", "pip", "install", "-r", requirements],
            ):
                subprocess.run(command, check=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [f"ended with {error.returncode}"]
            told = next((line for line in lines if line.startswith("ERROR")), lines[0])  # of pip, or of another
            raise Failed(f"its environment cannot be made by {error.cmd[0]}: {told}") from error
        except OSError as error:
            raise Failed(f"its environment cannot be made: {error}") from error
        installed.write_text(wanted)
    return made


def machine(cores: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cores_used": cores,
        "memory_gib": round(memory / 2**30),
        "system": f"{system}, Linux {platform.release()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


class Bench:
    """A run: its options, interpreters, stores, and results so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        settings = {name: getattr(options, name) for name in ("rounds", "seconds", "batch_sizes", "outputs")}
        self.results: dict[str, Any] = {"machine": machine(options.cores), "settings": settings, "skipped": {}}
        self.results |= {"versions": {}, "data": {}, "written": [], "warm": [], "cold": [], "mixing": []}
        self.pythons, self.stores = {"own": sys.executable}, {}

    def skip(self, name: str, reason: str) -> None:
        """Leave out a loader, or one of its settings, from here on."""
        self.results["skipped"][name] = reason
        print(f"skipped: {name}: {reason}", flush=True)

    def is_skipped(self, loader: str, setting: str = "") -> bool:
        """Say whether a loader or one of its settings is left out."""
        return not {loader, f"{loader} {setting}"}.isdisjoint(self.results["skipped"])

    def find_interpreters(self) -> None:
        """Make the environments that are needed and not given."""
        given = {"annbatch": self.options.annbatch_python, "peers": self.options.peers_python}
        makers = {"annbatch": self.options.python312, "peers": sys.executable}
        for name, python in given.items():
            loaders = [loader for loader in self.options.loaders if PEERS[loader].environment == name]
            if not loaders:
                continue
            try:
                self.pythons[name] = python or environment(name, makers[name])
            except Failed as error:
                for loader in loaders:
                    self.skip(loader, str(error))

    def job(self, kind: str, data: str, loader: str, **rest: Any) -> dict[str, Any]:
        """Do a job; Failed if it can't be done."""
        facts = self.results["data"][data]
        job = {"kind": kind, "loader": loader, "h5ad": facts["h5ad"], "path": self.stores[data, loader], **rest}
        job |= {"n_vars": facts["n_vars"], "nnz": facts["nnz"] / facts["n_obs"], "seconds": self.options.seconds}
        found = run(self.pythons[PEERS[loader].environment], job, self.options.cores)
        self.results["versions"][loader] = found.pop("versions")
        return found

    def prepare(self, name: str) -> None:
        """Make a data set and the loaders' stores of it, as far as they are not there."""
        data = self.results["data"][name] = data_set(name, self.options.cells)
        for loader in [loader for loader in self.options.loaders if not self.is_skipped(loader)]:
            self.stores[name, loader] = data["h5ad"]
            if PEERS[loader].write:
                try:
                    found = store(data, loader, self.pythons[PEERS[loader].environment], self.options.cores)
                except Failed as error:
                    self.skip(loader, f"its store of {name} cannot be written: {error}")
                    continue
                self.stores[name, loader] = found["path"]
                self.results["written"].append({"data": name, "loader": loader, **found})

    def entries(self, output: str) -> list[tuple[str, str]]:
        """Return (loader, setting) of all that give an output."""
        wanted = [(name, setting) for name in self.options.loaders for setting in PEERS[name].settings[output]]
        return [entry for entry in wanted if not self.is_skipped(*entry)]

    def measure(self, kind: str, entries: list[tuple[str, str]], **where: Any) -> None:
        """Measure loaders once each; who fails is skipped from here on."""
        for loader, setting in entries:
            try:
                found = self.job(kind, loader=loader, setting=setting, **where)
            except Failed as error:
                self.skip(f"{loader} {setting}", str(error))
                continue
            self.results[kind].append({"loader": loader, "setting": setting, **where, **found})
            told = [*where.values(), kind, loader, setting, number(found["cells_per_s"]), "cells/s"]
            print(*told, *([f"{found['cores']:.2f} cores"] if kind == "warm" else []), flush=True)

    def round(self, index: int) -> None:
        """Measure every loader once with every data set, batch size and output, each time with another one first."""
        options = self.options
        for data, size, output in itertools.product(options.data, options.batch_sizes, options.outputs):
            entries = self.entries(output)
            first = index % max(len(entries), 1)
            where = {"data": data, "batch_size": size, "output": output, "round": index}
            self.measure("warm", entries[first:] + entries[:first], **where)
        for data, output in itertools.product(options.data, options.outputs):
            entries = [entry for entry in self.entries(output) if COLD.get(entry[0], {}).get(output) == entry[1]]
            where = {"data": data, "batch_size": MIXED, "output": output, "round": index}
            self.measure("cold", entries[:: -1 if index % 2 else 1], **where)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="measure nothing; make tables and plot of loader.json")
    parser.add_argument("--data", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--cells", type=int, help="at most so many a data set, to try the benchmark out")
    parser.add_argument("--loaders", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--outputs", nargs="+", choices=("dense", "csr"), default=["dense", "csr"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--cores", type=int, default=2, help="that every process is pinned to")
    parser.add_argument("--python312", default="python3.12", help="makes the environment of annbatch: 3.12 or later")
    parser.add_argument("--annbatch-python", help="an interpreter that has annbatch, instead of an environment")
    parser.add_argument("--peers-python", help="one that has scvi-tools and scDataset, instead of an environment")
    return parser.parse_args()


def main() -> None:
    """Measure and write benchmarks/out/loader.json, after every round; print the tables. Or make tables and plot."""
    options = arguments()
    if options.tables:
        results = read_json(OUT / "loader.json")
        picture = "![Cells a second against batch size](docs/loader.svg)"
        put_between_markers(ROOT / "README.md", f"{picture}\n\n{tables(results)}")
        write_plot(results, ROOT / "docs" / "loader.svg")
        return
    bench = Bench(options)
    bench.find_interpreters()
    for data in options.data:
        bench.prepare(data)
    for index in range(options.rounds):
        bench.round(index)
        write_json(bench.results, OUT / "loader.json")
    if "A" in options.data and "cohortvi" in options.loaders:
        found = bench.job("quality", "A", "cohortvi", batch_size=MIXED)
        bench.results["mixing"].append({"data": "A", "batch_size": MIXED, **found})
        write_json(bench.results, OUT / "loader.json")
    print(tables(bench.results))


if __name__ == "__main__":
    main()
