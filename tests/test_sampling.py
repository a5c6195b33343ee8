"""store.sampling: weighted draws have the composition that the weights ask for; a query takes its cells once."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortvi.files import write_json
from cohortvi.store import loader as module
from cohortvi.store import sampling as sampling_module
from cohortvi.store.counts import write_counts
from cohortvi.store.loader import Loader
from cohortvi.store.plan import Epoch
from cohortvi.store.sampling import Sampling
from cohortvi.store.sharded import ShardedCounts

keeping = partial(Loader, copy=True)
SIZES = [900, 0, 1, 500]


class Source(NamedTuple):
    """A shuffled store and the table of its cells."""

    manifests: list[Path]
    x: np.ndarray
    obs: pd.DataFrame


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    n = sum(SIZES)
    x = rng.poisson(0.4, (n, 9)).astype(np.uint32)
    classes = rng.choice(["T", "B", "rare"], n, p=[0.7, 0.29, 0.01])
    obs = pd.DataFrame({"type": classes, "age": rng.integers(20, 80, n).astype(np.float64), "row": np.arange(n)})
    obs["donor"], obs["weight"] = rng.choice(list("abc"), n), rng.gamma(0.5, size=n)
    ends, paths = np.cumsum([0, *SIZES]), []
    for i, (start, stop) in enumerate(pairwise(ends)):
        part = obs.iloc[start:stop].astype({"type": pd.CategoricalDtype(["B", "T", "none", "rare"])})
        part.index = pd.Index([f"s{i}_{k}" for k in range(len(part))], dtype=object)
        var = pd.DataFrame(index=[f"g{k}" for k in range(9)])
        manifest = write_counts([sp.csr_matrix(x[start:stop])], part, var, folder / f"s{i}.zarr", sample=f"s{i}")
        write_json(manifest, folder / f"s{i}.json")
        paths.append(folder / f"s{i}.json")
    return Source(paths, x, obs)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Small blocks, windows and reads, so that a small store has many."""
    monkeypatch.setattr(module, "Epoch", partial(Epoch, block=50, window_blocks=4))
    monkeypatch.setattr(module, "BLOCK", 50)
    monkeypatch.setattr(sampling_module, "READ_CELLS", 130)


def rows_of(loader: Loader) -> np.ndarray:
    return np.concatenate([minibatch.rows for minibatch in loader])


@pytest.mark.parametrize(
    "where",
    ["donor == 'a'", "donor in ['a', 'c'] and age > 40", "age < 21", "type != 'T' or (donor == 'b' and age >= 60)"],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_query_takes_each_of_its_cells_once_as_pandas_answers_it(source, where, shuffle):
    loader = keeping(
        ShardedCounts(source.manifests), batch_size=32, seed=0, where=where, columns=["type", "age"], shuffle=shuffle
    )
    expected = np.flatnonzero(source.obs.eval(where))
    served = []
    for x_ng, obs, rows in loader:
        np.testing.assert_array_equal(x_ng.numpy(), source.x[rows])
        np.testing.assert_array_equal(obs["age"], source.obs["age"].to_numpy()[rows])
        served.append(rows)
    served = np.concatenate(served)
    np.testing.assert_array_equal(np.sort(served) if shuffle else served, expected)
    assert not shuffle or not np.array_equal(served, expected)


def test_balanced_draws_have_each_class_equally_often_and_its_cells_equally_likely(source):
    loader, drawn = keeping(ShardedCounts(source.manifests), batch_size=32, seed=0, balance="type"), []
    for _ in range(40):
        drawn.append(rows_of(loader))
        assert len(drawn[-1]) == len(source.x)
    times = np.bincount(np.concatenate(drawn), minlength=len(source.x))
    by_class = pd.Series(times).groupby(source.obs["type"])
    # Systematic sampling: per epoch, a class' draws are off by less than one a window boundary and class.
    np.testing.assert_allclose(by_class.sum() / len(drawn), len(source.x) / 3, rtol=0.02)
    for _, part in by_class:
        assert part.std() < 1.5 * np.sqrt(part.mean())


def test_draws_by_a_column_are_in_proportion_to_it(source):
    loader = keeping(ShardedCounts(source.manifests), batch_size=100, seed=0, weights="weight", where="donor != 'a'")
    times = np.bincount(np.concatenate([rows_of(loader) for _ in range(60)]), minlength=len(source.x))
    weights = np.where(source.obs["donor"] != "a", source.obs["weight"], 0)
    expected = 60 * (source.obs["donor"] != "a").sum() * weights / weights.sum()
    assert times[weights == 0].sum() == 0
    assert np.abs(times - expected).max() < 5 * np.sqrt(expected.max())
    assert np.corrcoef(times, expected)[0, 1] > 0.99


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(5, 200), world=st.integers(1, 4), step=st.integers(0, 5), seed=st.integers(0, 5))
def test_weighted_draws_are_those_of_one_rank_and_go_on_where_they_stopped(source, batch_size, world, step, seed):
    store, drawn = ShardedCounts(source.manifests), {"balance": "type", "where": "age > 25", "seed": seed}
    whole = [minibatch.rows for minibatch in keeping(store, batch_size=batch_size, **drawn)]
    ranks = []
    for rank in range(world):
        loader = keeping(store, batch_size=batch_size, rank=rank, world=world, threads=2, **drawn)
        loader.load_state_dict({**loader.state_dict(), "step": min(step, len(whole) - 1)})
        ranks.append([minibatch.rows for minibatch in loader])
    found = [np.concatenate(parts) for parts in zip(*ranks, strict=True)]
    assert len(found) == len(whole) - min(step, len(whole) - 1)
    for part, expected in zip(found, whole[-len(found) :], strict=True):
        np.testing.assert_array_equal(part, expected)


def test_what_cannot_be_drawn_is_refused(source):
    store = ShardedCounts(source.manifests)
    refused = {
        "no categorical column": {"balance": "age"},
        "no column of numbers": {"weights": "type"},
        "one of them at most": {"balance": "type", "weights": "weight"},
        "no cell fulfils": {"where": "age > 100"},
        "cannot be answered": {"where": "height > 3"},
        "is no condition": {"where": "age + 1"},
    }
    for message, drawn in refused.items():
        with pytest.raises(ValueError, match=message):
            Sampling(store, **drawn)
    loader = keeping(store, batch_size=8, seed=0, balance="type")
    with pytest.raises(ValueError, match="loader state: balance is type; expected None"):
        keeping(store, batch_size=8, seed=0).load_state_dict(loader.state_dict())
