"""One measurement of one loader, in a process of its own: `run(python, job)`, or this file with a job in JSON.

A job is a dict: `kind` (write, warm, cold or quality), `loader`, and what the function of that kind takes. Linux alone:
memory and reads come from /proc.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from loader_peers import PEERS
from loader_quality import quality

FEW_CELLS = 5_000
SAMPLE_SECONDS = 0.2  # looking is not free
WARM_UP = 8  # minibatches at least, until all memory was touched once, which can take longer than filling it


class Failed(Exception):
    """A job ended without a result; the message says why."""


def run(python: str | Path, job: dict[str, Any], cores: int, timeout: float = 1800) -> dict[str, Any]:
    """Return the result of a job, done by an interpreter on the first so many cores; raise Failed if there is none."""
    threads = {f"{name}_NUM_THREADS": str(cores) for name in ("OMP", "MKL", "OPENBLAS", "RAYON", "NUMBA")}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(python), __file__, json.dumps({**job, "cores": cores}), str(result)]
        try:
            subprocess.run(
                command, env={**os.environ, **threads}, timeout=timeout, check=True, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [f"ended with {error.returncode}"]
            raise Failed(lines[-1]) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(str(error)) from error
        return json.loads(result.read_text())


def files(path: str | Path) -> list[Path]:
    """Return a file, or the files in a folder at any depth."""
    path = Path(path)
    return [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())


def megabytes(paths: list[Path]) -> float:
    """Return what files hold, in MB."""
    return sum(path.stat().st_size for path in paths) / 1e6


def read_through(path: str) -> None:
    """Have all bytes of a store in the page cache."""
    for file in files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass


def drop_cached(path: str) -> None:
    """Have no byte of a store in the page cache."""
    for file in files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
    """Resident memory above what the process held at the beginning, after its imports; in MB."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        self.first = _status("VmRSS")

    def peak(self) -> float:
        """Return the largest amount since the beginning."""
        return _status("VmHWM") - self.first


class FamilyMemory:
    """Memory of this process and its children above what it held at the beginning; in MB. Shared pages count once."""

    def __init__(self) -> None:
        self.ended, self.first = Event(), self._held()
        self.most = self.first
        self.watcher = Thread(target=self._watch)
        self.watcher.start()

    def _watch(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self._held())

    def _held(self) -> float:
        found = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                of_process = dict(line.split(":", 1) for line in status.read_text().splitlines())
                if os.getpid() in (int(of_process["Pid"]), int(of_process["PPid"])):
                    lines = status.with_name("smaps_rollup").read_text().splitlines()
                    found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, StopIteration):  # it has just ended
                continue
        return found * 1024 / 1e6

    def peak(self) -> float:
        """Return the largest amount that was seen since the beginning; end watching."""
        self.ended.set()
        self.watcher.join()
        return self.most - self.first


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def bytes_read() -> int:
    """Return what this process had read from the disk, not from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def n_rows(minibatch: Any) -> int:
    """Return the number of cells of a minibatch: an array, a tensor, or (indptr, indices, data, number of genes)."""
    return len(minibatch[0]) - 1 if isinstance(minibatch, tuple) else minibatch.shape[0]


def check(minibatch: Any, output: str, shape: tuple[int, int], nnz: float) -> None:
    """Raise ValueError unless a minibatch has this shape and about so many values above zero a cell."""
    n, is_ours = n_rows(minibatch), isinstance(minibatch, tuple)
    if output == "dense":
        found, n_values = tuple(minibatch.shape), int(np.count_nonzero(np.asarray(minibatch)))
    else:
        found = (n, minibatch[3]) if is_ours else tuple(minibatch.shape)
        values = (
            minibatch[2] if is_ours else minibatch.values() if hasattr(minibatch, "crow_indices") else minibatch.data
        )
        n_values = int((np.asarray(values) > 0).sum())
    if found != shape or not 0.8 * nnz < n_values / n < 1.25 * nnz:
        raise ValueError(
            f"a minibatch has shape {found} and {n_values / n:.0f} values a cell; expected {shape}, {nnz:.0f}"
        )


def consume(begin: Callable[[], Iterator[Any]], seconds: float, at_least: int = 1) -> dict[str, float]:
    """Go through epochs; return cells a second, cores used and the 99th percentile of the gaps between minibatches.

    For so many seconds, and at least so many minibatches.
    """
    gaps, cells = [], 0
    cpu, start = time.process_time(), time.perf_counter()
    last = start
    while last - start < seconds or len(gaps) < at_least:
        for minibatch in begin():
            now = time.perf_counter()
            gaps.append(now - last)
            cells, last = cells + n_rows(minibatch), now
            if now - start >= seconds and len(gaps) >= at_least:
                break
    cpu = time.process_time() - cpu
    return {
        "cells_per_s": cells / (last - start),
        "cores": cpu / (last - start),
        "p99_gap_ms": percentile(gaps, 99) * 1e3,
    }


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` percent of all do not exceed."""
    return float(np.percentile(values, share, method="inverted_cdf"))


def warm(job: dict[str, Any]) -> dict[str, Any]:
    """Measure opening, the first minibatch, and then epochs, with all of the store in the page cache."""
    read_through(job["path"])
    memory, start = Memory(), time.perf_counter()
    begin = PEERS[job["loader"]].open(job["path"], job["batch_size"], job["output"], job["setting"])
    opened = time.perf_counter() - start
    minibatches = begin()
    next(minibatches)
    first = time.perf_counter() - start
    minibatches.close()
    consume(begin, job["seconds"] / 3, WARM_UP)
    found = {"open_s": opened, "first_batch_s": first, **consume(begin, job["seconds"]), "peak_mb": memory.peak()}
    check(next(begin()), job["output"], (job["batch_size"], job["n_vars"]), job["nnz"])
    return found


def cold(job: dict[str, Any]) -> dict[str, Any]:
    """Measure an epoch, begun with nothing of the store in the page cache, of a loader that went through one before."""
    begin = PEERS[job["loader"]].open(job["path"], job["batch_size"], job["output"], job["setting"])
    for _ in begin():
        pass
    drop_cached(job["path"])
    read, start = bytes_read(), time.perf_counter()
    cells = sum(n_rows(minibatch) for minibatch in begin())
    seconds = time.perf_counter() - start
    return {"cells_per_s": cells / seconds, "read_mb": (bytes_read() - read) / 1e6}


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Make a loader's store out of an h5ad, in the page cache; first of a few cells, so that all is compiled."""
    import anndata

    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.h5ad"
        anndata.read_h5ad(job["h5ad"], backed="r")[:FEW_CELLS].to_memory().write_h5ad(few)
        PEERS[job["loader"]].write(str(few), folder)
    read_through(job["h5ad"])
    memory, start, before = FamilyMemory(), time.perf_counter(), os.times()
    path = PEERS[job["loader"]].write(job["h5ad"], job["folder"])
    seconds, after = time.perf_counter() - start, os.times()
    found = files(path)
    counts = megabytes([file for file in found if "X" in file.relative_to(path).parts])
    return {
        "path": path,
        "seconds": seconds,
        "cpu_s": sum(after[:4]) - sum(before[:4]),  # children included
        "peak_mb": memory.peak(),
        "mb": megabytes(found),
        "counts_mb": counts,
    }


def about(loader: str) -> dict[str, str]:
    """Return the versions of Python and of a loader's packages."""
    return {"Python": sys.version.split()[0], **{package: version(package) for package in PEERS[loader].packages}}


def main() -> None:
    """Do the job of the first argument; write its result to the file that the second names."""
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    for module in PEERS[job["loader"]].modules:
        import_module(module)
    result = {"write": write, "warm": warm, "cold": cold, "quality": quality}[job["kind"]](job)
    Path(sys.argv[2]).write_text(json.dumps({**result, "versions": about(job["loader"])}))


if __name__ == "__main__":
    main()
