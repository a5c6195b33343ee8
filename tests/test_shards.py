"""store.shards: every kept cell lies in one shard, at a place that follows from seed, sample and row alone."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cohortvi.config import Store, Validation
from cohortvi.files import read_json, write_json
from cohortvi.store import shards
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.names import generations, shard_names, up_to
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts
from cohortvi.store.shards import assign_shard, assign_split, draw, held_out_values, write_shard

GENES = [f"g{i}" for i in range(12)]
CELLS = {"a": 60, "b.1": 25, "c": 0, "d": 1, "e": 40}
TEXT = {"sample": str, "batch": str, "donor": str}
NONE_HELD_OUT = Validation(1e-12, "cell")
DONORS = {"a": "d1", "b.1": "d2", "c": "d2", "d": "d3", "e": "d3"}


def write_sample(folder: Path, sample: str, row: np.ndarray, genes: Iterable[str] = GENES, **columns) -> Path:
    """Write counts that are a function of (sample, row); the last sample has large ones. Return the manifest's path."""
    everything = np.random.default_rng([ord(sample[0])]).poisson(0.5, (200, len(GENES)))
    x = sp.csr_matrix(everything[row] * (700 if sample == "e" else 1), dtype=np.uint32)
    obs = pd.DataFrame(
        {"sample": sample, "batch": f"run{len(sample)}", "row": row, "age": 30.0 + len(sample), **columns}
    )
    obs.index = pd.Index([f"{sample}_{i}" for i in row], dtype=object)
    obs["donor"] = DONORS.get(sample, "d9")
    manifest = write_counts([x], obs, pd.DataFrame(index=list(genes)), folder / f"{sample}.zarr", sample=sample)
    write_json(manifest, folder / f"{sample}.json")
    return folder / f"{sample}.json"


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("counts")
    return [write_sample(folder, sample, np.arange(n) * 3) for sample, n in CELLS.items()]


def gather(counts: list[Path], folder: Path, store: Store, seed: int = 0) -> list[Path]:
    """Write all shards of a cohort; return their manifests' paths."""
    paths = []
    for name in shard_names(store):
        split, shard = name.split("-")
        manifest = write_shard(counts, split, int(shard), folder / f"{name}.zarr", seed=seed, store=store)
        write_json(manifest, folder / f"{name}.json")
        paths.append(folder / f"{name}.json")
    return paths


def read(manifests: list[Path]) -> list[ad.AnnData]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        return [ad.io.read_zarr(path.with_suffix(".zarr")) for path in manifests]


def stack(adatas: list[ad.AnnData]) -> pd.DataFrame:
    filled = [part for part in adatas if part.n_obs]
    return pd.concat([pd.DataFrame(part.X.toarray().astype(int), index=part.obs_names) for part in filled])


@given(rows=st.lists(st.integers(0, 300_000), max_size=30), seed=st.integers(0, 2**64 - 1))
def test_the_draw_of_a_row_is_that_of_its_place_in_the_philox_stream(rows, seed):
    key = int.from_bytes(hashlib.sha256(b"donor07").digest()[:8], "little")
    stream = np.random.Philox(key=np.array([seed, key], np.uint64)).random_raw(max(rows, default=0) + 1)
    np.testing.assert_array_equal(draw(seed, "donor07", np.array(rows, int)), stream[rows])


def test_draws_of_samples_and_seeds_are_streams_of_their_own():
    row = np.arange(1_000)
    draws = np.concatenate([draw(seed, sample, row) for seed in (0, 1) for sample in ("a", "b")])
    assert len(np.unique(draws)) == len(draws)


def test_splits_and_shards_get_their_shares():
    draws = draw(0, "a", np.arange(100_000))
    obs = pd.DataFrame(index=range(len(draws)))
    held_out = assign_split(draws, obs, Validation(0.1, "cell"), ())
    assert held_out.mean() == pytest.approx(0.1, abs=0.005)
    for part in (held_out, ~held_out):
        shares = np.bincount(assign_shard(draws[part], 7), minlength=7) / part.sum()
        np.testing.assert_allclose(shares, 1 / 7, atol=0.01)


def test_whole_values_are_held_out_in_their_share_and_at_least_one():
    donors = [f"d{i}" for i in range(500)]
    held_out = held_out_values(donors, 3, 0.2)
    assert len(held_out) == 100
    assert held_out == held_out_values(donors[::-1], 3, 0.2) != held_out_values(donors, 4, 0.2)
    assert len(held_out_values(donors[:3], 3, 0.01)) == 1
    assert len(held_out_values(donors[:3], 3, 0.99)) == 2
    obs = pd.DataFrame({"donor": donors * 2})
    np.testing.assert_array_equal(
        assign_split(np.zeros(1000, np.uint64), obs, Validation(0.2, "donor"), held_out), obs["donor"].isin(held_out)
    )
    with pytest.raises(ValueError, match=r"1 value\(s\) over the cells; expected at least two"):
        held_out_values(["d1", "d1"], 0, 0.1)


def test_shard_names_count_both_splits():
    assert shard_names(Store(2, Validation(0.1, "cell"), 0)) == ["train-0000", "train-0001", "validation-0000"]
    assert sum(name.startswith("validation") for name in shard_names(Store(40, Validation(0.1, "cell"), 0))) == 4


def test_samples_that_came_later_have_shards_of_their_own_until_they_are_too_many():
    store, came = Store(4, Validation(0.3, "cell"), 0.5), {"a": 0, "b": 0, "c": 3, "d": 0, "e": 0}
    first, second = generations(store, came)
    assert (first.samples, second.samples) == (("a", "b", "d", "e"), ("c",))
    assert first.shards["train"] == ("train-0000", "train-0001", "train-0002", "train-0003")
    assert (second.shards["train"], second.shards["validation"]) == (("train-0004",), ("validation-0001",))
    assert up_to([first, second], "train", "0003") == [first]
    assert up_to([first, second], "validation", "0001") == [first, second]
    alone = generations(store, {name: 0 for name in "abde"})
    assert alone == [first]  # what is known of the first does not depend on those that follow
    (all_anew,) = generations(store, {**came, "b": 3, "d": 3})
    assert all_anew.samples == tuple(came)
    assert [*all_anew.shards["train"], *all_anew.shards["validation"]] == shard_names(store)
    assert len(generations(Store(4, Validation(0.3, "cell"), 0), came)) == 1


@pytest.mark.parametrize("by", ["cell", "sample", "donor"])
def test_a_later_generation_keeps_what_was_decided_and_leaves_no_donor_on_both_sides(tmp_path, counts, by):
    store, written = Store(1, Validation(0.4, by), 1), []
    for number, members in enumerate((counts[:2], counts[2:])):
        earlier = [path for path in written if path.stem.startswith("validation")]
        for split in ("train", "validation"):
            path = tmp_path / f"{split}-{number:04d}.json"
            manifest = write_shard(members, split, 0, path.with_suffix(".zarr"), seed=0, store=store, earlier=earlier)
            assert manifest["generation"] == number
            write_json(manifest, path)
            written.append(path)
    sources, parts = read(counts), read(written)
    pd.testing.assert_frame_equal(stack(parts).sort_index(), stack(sources).sort_index())
    if by != "cell":
        sides = pd.concat([part.obs.assign(split=path.stem[:5]) for part, path in zip(parts, written, strict=True)])
        assert (sides.groupby(by, observed=True)["split"].nunique() == 1).all()
    loader = Loader(ShardedCounts(written), batch_size=16, seed=0, columns=["batch", "sample"], copy=True)
    rows = np.concatenate([minibatch.rows for minibatch in loader])
    np.testing.assert_array_equal(np.sort(rows), np.arange(sum(part.n_obs for part in parts)))


@pytest.mark.parametrize("by", ["cell", "sample", "donor"])
@pytest.mark.parametrize("n", [1, 3])
def test_every_cell_lies_in_one_shard_with_its_counts_and_obs(tmp_path, counts, by, n):
    written = gather(counts, tmp_path, Store(n, Validation(0.3, by), 0), seed=2)
    sources, parts = read(counts), read(written)
    expected, found = stack(sources), stack(parts)
    pd.testing.assert_frame_equal(found.sort_index(), expected.sort_index())
    source_obs = pd.concat([part.obs.astype(TEXT) for part in sources if part.n_obs])
    for part, path in zip(parts, written, strict=True):
        assert list(part.var_names) == GENES
        assert list(part.obs["sample"].cat.categories) == ["a", "b.1", "d", "e"]
        assert list(part.obs["batch"].cat.categories) == ["run1", "run3"]
        assert part.obs["age"].dtype == np.float64
        obs = part.obs.astype(TEXT)
        pd.testing.assert_frame_equal(obs, source_obs.loc[obs.index])
        assert {s: k for s, k in part.obs["sample"].value_counts().items() if k} == read_json(path)["samples"]
    if by != "cell":
        sides = pd.concat([part.obs.assign(split=path.stem[:5]) for part, path in zip(parts, written, strict=True)])
        assert (sides.groupby(by, observed=True)["split"].nunique() == 1).all()


def orders(paths: list[Path], sample: str) -> list[list[str]]:
    return [[name for name in part.obs_names if name.startswith(f"{sample}_")] for part in read(paths)]


def test_places_depend_neither_on_other_samples_nor_on_removed_cells(tmp_path, counts):
    store = Store(2, Validation(0.2, "cell"), 0)
    whole = orders(gather(counts, tmp_path / "whole", store), "a")
    alone = orders(gather(counts[:1], tmp_path / "alone", store), "a")
    assert alone == whole
    fewer = write_sample(tmp_path, "a", np.arange(60)[::2] * 3)
    kept = {f"a_{row}" for row in np.arange(60)[::2] * 3}
    assert orders(gather([fewer], tmp_path / "fewer", store), "a") == [[c for c in part if c in kept] for part in whole]
    assert orders(gather(counts[:1], tmp_path / "seed", store, seed=1), "a") != whole


def test_cells_of_a_shard_lie_in_random_order(tmp_path):
    paths = [write_sample(tmp_path, sample, np.arange(200)) for sample in ("a", "b", "c", "d", "e")]
    shard, _ = read(gather(paths, tmp_path / "shards", Store(1, NONE_HELD_OUT, 0)))
    ordered = np.argsort([f"{name[0]}{int(name[2:]):03}" for name in shard.obs_names])
    # Of a random permutation of 1,000, rank correlation with the source has a standard deviation of 0.032.
    assert abs(np.corrcoef(ordered, np.arange(1_000))[0, 1]) < 0.13


def test_a_shard_without_cells_is_valid(tmp_path, counts):
    written = gather([counts[3]], tmp_path, Store(3, NONE_HELD_OUT, 0))
    assert sorted(part.n_obs for part in read(written)) == [0, 0, 0, 1]
    empty = gather([counts[2]], tmp_path / "empty", Store(1, Validation(0.5, "cell"), 0))
    assert [part.shape for part in read(empty)] == [(0, 12)] * 2


def test_manifests_of_shards_count_every_cell_of_every_sample_once(tmp_path, counts):
    written = gather(counts, tmp_path, Store(2, Validation(0.2, "cell"), 0))
    tally = Counter()
    for path in written:
        tally.update(read_json(path)["samples"])
    assert tally == {sample: n for sample, n in CELLS.items() if n}


def test_samples_of_different_genes_or_columns_are_refused(tmp_path, counts):
    store = Store(1, NONE_HELD_OUT, 0)
    other = write_sample(tmp_path, "f", np.arange(5), genes=GENES[::-1])
    with pytest.raises(ValueError, match=r"different genes: .*f\.json"):
        write_shard([*counts, other], "train", 0, tmp_path / "s.zarr", seed=0, store=store)
    other = write_sample(tmp_path, "f", np.arange(5), score=1.0)
    with pytest.raises(ValueError, match=r"sample 'f' has .*'score'.* expected the same columns"):
        write_shard([*counts, other], "train", 0, tmp_path / "s.zarr", seed=0, store=store)
    with pytest.raises(ValueError, match=r"store\.validation\.by: 'site' has no value"):
        write_shard(counts, "train", 0, tmp_path / "s.zarr", seed=0, store=Store(1, Validation(0.1, "site"), 0))


def test_a_gather_that_is_interrupted_leaves_no_store(tmp_path, counts, monkeypatch):
    take_rows, taken = shards.take_rows, []

    def interrupt(*csr):
        taken.append(len(csr[-1]))
        if sum(taken) > 126 + 50:  # all cells are gathered and the first 50 written
            raise KeyboardInterrupt
        return take_rows(*csr)

    monkeypatch.setattr(shards, "take_rows", interrupt)
    monkeypatch.setattr(shards, "WRITE_CELLS", 50)
    with pytest.raises(KeyboardInterrupt):
        write_shard(counts, "train", 0, tmp_path / "s.zarr", seed=0, store=Store(1, NONE_HELD_OUT, 0))
    assert not list(tmp_path.iterdir())


def test_a_shard_over_selected_genes_maps_those_of_every_sample(tmp_path, counts):
    other = write_sample(tmp_path, "f", np.arange(5), genes=GENES[::-1])
    selected = pd.DataFrame({"symbol": ["B", "A", "?"]}, index=["g7", "g2", "absent"])
    store = Store(1, NONE_HELD_OUT, 0)
    facts = write_shard([*counts, other], "train", 0, tmp_path / "t.zarr", seed=0, store=store, genes=selected)
    (shard,) = read([tmp_path / "t.json"])
    assert facts["n_obs"] == shard.n_obs == sum(CELLS.values()) + 5
    assert (list(shard.var_names), list(shard.var["symbol"])) == (["g7", "g2", "absent"], ["B", "A", "?"])
    tables = [stack([part]).set_axis(part.var_names, axis=1) for part in read([*counts, other]) if part.n_obs]
    expected = pd.concat(tables).reindex(columns=["g7", "g2", "absent"], fill_value=0)
    np.testing.assert_array_equal(shard.X.toarray(), expected.loc[shard.obs_names].to_numpy())


def test_only_stores_with_cells_are_read(tmp_path, counts):
    empty = write_sample(tmp_path, "z", np.arange(0))
    (tmp_path / "z.zarr").rename(tmp_path / "gone")
    store = Store(1, NONE_HELD_OUT, 0)
    manifest = write_shard([*counts, empty], "train", 0, tmp_path / "s.zarr", seed=0, store=store)
    assert manifest["n_obs"] == sum(CELLS.values()) == sum(manifest["samples"].values())
    assert open_counts(counts[4]).manifest["dtype"] == manifest["dtype"] == "uint16"
