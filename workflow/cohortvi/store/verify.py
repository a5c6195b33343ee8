"""Read the stores of a cohort from end to end and say what is damaged: `python -m cohortvi.store.verify FOLDER`.

A store is sound if it is the one that its manifest describes, every chunk and every index of its arrays agrees with its
crc32c, the chunks of X and the tables agree with their digests, and its rows are counts: ends that rise, ids that rise
below n_vars, no zero. Memory: the obs of one store, and a block of rows for each thread.
"""

import argparse
import hashlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from cohortvi.files import digest, read_json
from cohortvi.store.arrays import ArrayReader, arrays_of
from cohortvi.store.counts import CountsReader
from cohortvi.store.kernels import first_bad_row
from cohortvi.store.layout import RUN, content_digest, repair
from cohortvi.store.opening import open_counts
from cohortvi.store.shards import READ_CELLS, check_genes


def verify(folder: Path, threads: int) -> list[str]:
    """Check the stores in `folder`, its counts/ and its shards/; print a line for each and each fault; return these."""
    places = [folder, folder / "counts", folder / "shards"]
    found = [path for place in places for end in ("json", "zarr") for path in place.glob(f"*.{end}")]
    faults = [] if found else [f"{folder}: no store; expected a folder that holds stores, or counts/ and shards/"]
    manifests: dict[Path, dict[str, Any]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path in sorted({path.with_suffix(".json") for path in found}):
            try:
                reader = open_counts(path)
            except ValueError as error:
                faults.append(str(error))
                print(faults[-1])
                continue
            manifests[path] = reader.manifest
            began, before = time.monotonic(), len(faults)
            faults += [f"{reader.path}: {fault}; {repair(path)}" for fault in store_faults(reader, pool)]
            size = sum(file.stat().st_size for file in reader.path.rglob("*") if file.is_file()) / 1e6
            line = f"{reader.n_obs:,} cells  {size:,.1f} MB  {size / (time.monotonic() - began):,.0f} MB/s"
            print(f"{reader.path}: {line}", *faults[before:], sep="\n", flush=True)
    is_whole = len(manifests) == len({path.with_suffix("") for path in found})
    between = list(cohort_faults(manifests)) if is_whole else []  # else what is missing is known already
    print(*between, f"{len(manifests)} stores read, {len(faults + between)} faults", sep="\n")
    return faults + between


def store_faults(reader: CountsReader, pool: Executor) -> list[str]:
    """Return what is wrong with a store that could be opened, by chunk, file, rows or table."""
    faults, digests = zip(*pool.map(_content, (reader.indptr, reader.indices, reader.data)), strict=True)
    found = [*_metadata_faults(reader), *chain(*faults)]
    if not any(faults):  # else each damaged chunk has its line
        if content_digest((reader.n_obs, reader.n_vars), digests) != reader.manifest["content"]:
            found.append("X: its chunks are not those that were written")
        starts = range(0, reader.n_obs, READ_CELLS)
        found += chain(*pool.map(lambda start: _row_faults(reader, start), starts))
    return [*found, *_table_faults(reader, "obs"), *_table_faults(reader, "var")]


def _content(array: ArrayReader) -> tuple[list[str], str]:
    """Return the faults of an array's chunks and indices, and the digest of all chunks, as its writer made it."""
    faults, sha = [], hashlib.sha256()
    for number, file in enumerate(array.files):
        try:
            for chunk, data, is_sound in array.stored(number):
                sha.update(data)
                if not is_sound:
                    faults.append(f"{file}: chunk {chunk} differs from its crc32c")
        except (ValueError, OSError) as error:
            faults.append(str(error))
    return faults, sha.hexdigest()


def _row_faults(reader: CountsReader, start: int) -> list[str]:
    stop = min(start + READ_CELLS, reader.n_obs)
    try:
        rows = reader.read(start, stop)
    except ValueError as error:
        return [f"X: rows {start} to {stop} cannot be read ({error.__cause__})"]
    bad = first_bad_row(*rows, reader.n_vars)
    return [f"X: row {start + bad} holds a zero, an unsorted gene or one beyond var"] if bad >= 0 else []


def _table_faults(reader: CountsReader, name: str) -> list[str]:
    """Return the faults in the arrays of obs or var or, if there are none, of the whole."""
    faults = [fault for array in arrays_of(reader.root[name]) if array.checked for fault in _content(array)[0]]
    if faults:
        return faults
    try:
        names = getattr(reader, name).index.tolist()
    except ValueError as error:
        return [f"{name}: {error.__cause__}"]
    is_other = name == "var" and digest(names) != reader.manifest["genes"]
    return ["var: its genes are not those of the manifest"] if is_other else []


def _metadata_faults(reader: CountsReader) -> Iterator[str]:
    """Compare the metadata of groups and arrays, which readers of a part of the store look at, with the root's."""
    for name, expected in read_json(reader.path / "zarr.json")["consolidated_metadata"]["metadata"].items():
        expected.pop("consolidated_metadata", None)
        try:
            is_same = read_json(reader.path / name / "zarr.json") == expected
        except (OSError, ValueError):
            is_same = False
        if not is_same:
            yield f"{name}/zarr.json: not what the zarr.json of the store says of {name}"


def cohort_faults(manifests: dict[Path, dict[str, Any]]) -> Iterator[str]:
    """Yield what is wrong between stores: shards of different genes, cells that do not lie in the shards once each."""
    shards = {path: manifest for path, manifest in manifests.items() if "split" in manifest}
    folder = shlex.quote(str(next(iter(shards), Path()).parent))
    again = f"(rm -rf {folder}/train-* {folder}/validation-*; {RUN} --forcerun shard --until shard)"
    try:
        _ = shards and check_genes(shards)
    except ValueError as error:
        yield f"{error} without the shards {again}"
    kept, gathered = Counter(), Counter()
    for path, manifest in manifests.items():
        (gathered if path in shards else kept).update(manifest["samples"])
    wrong = [name for name in sorted(kept.keys() & gathered.keys()) if kept[name] != gathered[name]]
    for name in wrong[:1]:
        found = f"{gathered[name]} of the {kept[name]} cells of sample {name!r}; one is missing or not of this cohort"
        yield f"{folder}: the shards hold {found}: run the workflow again without them {again}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    raise SystemExit(1 if verify(arguments.folder, arguments.threads) else 0)
