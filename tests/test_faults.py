"""Faults of the store: whatever befalls its files, a reader gets what was written or an error that says what to do."""

import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from tiny_cohort import STORE, simulate, write_samples

from cohortvi.files import read_json, remove, write_json
from cohortvi.store import array_writer, layout
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.shards import write_shard
from cohortvi.store.verify import verify

GENES = pd.DataFrame({"symbol": [f"S{i}" for i in range(20)]}, index=[f"gene{i}" for i in range(20)])
REPAIR = r"run the workflow again.* \(rm -rf \S+\.zarr \S+\.json; snakemake --cores all \S+\.json\)"


@contextmanager
def small_chunks() -> Iterator[None]:
    """Have every array of a small store lie in several chunks, those of X in several files."""
    chunks = layout.Codecs(indices=64, data=64, indptr=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_writer, "FILE_CHUNKS", 4)
        patch.setattr(layout, "OBS_CHUNK", 16)
        codecs = [codec._replace(chunk=chunk) for codec, chunk in zip(layout.COMPACT, chunks, strict=True)]
        patch.setattr(layout, "COMPACT", layout.Codecs(*codecs))
        yield


def write(counts: list[Path], folder: Path, seed: int = 0) -> Path:
    """Write a shard and its manifest, as scripts/shard.py does; return the manifest's path."""
    store = folder / "train-0000.zarr"
    with small_chunks():
        manifest = write_shard(counts, "train", 0, store, seed=seed, store=STORE, genes=GENES)
    write_json(manifest, store.with_suffix(".json"))
    return store.with_suffix(".json")


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> list[Path]:
    """The manifests of two samples' counts, of which the shards are made."""
    folder = tmp_path_factory.mktemp("cohort")
    with small_chunks():
        return write_samples(folder, {f"s{i}": simulate(90, seed=i) for i in range(2)}, shards=False)


@pytest.fixture(scope="module")
def whole(counts, tmp_path_factory) -> Path:
    """The manifest of a shard that is left as it was written."""
    return write(counts, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def shard(whole, tmp_path) -> Path:
    """The manifest of a copy of it that a test may damage."""
    shutil.copytree(whole.parent, tmp_path / "shards")
    return tmp_path / "shards" / whole.name


def by_reader(manifest: Path) -> list[Any]:
    """Return all that CountsReader says of a store: counts, tables, columns and their categories."""
    reader = open_counts(manifest)
    x = np.concatenate([chunk.toarray() for _, chunk in reader.chunks(17)])
    columns = [reader.column(name, 0, reader.n_obs) for name in reader.manifest["columns"]]
    return [x, reader.obs, reader.var, *columns, *(reader.categories(name) for name in reader.manifest["columns"])]


def by_loader(manifest: Path) -> list[Any]:
    """Return an epoch by the loader, with all columns."""
    store = ShardedCounts([manifest])
    loader = Loader(store, batch_size=16, seed=0, columns=store.columns, copy=True, threads=2)
    return [part for x, obs, rows in loader for part in (x.numpy(), *(obs[name].numpy() for name in obs), rows)]


def is_equal(found: list[Any], expected: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, pd.DataFrame):
            return a.equals(b)
        return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b

    return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def expected(whole) -> dict[Any, list[Any]]:
    return {read: read(whole) for read in (by_reader, by_loader)}


def errors(manifest: Path, expected: dict[Any, list[Any]]) -> list[str]:
    """Return what reader and loader say of a damaged store; they may say nothing if they read what was written."""
    found = []
    for read, values in expected.items():
        try:
            assert is_equal(read(manifest), values), "read in spite of the damage, with other values"
        except ValueError as error:
            found.append(str(error))
            assert re.search(rf"{manifest.stem}\.(zarr|json): .*{REPAIR}$", found[-1])
    return found


def files_of(manifest: Path) -> list[Path]:
    return [path for path in sorted(manifest.parent.rglob("*")) if path.is_file()]


def is_named(file: Path, message: str) -> bool:
    """Say whether the array, or the document, in which a file lies is named: by its path, or as zarr and anndata do."""
    if file.parent.name != "c":
        return file.name in message
    array = file.parent.parent
    path, column = f"{array.parent.name}/{array.name}", array.parent.name
    return any(name in message for name in (f"{path}/c/{file.name}", f"{path}: ", f"key '{array.name}'", f"'{column}'"))


def check(file: Path, manifest: Path, expected: dict[Any, list[Any]]) -> None:
    """Assert that reader, loader and `verify` see that a file is damaged."""
    found, faults = errors(manifest, expected), verify(manifest.parent, threads=2)
    assert len(faults) == 1
    assert re.search(rf"{manifest.stem}\.(zarr|json): .*{REPAIR}$", faults[0])
    assert is_named(file, faults[0])
    if file.name == "zarr.json" and file.parent != manifest.with_suffix(".zarr"):
        assert not found  # it stands in the store's own zarr.json too, and is read there
    else:
        assert any(is_named(file, error) for error in found)
    assert len(found) == 2 or "X" not in file.parts or file.name == "zarr.json"


@pytest.mark.slow
def test_every_flipped_bit_is_noticed_and_named(shard, expected):
    files, rng = files_of(shard), np.random.default_rng(0)
    for i in range(200):
        file = files[i % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        check(file, shard, expected)
        file.write_bytes(content)
    assert verify(shard.parent, threads=2) == []


def test_every_file_that_is_lost_or_cut_is_noticed_and_named(shard, expected):
    rng = np.random.default_rng(0)
    for file in [file for file in files_of(shard) if file.parent.name in ("c", "shards", "train-0000.zarr", "sex")]:
        content = file.read_bytes()
        file.write_bytes(content[: rng.integers(len(content))])
        check(file, shard, expected)
        file.unlink()
        check(file, shard, expected)
        file.write_bytes(content)
    assert verify(shard.parent, threads=2) == []


def test_a_store_without_a_manifest_and_a_manifest_without_a_store_are_faults(shard, expected):
    store, aside = shard.with_suffix(".zarr"), shard.with_name("aside")
    shard.rename(aside)
    (fault,) = verify(shard.parent, threads=1)
    assert errors(shard, expected) == [fault] * 2
    assert "train-0000.json: no such manifest" in fault
    aside.rename(shard)
    store.rename(aside)
    (fault,) = verify(shard.parent, threads=1)
    assert errors(shard, expected) == [fault] * 2
    assert "train-0000.zarr: no store that can be opened" in fault
    shard.unlink()
    (fault,) = verify(shard.parent, threads=1)
    assert "no store; expected a folder that holds stores" in fault


def test_a_manifest_that_disagrees_in_anything_is_refused(shard, counts, expected):
    facts, other = read_json(shard), read_json(write(counts, shard.parent / "other", seed=1))
    damaged = [other, list(facts), {**facts, "another": 1}, *({**facts, name: None} for name in facts)]
    damaged += [{key: value for key, value in facts.items() if key != name} for name in facts]
    for manifest in damaged:
        write_json(manifest, shard)
        (fault,) = verify(shard.parent, threads=1)
        assert errors(shard, expected) == [fault] * 2


def test_shards_that_do_not_hold_the_cells_of_the_counts_once_over_the_same_genes_are_faults(tmp_path):
    counts = write_samples(tmp_path, {f"s{i}": simulate(40, seed=i) for i in range(2)})
    shards, (first, *_) = tmp_path / "shards", sorted((tmp_path / "shards").iterdir())
    assert verify(tmp_path, threads=2) == []
    for end in (".json", ".zarr"):
        remove(first.with_suffix(end))
    (fault,) = verify(tmp_path, threads=2)
    assert re.search(r"the shards hold \d+ of the 40 cells of sample 's0'; .*rm -rf \S+/shards/train-\* ", fault)
    write(counts, shards)  # 20 of the 30 genes
    (fault,) = verify(tmp_path, threads=2)
    assert re.search(r"different genes: .*train-0000\.json.* Run the workflow again without the shards", fault)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("content_digest", lambda *_: "0", "X: its chunks are not those that were written"),
        ("table_digest", lambda _: "0", "obs: it is not the table that was written"),
        ("first_bad_row", lambda *_: -1, "X: row 5 holds a zero, an unsorted gene or one beyond var"),
    ],
)
def test_what_no_checksum_tells_is_found(tmp_path, monkeypatch, name, value, message):
    """Stores of a writer that was wrong itself."""
    x, obs = simulate(40, seed=0)
    x = sp.csr_matrix(x)
    x.data[x.indptr[5]] = 0 if name == "first_bad_row" else 1
    monkeypatch.setattr(layout, name, value)
    var = pd.DataFrame(index=[f"gene{i}" for i in range(x.shape[1])])
    write_json(write_counts([x], obs, var, tmp_path / "s.zarr", sample="s"), tmp_path / "s.json")
    monkeypatch.undo()
    assert verify(tmp_path, threads=2)[0].startswith(f"{tmp_path}/s.zarr: {message}; run the workflow again")


def test_the_command_says_what_it_found_and_fails(shard):
    (shard.with_suffix(".zarr") / "X/data/c/1").unlink()
    command = [sys.executable, "-m", "cohortvi.store.verify", str(shard.parent), "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    line, fault, total = done.stdout.splitlines()
    assert (done.returncode, done.stderr, total) == (1, "", "1 stores read, 1 faults")
    assert re.fullmatch(rf"{shard.with_suffix('.zarr')}: 71 cells  0\.\d MB  [\d,]+ MB/s", line)
    assert "X/data/c/1" in fault


def write_and_say(counts: list[Path], folder: Path, to_parent: Connection) -> None:
    """Write a shard in a process of its own, once its code is loaded; say when it begins and when it is done."""
    with tempfile.TemporaryDirectory() as aside:
        write(counts, Path(aside))
    to_parent.send("begun")
    write(counts, folder)
    to_parent.send("done")


def start_writer(counts: list[Path], folder: Path) -> tuple[Any, Connection]:
    """Start a process that writes a shard; return it, when it has begun, and what it says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cohortvi.store.loader", "cohortvi.inference.train", "pytest"])
    ours, theirs = context.Pipe()
    process = context.Process(target=write_and_say, args=(counts, folder, theirs))
    process.start()
    ours.recv()
    return process, ours


@pytest.mark.slow
def test_a_killed_writer_leaves_no_store_that_opens_with_wrong_content(tmp_path, counts, expected):
    """Every second one finds another shard of the same name, which may be read until the new one is whole."""
    older = write(counts, tmp_path / "older", seed=1)
    contents = {read: [read(older), values] for read, values in expected.items()}
    process, said = start_writer(counts, tmp_path / "undisturbed")
    began = time.monotonic()
    said.recv()
    seconds, rng, found = time.monotonic() - began, np.random.default_rng(0), []
    process.join()
    for kill in range(20):
        folder, is_there = tmp_path / f"killed{kill}", kill % 2 == 1
        if is_there:
            shutil.copytree(older.parent, folder)
        process, said = start_writer(counts, folder)
        slept = 1.5 * seconds * (kill + rng.random()) / 20
        time.sleep(slept)
        if said.poll():  # it was done before: the first one was slower, on a machine with other work
            seconds = min(seconds, slept)
        process.kill()
        process.join()
        for read, allowed in contents.items():
            try:
                values = read(folder / older.name)
            except ValueError:
                found.append("refused")
            else:
                found.append([is_equal(values, content) for content in allowed].index(True))
                assert is_there or found[-1] == 1
        if kill >= 18:  # what was left does not stand in the way of the next
            write(counts, folder)
            assert is_equal(by_reader(folder / older.name), expected[by_reader])
            assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".zarr"]
    assert found.count("refused") >= 5  # the moments lie within the writing
