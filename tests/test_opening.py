"""store.opening: stores of other programs, behind URLs and over joined genes are read as the same counts."""

import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import fsspec
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cohortvi
from cohortvi.files import write_json
from cohortvi.store import counts as counts_module
from cohortvi.store import loader as module
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.opening import open_counts
from cohortvi.store.plan import Epoch
from cohortvi.store.sharded import ShardedCounts

keeping = partial(Loader, copy=True)


class Source(NamedTuple):
    """A store of ours, and what it holds."""

    manifest: Path
    adata: ad.AnnData


def simulate(n: int, genes: list[str], seed: int = 0) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(0.5, (n, len(genes))).astype(np.float32))
    kinds = pd.Categorical(rng.choice(["a", "b"], n), categories=["a", "b"])
    obs = pd.DataFrame({"kind": kinds, "age": rng.random(n), "row": np.arange(n)}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(x, obs, pd.DataFrame(index=genes))


def write_ours(adata: ad.AnnData, folder: Path, name: str = "own") -> Path:
    counts, var = sp.csr_matrix(adata.X, dtype=np.uint32), adata.var[[]]
    write_json(write_counts([counts], adata.obs, var, folder / f"{name}.zarr", sample=name), folder / f"{name}.json")
    return folder / f"{name}.json"


def write_theirs(adata: ad.AnnData, path: Path, zarr_format: int = 3) -> Path:
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=zarr_format):
        warnings.filterwarnings("ignore", "Writing zarr v2 data")
        adata.write_zarr(path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    adata = simulate(300, [f"g{i}" for i in range(12)])
    return Source(write_ours(adata, tmp_path_factory.mktemp("own")), adata)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "Epoch", partial(Epoch, block=20, window_blocks=3))


def check(store: ShardedCounts, expected: np.ndarray, output: str = "dense", threads: int = 2) -> None:
    """Compare an epoch with dense counts, cell by cell, and see each cell once."""
    served = []
    for x_ng, _, rows in keeping(store, batch_size=32, seed=0, output=output, threads=threads):
        found = x_ng
        if not torch.is_tensor(x_ng):
            arrays = (x_ng.data.numpy(), x_ng.indices.numpy().astype(int), x_ng.indptr.numpy())
            found = sp.csr_matrix(arrays, (len(rows), x_ng.n_vars)).toarray()
        np.testing.assert_array_equal(found, expected[rows])
        served.append(rows)
    np.testing.assert_array_equal(np.sort(np.concatenate(served)), np.arange(len(expected)))


def test_three_lines_in_a_notebook(source):
    store = cohortvi.ShardedCounts(source.manifest)
    loader = cohortvi.Loader(store, batch_size=64, seed=0)
    assert sum(len(x_ng) for x_ng, _, _ in loader) == 300
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        cohortvi.Trainer  # noqa: B018 (asked for, to fail)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_any_anndata_in_zarr_with_csr_is_read_as_it_lies(source, tmp_path, dtype, zarr_format):
    adata = source.adata.copy()
    adata.X = adata.X.astype(dtype)
    store = ShardedCounts(write_theirs(adata, tmp_path / "other.zarr", zarr_format))
    assert list(store.var_names) == list(adata.var_names)
    assert store.categories == {"kind": ["a", "b"]}
    for output in ("dense", "csr"):
        check(store, adata.X.toarray(), output)
    minibatch = next(iter(keeping(store, batch_size=300, seed=0, columns=["kind", "age"])))
    np.testing.assert_array_equal(minibatch.obs["kind"], adata.obs["kind"].cat.codes.to_numpy()[minibatch.rows])
    if dtype is np.float32:
        with pytest.raises(ValueError, match="output 'counts': the store holds float32"):
            keeping(store, batch_size=8, seed=0, output="counts")
    else:
        check(store, adata.X.toarray(), "csr_counts")


def test_a_collection_as_annbatch_writes_it_is_read_as_its_data_sets_one_after_the_other(source, tmp_path):
    root = zarr.open_group(tmp_path / "collection.zarr", mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    parts = [source.adata[:10].copy(), source.adata[10:200].copy(), source.adata[200:].copy()]
    for number, part in zip((2, 10, 11), parts, strict=True):  # in the order of numbers, not of names
        part.X.indices = part.X.indices.astype(np.uint16)
        ad.io.write_elem(root, f"dataset_{number}", part)
    store = ShardedCounts(tmp_path / "collection.zarr")
    assert store.sizes == [10, 190, 100]
    check(store, source.adata.X.toarray())


def test_rows_that_others_left_unsorted_are_sorted_and_a_gene_that_stands_twice_is_refused(source, tmp_path):
    unsorted = source.adata.copy()
    x, rng = unsorted.X, np.random.default_rng(0)
    for start, stop in pairwise(x.indptr):
        order = start + rng.permutation(stop - start)
        x.indices[start:stop], x.data[start:stop] = x.indices[order], x.data[order]
    x.has_sorted_indices = False
    write_theirs(unsorted, tmp_path / "unsorted.zarr")
    check(ShardedCounts(tmp_path / "unsorted.zarr"), source.adata.X.toarray(), "csr")
    row = int(np.flatnonzero(np.diff(x.indptr) > 1)[0])
    x.indices[x.indptr[row] : x.indptr[row] + 2] = 3
    write_theirs(unsorted, tmp_path / "twice.zarr")
    with pytest.raises(ValueError, match=rf"twice\.zarr: .*cell {row} has a gene twice"):
        list(Loader(ShardedCounts(tmp_path / "twice.zarr"), batch_size=8, seed=0))


def test_checksums_of_others_say_nothing_of_their_ids(source, tmp_path):
    path = write_theirs(source.adata, tmp_path / "crc.zarr")
    root = zarr.open_group(path, mode="a")
    ids = source.adata.X.indices.astype(np.uint16)
    ids[5] = 12  # one beyond the genes
    del root["X/indices"]
    shape = {"chunks": (len(ids),), "shards": (len(ids),), "compressors": [zarr.codecs.Crc32cCodec()]}
    root["X"].create_array("indices", data=ids, **shape)
    zarr.consolidate_metadata(path)
    store = open_counts(path)
    assert store.indices.checked
    with pytest.raises(ValueError, match=r"crc\.zarr: .*values from 0 to 12, where 0 to 11 should be"):
        store.read(0, 300)


def test_what_is_no_store_of_counts_is_refused(source, tmp_path):
    dense = source.adata.copy()
    dense.X = dense.X.toarray()
    write_theirs(dense, tmp_path / "dense.zarr")
    with pytest.raises(ValueError, match=r"dense\.zarr: found X as 'array'; expected AnnData in zarr whose X is"):
        open_counts(tmp_path / "dense.zarr")
    with pytest.raises(ValueError, match=r"absent\.zarr: no store that can be opened"):
        open_counts(tmp_path / "absent.zarr")
    negative = source.adata.copy()
    negative.X.data[7] = -1
    negative.X = negative.X.astype(np.int32)
    write_theirs(negative, tmp_path / "negative.zarr")
    with pytest.raises(ValueError, match=r"negative\.zarr: cells .* \(values from -1 to"):
        check(ShardedCounts(tmp_path / "negative.zarr"), negative.X.toarray())
    wild = source.adata.copy()
    write_theirs(wild, tmp_path / "wild.zarr")
    indices = zarr.open_group(tmp_path / "wild.zarr")["X/indices"]
    indices[5] = 12
    with pytest.raises(ValueError, match=r"wild\.zarr: cells .* \(values from 0 to 12, where 0 to 11 should be"):
        check(ShardedCounts(tmp_path / "wild.zarr"), wild.X.toarray())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_list_of_genes_in_any_order_is_read_as_anndata_would_take_it(source, data):
    names = data.draw(st.lists(st.sampled_from([f"g{i}" for i in range(14)]), min_size=1, unique=True))
    expected = np.zeros((300, len(names)))
    for column, name in enumerate(names):
        if name in source.adata.var_names:
            expected[:, column] = source.adata[:, name].X.toarray().ravel()
    if not expected.any() and not set(names) & set(source.adata.var_names):
        with pytest.raises(ValueError, match=r"none of the .* genes asked for is in any store"):
            ShardedCounts(source.manifest, genes=names)
        return
    store = ShardedCounts(source.manifest, genes=names)
    assert list(store.var_names) == names
    for output in ("dense", "csr_counts"):
        check(store, expected, output)


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_stores_of_different_genes_are_joined_as_anndata_joins_them(source, tmp_path, join):
    other = simulate(90, ["g11", "x", "g3", "g0", "y"], seed=1)
    other.obs["kind"] = pd.Categorical(np.where(np.arange(90) % 3, "z", "b"))
    write_theirs(other, tmp_path / "other.zarr")
    store = ShardedCounts([source.manifest, tmp_path / "other.zarr"], join=join)
    merged = ad.concat({"s": source.adata, "o": other}, join=join, fill_value=0, index_unique="-")
    expected = merged[:, list(store.var_names)].X.toarray()
    assert set(store.var_names) == set(merged.var_names)
    check(store, expected)
    assert store.categories["kind"] == ["a", "b", "z"]
    for _, obs, rows in keeping(store, batch_size=50, seed=0, columns=["kind"]):
        np.testing.assert_array_equal(np.array(["a", "b", "z"])[obs["kind"]], merged.obs["kind"].to_numpy()[rows])
    with pytest.raises(ValueError, match=r"its genes are not those of .* Give `genes`, or `join`"):
        ShardedCounts([source.manifest, tmp_path / "other.zarr"])
    with pytest.raises(ValueError, match="name 'g1' twice"):
        ShardedCounts(source.manifest, genes=["g1", "g1"])


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on this machine, and the URL of an empty bucket on it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("cells")
        yield "s3://cells"
    server.stop()


def test_stores_on_s3_are_read_like_those_on_disk(source, bucket):
    fs = fsspec.filesystem("s3")
    fs.put(str(source.manifest), f"{bucket}/own.json")
    fs.put(str(source.manifest.with_suffix(".zarr")), f"{bucket}/own.zarr", recursive=True)
    for place in (f"{bucket}/own.json", f"{bucket}/own.zarr"):
        store = ShardedCounts(place)
        assert store.is_remote
        check(store, source.adata.X.toarray())
        check(store, source.adata.X.toarray(), "csr")
    local = ShardedCounts(source.manifest)
    state = keeping(local, batch_size=32, seed=3).state_dict()
    remote = keeping(ShardedCounts(f"{bucket}/own.json"), batch_size=32, seed=3)
    remote.load_state_dict(state)  # the same sequence, wherever the store lies
    for a, b in zip(keeping(local, batch_size=32, seed=3), remote, strict=True):
        assert torch.equal(a.x_ng, b.x_ng)
    fs.rm(f"{bucket}/own.zarr/X/data/c/0")
    with pytest.raises(ValueError, match=r"s3://cells/own\.zarr: cells .* cannot be read .*no such file"):
        check(ShardedCounts(f"{bucket}/own.json"), source.adata.X.toarray())


def test_all_requests_of_a_window_are_under_way_at_once_where_they_take_long(source, monkeypatch):
    fsspec.filesystem("memory").put(str(source.manifest.with_suffix(".zarr")), "/cells/own.zarr", recursive=True)
    under_way, most, original = [0], [0], counts_module.CountsReader.read_into

    def read_into(self, *arguments):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        original(self, *arguments)
        time.sleep(0.02)
        under_way[0] -= 1

    monkeypatch.setattr(counts_module.CountsReader, "read_into", read_into)
    check(ShardedCounts("memory://cells/own.zarr"), source.adata.X.toarray(), threads=1)
    assert most[0] >= 3  # a window has three blocks, all of them asked for before the first came
