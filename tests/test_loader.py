"""store.loader: row k of a minibatch is source row rows[k]; interruptions change nothing and leave nothing behind."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortvi.config import Store, Validation
from cohortvi.files import write_json
from cohortvi.store import batches
from cohortvi.store import loader as module
from cohortvi.store.batches import Csr
from cohortvi.store.blocks import Blocks
from cohortvi.store.counts import CountsReader, write_counts
from cohortvi.store.layout import Rows
from cohortvi.store.loader import THREAD_NAME, Loader
from cohortvi.store.plan import Epoch, cut
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.shards import write_shard
from cohortvi.store.windows import Memories, Window, Windows

keeping = partial(Loader, copy=True)  # minibatches that may be looked at when others have come

SIZES = [37, 0, 1, 64, 20]


class Source(NamedTuple):
    """Stores and what they were written from, row by row through all of them."""

    manifests: list[Path]
    x: np.ndarray
    batch: np.ndarray
    age: np.ndarray


def write_store(folder: Path, name: str, x: np.ndarray, batch: np.ndarray, age: np.ndarray) -> Path:
    batch = pd.Categorical(batch, categories=["run1", "run2", "run3"])
    obs = pd.DataFrame({"batch": batch, "age": age, "row": np.arange(len(x)), "site": name})
    obs.index = pd.Index([f"{name}_{i}" for i in range(len(x))], dtype=object)
    var = pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])])
    manifest = write_counts([sp.csr_matrix(x)], obs, var, folder / f"{name}.zarr", sample=name)
    write_json(manifest, folder / f"{name}.json")
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """Stores of all three types of counts, with empty cells, an empty store and one of a single cell."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    x = rng.poisson(0.4, (sum(SIZES), 9)).astype(np.uint32)
    x[[3, 40]], x[5, 2], x[50, 8], x[120, 0] = 0, 255, 65_535, 2**24  # 2**24: whole in float32
    batch, age = rng.choice(["run1", "run3"], len(x)), rng.random(len(x))
    ends = np.cumsum([0, *SIZES])
    parts = [slice(start, stop) for start, stop in pairwise(ends)]
    paths = [write_store(folder, f"s{i}", x[part], batch[part], age[part]) for i, part in enumerate(parts)]
    return Source(paths, x, batch, age)


@pytest.fixture
def small_windows(monkeypatch):
    """Blocks of 5 rows and windows of 3 blocks, so that a small store has many."""
    monkeypatch.setattr(module, "Epoch", partial(Epoch, block=5, window_blocks=3))


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def same(first: list, second: list) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.x_ng, b.x_ng) and np.array_equal(a.rows, b.rows) for a, b in pairs)


@settings(max_examples=15, deadline=None)
@given(
    batch_size=st.integers(1, 150),
    seed=st.integers(0, 9),
    block=st.integers(1, 70),
    window=st.integers(1, 6),
    threads=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_row_k_is_the_source_row_of_that_number_and_every_cell_comes_once(
    source, batch_size, seed, block, window, threads, shuffle
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Epoch", partial(Epoch, block=block, window_blocks=window))
        settings = {"columns": ["batch", "age"], "shuffle": shuffle, "threads": threads}
        minibatches = list(keeping(ShardedCounts(source.manifests), batch_size=batch_size, seed=seed, **settings))
    for x_ng, obs, rows in minibatches:
        np.testing.assert_array_equal(x_ng.numpy(), source.x[rows])
        np.testing.assert_array_equal(np.array(["run1", "run2", "run3"])[obs["batch"]], source.batch[rows])
        np.testing.assert_array_equal(obs["age"].numpy(), source.age[rows].astype(np.float32))
        assert (x_ng.dtype, obs["batch"].dtype, obs["age"].dtype) == (torch.float32, torch.int64, torch.float32)
    served = np.concatenate([minibatch.rows for minibatch in minibatches])
    np.testing.assert_array_equal(np.sort(served) if shuffle else served, np.arange(len(source.x)))


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 60), world=st.integers(1, 5))
def test_the_ranks_together_see_what_one_alone_sees(source, batch_size, world):
    store = ShardedCounts(source.manifests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Epoch", partial(Epoch, block=20, window_blocks=2))
        alone = list(keeping(store, batch_size=batch_size, seed=0))
        ranks = [list(keeping(store, batch_size=batch_size, seed=0, rank=r, world=world)) for r in range(world)]
    assert {len(minibatches) for minibatches in ranks} == {len(alone)}
    for whole, *slices in zip(alone, *ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.rows for part in slices]), whole.rows)
        assert torch.equal(torch.cat([part.x_ng for part in slices]), whole.x_ng)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 60),
    block=st.integers(1, 30),
    world=st.integers(1, 4),
    threads=st.integers(1, 3),
    stopped=st.integers(0, 8),
    output=st.sampled_from(["dense", "csr_counts"]),
)
def test_stores_of_any_sizes_on_any_ranks_and_from_any_step(sizes, batch_size, block, world, threads, stopped, output):
    x = np.random.default_rng(0).poisson(0.5, (sum(sizes), 6)).astype(np.uint32)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Epoch", partial(Epoch, block=block, window_blocks=2))
        fixed = [(np.full(len(part), "run1"), np.zeros(len(part))) for part in parts]
        pairs = enumerate(zip(parts, fixed, strict=True))
        store = ShardedCounts([write_store(Path(folder), f"s{i}", part, *rest) for i, (part, rest) in pairs])
        common = {"batch_size": batch_size, "seed": 0, "output": output, "world": world, "threads": threads}
        loaders = [keeping(store, rank=rank, **common) for rank in range(world)]
        begun = [[minibatch for minibatch, _ in zip(loader, range(stopped), strict=False)] for loader in loaders]
        ranks = []
        for loader, first in zip(loaders, begun, strict=True):
            resumed = keeping(store, rank=loader.rank, **common)
            resumed.load_state_dict({**loader.state_dict(), "epoch": 0, "step": len(first)})
            ranks.append(first + list(resumed))
        expected = list(keeping(store, batch_size=batch_size, seed=0))
    for minibatches in ranks:
        for x_ng, _, rows in minibatches:
            np.testing.assert_array_equal(as_array(x_ng), x[rows])
    steps = [np.concatenate([part.rows for part in step]) for step in zip(*ranks, strict=True)]
    assert [step.tolist() for step in steps] == [minibatch.rows.tolist() for minibatch in expected]
    assert sorted(row for step in steps for row in step) == list(range(len(x)))


def as_array(x_ng: torch.Tensor | Csr) -> np.ndarray:
    if not isinstance(x_ng, Csr):
        return x_ng.numpy()
    arrays = (x_ng.data.numpy(), x_ng.indices.numpy().astype(int), x_ng.indptr.numpy())
    return sp.csr_matrix(arrays, (len(x_ng.indptr) - 1, x_ng.n_vars)).toarray()


def test_memory_that_is_still_written_to_is_not_used_again(source):
    store = ShardedCounts(source.manifests)
    windows = Windows(None, None, None, Memories(store), threads=1)
    for number, is_done in enumerate([True, False]):
        task = Future()
        if is_done:
            task.set_result([])
        window = Window.__new__(Window)
        window.memory, window.tasks, window.reads = windows.memories.take(), [task], None
        windows.open[number] = window
    done = windows.open[0].memory
    windows.release_before(2)
    assert windows.memories.free == [done]


@pytest.mark.parametrize("output", ["dense", "counts", "csr", "csr_counts"])
@pytest.mark.parametrize("copy", [True, False])
def test_every_output_holds_the_same_counts_in_its_types(source, small_windows, output, copy):
    store = ShardedCounts(source.manifests)
    types = {"dense": torch.float32, "counts": torch.uint32, "csr": torch.float32, "csr_counts": torch.uint32}
    for x_ng, _, rows in Loader(store, batch_size=16, seed=0, output=output, copy=copy, threads=2):
        if isinstance(x_ng, Csr):
            assert x_ng.indices.dtype == (torch.int32 if output == "csr" else torch.uint16)
            assert (x_ng.data.dtype, x_ng.n_vars) == (types[output], source.x.shape[1])
            arrays = (x_ng.data.numpy(), x_ng.indices.numpy().astype(int), x_ng.indptr.numpy())
            sparse = sp.csr_matrix(arrays, (len(rows), x_ng.n_vars))
            assert sparse.has_canonical_format
            found = sparse.toarray()
        else:
            assert x_ng.dtype == types[output]
            found = x_ng.numpy()
        np.testing.assert_array_equal(found, source.x[rows])
    with pytest.raises(ValueError, match="output: found 'sparse'; expected one of dense, counts, csr, csr_counts"):
        Loader(store, batch_size=16, seed=0, output="sparse")


@settings(max_examples=15, deadline=None)
@given(
    batch_size=st.integers(1, 60),
    block=st.integers(1, 40),
    group=st.integers(1, 100),
    share=st.sampled_from([1, 200, 2**22]),
    by_hand=st.booleans(),
    output=st.sampled_from(["dense", "counts", "csr", "csr_counts"]),
    world=st.integers(1, 3),
    step=st.integers(0, 3),
)
def test_minibatches_laid_out_together_and_by_several_threads_are_the_same(
    source, batch_size, block, group, share, by_hand, output, world, step
):
    store, served = ShardedCounts(source.manifests), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Epoch", partial(Epoch, block=block, window_blocks=2))
        patch.setattr(module, "GROUP_CELLS", group)
        patch.setattr(batches, "SHARE_BYTES", share)
        patch.setattr(batches, "SPARSE_SHARE_BYTES", share)
        if by_hand:
            patch.setattr(CountsReader, "is_native", lambda *types: False)
        common = {"batch_size": batch_size, "seed": 0, "output": output, "columns": ["age"], "threads": 2}
        plan = module.Epoch(store.sizes, batch_size=batch_size, seed=0, epoch=0)
        step = min(step, plan.n_steps)
        for rank in range(world):
            loader = Loader(store, **common, rank=rank, world=world)
            loader.load_state_dict({**loader.state_dict(), "step": step})
            for x_ng, obs, rows in loader:
                np.testing.assert_array_equal(as_array(x_ng), source.x[rows])
                np.testing.assert_array_equal(obs["age"].numpy(), source.age[rows].astype(np.float32))
                served.append(rows)
    pieces = [piece for k in range(step, plan.n_steps) for piece in plan.pieces(k)]
    expected = [numbers_of(store, plan, index)[plan.order(index)[start:stop]] for index, start, stop in pieces]
    empty = np.empty(0, int)
    assert sorted(np.concatenate([empty, *served])) == sorted(np.concatenate([empty, *expected]))


def numbers_of(store: ShardedCounts, plan: Epoch, window: int) -> np.ndarray:
    """Return the numbers of a window's rows in the store, through its blocks."""
    blocks = plan.blocks_of(window).tolist()
    return np.concatenate([np.arange(start, stop) + store.first_rows[shard] for shard, start, stop in blocks])


def test_blocks_that_no_thread_read_are_not_taken_for_read(source):
    store = ShardedCounts(source.manifests[3:4])
    with ThreadPoolExecutor(1) as pool:
        blocks = Blocks(store, cut(store.sizes, 20), pool)
        blocks.opened.result()
        nnz = int(blocks.indptr[-1])
        rows = Rows(blocks.indptr, np.full(nnz, 7, store.id_type), np.full(nnz, 7, store.count_type))
        blocks.stop()
        for task in blocks.read(rows, 1):
            task.result()
    assert len(blocks.jobs)
    assert (rows.data == 7).all()
    blocks.check()  # reads them
    first, stop = sum(SIZES[:3]), sum(SIZES[:4])
    arrays = (rows.data, rows.indices.astype(int), rows.indptr)
    np.testing.assert_array_equal(sp.csr_matrix(arrays, (stop - first, 9)).toarray(), source.x[first:stop])


@pytest.mark.slow
def test_without_the_libraries_functions_chunks_are_decoded_through_python(source, tmp_path):
    code = (
        "import sys; sys.modules['google_crc32c._crc32c'] = None\n"
        "from cohortvi import Loader, ShardedCounts; from cohortvi.store import native; assert not native.AVAILABLE\n"
        "print(sum(float(x_ng.sum()) for x_ng, _, _ in Loader(ShardedCounts(sys.argv[1:]), batch_size=8, seed=0)))"
    )
    command = [sys.executable, "-c", code, *map(str, source.manifests)]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(source.x.sum())


def test_memory_is_used_again_unless_copies_are_asked_for(source, small_windows, monkeypatch):
    monkeypatch.setattr(module, "GROUP_CELLS", 1)
    store = ShardedCounts(source.manifests)
    places = {minibatch.x_ng.data_ptr() for minibatch in Loader(store, batch_size=8, seed=0)}
    kept = list(keeping(store, batch_size=8, seed=0))
    assert len(places) == 1
    assert len({minibatch.x_ng.data_ptr() for minibatch in kept}) == len(kept)


def test_a_forked_child_is_told_to_open_the_stores_itself(source):
    store = ShardedCounts(source.manifests)
    child = os.fork()
    if child == 0:
        try:
            next(iter(Loader(store, batch_size=8, seed=0)))
        except RuntimeError as error:
            os._exit("Open the stores in the child" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_resuming_at_any_step_goes_on_as_if_never_stopped(source, small_windows):
    store = ShardedCounts(source.manifests)
    loader, minibatches, states = keeping(store, batch_size=16, seed=1), [], []
    for _ in range(2):
        for minibatch in loader:
            minibatches.append(minibatch)
            states.append(json.dumps(loader.state_dict()))
    assert len(states) == 2 * loader.n_steps(0)
    for k, state in enumerate(states):
        resumed = keeping(store, batch_size=16, seed=1, threads=2)
        resumed.load_state_dict(json.loads(state))
        rest = [minibatch for _ in range(2) for minibatch in resumed]
        assert same(rest[: len(minibatches) - k - 1], minibatches[k + 1 :])


def test_resuming_with_other_ranks_goes_on_with_the_same_steps(source, small_windows):
    store = ShardedCounts(source.manifests)
    whole, begun = list(keeping(store, batch_size=16, seed=1)), keeping(store, batch_size=16, seed=1, world=3)
    for _, _ in zip(range(4), begun, strict=False):
        pass
    ranks = [keeping(store, batch_size=16, seed=1, rank=rank, world=2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict({**begun.state_dict(), "step": 4})
    rest = [np.concatenate([part.rows for part in slices]) for slices in zip(*ranks, strict=True)]
    np.testing.assert_array_equal(np.concatenate(rest), np.concatenate([part.rows for part in whole[4:]]))


def test_an_iteration_goes_on_after_a_break_and_the_next_epoch_is_another(source):
    store = ShardedCounts(source.manifests)
    whole, loader = list(keeping(store, batch_size=16, seed=1)), keeping(store, batch_size=16, seed=1)
    begun = []
    for minibatch in loader:
        begun.append(minibatch)
        if len(begun) == 3:
            break
    assert (loader.epoch, loader.step) == (0, 3)
    assert same(begun + list(loader), whole)
    assert (loader.epoch, loader.step) == (1, 0)
    assert not same(list(loader), whole)


def test_a_resumed_loader_reads_no_window_before_its_own(source, small_windows, monkeypatch):
    store, read = ShardedCounts(source.manifests), reads(monkeypatch)
    plan = Epoch(store.sizes, batch_size=10, seed=0, epoch=0, block=5, window_blocks=3)
    loader = keeping(store, batch_size=10, seed=0)
    loader.load_state_dict({**loader.state_dict(), "step": plan.n_steps - 1})
    assert len(list(loader)) == 1
    assert plan.n_windows > 4
    windows = {piece.window for piece in plan.pieces(plan.n_steps - 1)}
    assert set(read) == {tuple(map(int, block)) for window in windows for block in plan.blocks_of(window)}


def reads(monkeypatch) -> list[tuple[int, int, int]]:
    """Return a list that is filled with the blocks that are read: store, first row, end."""
    read, original = [], Blocks.read

    def read_all(self, *given):
        read.extend(map(tuple, self.blocks.tolist()))
        return original(self, *given)

    monkeypatch.setattr(Blocks, "read", read_all)
    return read


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_next_window_is_read_while_one_is_served_and_no_other(source, small_windows, monkeypatch):
    monkeypatch.setattr(module, "GROUP_CELLS", 1)
    store, read = ShardedCounts(source.manifests), reads(monkeypatch)
    plan = Epoch(store.sizes, batch_size=2, seed=0, epoch=0, block=5, window_blocks=3)
    blocks = [{tuple(map(int, block)) for block in plan.blocks_of(window)} for window in range(3)]
    steps = [plan.pieces(step)[-1].window for step in range(plan.n_steps)]
    iterator = iter(keeping(store, batch_size=2, seed=0))
    next(iterator)
    assert wait_until(lambda: set(read) >= blocks[0])
    assert not set(read) & blocks[2]
    for _ in range(steps.index(1) - 2):
        next(iterator)
    assert wait_until(lambda: set(read) >= blocks[0] | blocks[1])
    assert not set(read) & blocks[2]
    iterator.close()


def test_no_thread_is_left_by_an_iteration_that_ends_however_it_does(source, small_windows):
    store = ShardedCounts(source.manifests)
    list(keeping(store, batch_size=8, seed=0, threads=2))
    assert not our_threads()
    for _ in keeping(store, batch_size=8, seed=0, threads=2):
        assert our_threads()
        break
    assert not our_threads()
    iterator = iter(keeping(store, batch_size=8, seed=0))
    next(iterator)
    del iterator
    assert not our_threads()
    with pytest.raises(ZeroDivisionError):
        train_until_error(store)
    assert not our_threads()


def train_until_error(store: ShardedCounts) -> None:
    for _ in keeping(store, batch_size=8, seed=0, threads=2):
        raise ZeroDivisionError


def test_the_interpreter_exits_while_an_iteration_is_suspended(source):
    code = (
        "import sys; from cohortvi.store.loader import Loader; from cohortvi.store.sharded import ShardedCounts\n"
        "iterator = iter(Loader(ShardedCounts(sys.argv[1:]), batch_size=8, seed=0)); next(iterator); print('served')"
    )
    command = [sys.executable, "-c", code, *map(str, source.manifests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")


def test_damage_reaches_the_consumer_as_an_error_that_names_the_store(source, tmp_path):
    path = write_store(tmp_path, "s", source.x[:50], source.batch[:50], source.age[:50])
    loader = keeping(ShardedCounts([path]), batch_size=8, seed=0)
    (tmp_path / "s.zarr" / "X" / "data" / "c" / "0").unlink()
    with pytest.raises(ValueError, match=r"s\.zarr: cells 0 to 50 cannot be read .*run the workflow again"):
        next(iter(loader))
    assert not our_threads()


def test_a_store_without_cells_yields_nothing(source):
    loader = keeping(ShardedCounts(source.manifests[1:2]), batch_size=8, seed=0, columns=["batch"])
    assert list(loader) == []
    assert loader.n_steps(0) == 0


def test_columns_that_cannot_be_delivered_are_refused(source, tmp_path):
    store = ShardedCounts(source.manifests)
    assert store.categories["batch"] == ["run1", "run2", "run3"]
    with pytest.raises(ValueError, match="column 'height' is not one that all stores have"):
        keeping(store, batch_size=8, seed=0, columns=["height"])
    batch, age = source.batch[:20].astype(object), np.full(20, np.nan)
    batch[7] = None
    gaps = ShardedCounts([write_store(tmp_path, "s", source.x[:20], batch, age)])
    for name in ("batch", "age"):
        with pytest.raises(ValueError, match=f"column '{name}' has no value for some cells"):
            list(keeping(gaps, batch_size=8, seed=0, columns=[name]))


def test_a_column_of_one_value_is_delivered_and_its_loss_noticed(source, tmp_path):
    path = write_store(tmp_path, "s", source.x[:50], np.full(50, "run1"), np.zeros(50))
    (minibatch,) = keeping(ShardedCounts([path]), batch_size=50, seed=0, columns=["batch", "age", "site"])
    assert all((values == 0).all() for values in minibatch.obs.values())
    (tmp_path / "s.zarr/obs/batch/codes/c/0").unlink()
    with pytest.raises(ValueError, match=r"s\.zarr: column 'batch' cannot be read .*run the workflow again"):
        list(keeping(ShardedCounts([path]), batch_size=50, seed=0, columns=["batch"]))


def test_stores_of_different_genes_are_refused(source, tmp_path):
    other = write_store(tmp_path, "s", source.x[:5, :8], source.batch[:5], source.age[:5])
    with pytest.raises(ValueError, match="its genes are not those of"):
        ShardedCounts([*source.manifests, other])
    with pytest.raises(ValueError, match="no store was given"):
        ShardedCounts([])


def test_the_state_of_another_sequence_is_refused(source):
    store = ShardedCounts(source.manifests)
    state = keeping(store, batch_size=8, seed=0).state_dict()
    others = {
        "seed": keeping(store, batch_size=8, seed=1),
        "batch_size": keeping(store, batch_size=9, seed=0),
        "store": keeping(ShardedCounts(source.manifests[:1]), batch_size=8, seed=0),
    }
    for name, loader in others.items():
        with pytest.raises(ValueError, match=f"loader state: {name} is"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        keeping(store, batch_size=8, seed=0, rank=2, world=2)


def entropy(labels: np.ndarray) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def test_minibatches_mix_samples_as_a_true_shuffle_does(tmp_path):
    n_samples, n_cells, batch_size = 12, 600, 256
    x, age = np.ones((n_cells, 2), np.uint32), np.zeros(n_cells)
    paths = [write_store(tmp_path, f"{i:02}", x, np.full(n_cells, "run1"), age) for i in range(n_samples)]
    split = Store(2, Validation(1e-12, "cell"), 0)
    for shard, name in enumerate(["train-0000", "train-0001"]):
        manifest = write_shard(paths, "train", shard, tmp_path / "shards" / f"{name}.zarr", seed=0, store=split)
        write_json(manifest, tmp_path / "shards" / f"{name}.json")
    store = ShardedCounts(sorted((tmp_path / "shards").glob("*.json")))
    loader = keeping(store, batch_size=batch_size, seed=0, columns=["site"])
    found = [entropy(minibatch.obs["site"].numpy()) for minibatch in loader]
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(n_samples), n_cells)
    true = [entropy(part) for _ in range(5) for part in np.array_split(rng.permutation(labels), len(found))]
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.002)


@pytest.mark.parametrize("output", ["counts", "csr_counts"])
def test_seventy_thousand_genes_and_the_largest_counts_come_through(tmp_path, output):
    largest = [255, 256, 65_535, 65_536, 2**32 - 1]
    cells, genes = np.array([0, 0, 2, 3, 3, 5]), np.array([0, 69_999, 65_536, 1, 65_535, 69_999])
    x = sp.csr_matrix((np.array([*largest, 1], np.uint32), (cells, genes)), shape=(6, 70_000))
    obs = pd.DataFrame({"row": np.arange(6)}, index=[f"c{i}" for i in range(6)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(70_000)])
    write_json(write_counts([x], obs, var, tmp_path / "s.zarr", sample="s"), tmp_path / "s.json")
    store = ShardedCounts(tmp_path / "s.json")
    for x_ng, _, rows in Loader(store, batch_size=4, seed=0, output=output, threads=2):
        if output == "csr_counts":
            assert x_ng.indices.dtype == torch.uint32
            arrays = (x_ng.data.numpy(), x_ng.indices.numpy().astype(np.int64), x_ng.indptr.numpy())
            found = sp.csr_matrix(arrays, (len(rows), 70_000))
        else:
            found = sp.csr_matrix(x_ng.numpy())
        assert (found != x[rows]).nnz == 0
