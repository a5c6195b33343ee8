"""store.plan: an epoch's order holds every cell once, for any sizes, ranks and point of interruption."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cohortvi.store.plan import Epoch, cut

plans = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(0, 60), max_size=5),
        "batch_size": st.integers(1, 40),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 5),
        "block": st.integers(1, 20),
        "window_blocks": st.integers(1, 5),
        "shuffle": st.booleans(),
        "generations": st.none() | st.just([0, 1, 0, 2, 2]),
    }
)


def numbers(plan: Epoch, sizes: list[int], window: int) -> np.ndarray:
    """Return the numbers of a window's rows through all shards, in the order in which they are served."""
    first = np.cumsum([0, *sizes])
    rows = [np.arange(start, stop) + first[shard] for shard, start, stop in plan.blocks_of(window)]
    return np.concatenate(rows)[plan.order(window)]


def serve(plan: Epoch, sizes: list[int], step: int, rank: int = 0, world: int = 1) -> np.ndarray:
    pieces = plan.pieces(step, rank, world)
    parts = [numbers(plan, sizes, piece.window)[piece.start : piece.stop] for piece in pieces]
    return np.concatenate([np.empty(0, int), *parts])


@given(sizes=st.lists(st.integers(0, 50), max_size=6), block=st.integers(1, 60))
def test_blocks_hold_every_row_of_every_shard_once(sizes, block):
    rows = [(shard, row) for shard, start, stop in cut(sizes, block) for row in range(start, stop)]
    assert rows == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert all(0 < stop - start <= block for _, start, stop in cut(sizes, block))


@given(settings=plans)
def test_every_cell_comes_once_an_epoch(settings):
    plan = Epoch(**settings)
    steps = [serve(plan, settings["sizes"], step) for step in range(plan.n_steps)]
    served = np.concatenate([np.empty(0, int), *steps])
    np.testing.assert_array_equal(np.sort(served), np.arange(sum(settings["sizes"])))
    assert plan.n_obs == len(served)
    if not settings["shuffle"]:
        np.testing.assert_array_equal(served, np.arange(len(served)))


@given(settings=plans)
def test_what_fills_no_minibatch_is_left_out_if_asked(settings):
    plan, whole, size = Epoch(**settings, drop_last=True), Epoch(**settings), settings["batch_size"]
    steps = [serve(plan, settings["sizes"], step).tolist() for step in range(plan.n_steps)]
    everything = [cell for step in range(whole.n_steps) for cell in serve(whole, settings["sizes"], step)]
    assert steps == [everything[k * size : (k + 1) * size] for k in range(sum(settings["sizes"]) // size)]


@given(settings=plans)
def test_minibatches_are_full_but_the_last_two_which_share_the_rest(settings):
    plan, size = Epoch(**settings), settings["batch_size"]
    lengths = [len(serve(plan, settings["sizes"], step)) for step in range(plan.n_steps)]
    assert len(lengths) == -(-sum(settings["sizes"]) // size)
    assert all(length == size for length in lengths[:-2])
    assert all(size // 2 <= length <= size for length in lengths[-2:] if len(lengths) > 1)


@given(settings=plans, world=st.integers(1, 6))
def test_ranks_take_slices_of_the_same_steps(settings, world):
    plan = Epoch(**settings)
    for step in range(plan.n_steps):
        ranks = [serve(plan, settings["sizes"], step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(ranks), serve(plan, settings["sizes"], step))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@given(settings=plans, data=st.data())
def test_a_step_is_the_same_without_those_before_it(settings, data):
    whole, late = Epoch(**settings), Epoch(**settings)
    steps = [serve(whole, settings["sizes"], step) for step in range(whole.n_steps)]
    if steps:
        step = data.draw(st.integers(0, len(steps) - 1))
        np.testing.assert_array_equal(serve(late, settings["sizes"], step), steps[step])


@given(settings=plans)
def test_windows_have_as_many_blocks_as_asked_and_less_than_twice_as_many(settings):
    plan, fewest = Epoch(**settings), settings["window_blocks"]
    n_blocks = len(cut(settings["sizes"], settings["block"]))
    lengths = [len(plan.blocks_of(window)) for window in range(plan.n_windows)]
    assert sum(lengths) == n_blocks
    assert all(min(fewest, n_blocks) <= length < max(2 * fewest, 2) for length in lengths)


def test_a_window_yields_32_blocks_and_32_minibatches_at_least():
    for batch_size, fewest in ((128, 32), (1_024, 32), (4_096, 128)):
        plan = Epoch([1_000_000], batch_size=batch_size, seed=0, epoch=0)
        assert {len(plan.blocks_of(window)) // fewest for window in range(plan.n_windows)} == {1}


def test_every_window_has_its_share_of_every_generation():
    sizes, generations = [400_000, 100_000, 50_000], [0, 1, 1]
    plan = Epoch(sizes, batch_size=128, seed=0, epoch=0, generations=generations)
    share = np.array([150_000 / 550_000, 400_000 / 550_000])
    for window in range(plan.n_windows):
        blocks = plan.blocks_of(window)
        cells = np.bincount(np.array([1, 0, 0])[blocks[:, 0]], blocks[:, 2] - blocks[:, 1])
        np.testing.assert_allclose(cells / cells.sum(), share, atol=2 / len(blocks))


def test_seeds_and_epochs_are_orders_of_their_own():
    sizes = [5_000, 3_000]
    orders = {
        tuple(np.concatenate([numbers(plan, sizes, window) for window in range(plan.n_windows)]))
        for seed in range(3)
        for epoch in range(3)
        for plan in [Epoch(sizes, batch_size=128, seed=seed, epoch=epoch, window_blocks=2)]
    }
    assert len(orders) == 9


def test_few_cells_meet_again_in_the_next_epoch():
    # 500,000 cells, the size of data set A: of a true shuffle, batch_size**2 / cells mates are met again.
    sizes, batch_size = [250_000, 250_000], 1_024
    batches = []
    for epoch in (0, 1):
        plan = Epoch(sizes, batch_size=batch_size, seed=0, epoch=epoch)
        order = np.concatenate([numbers(plan, sizes, window) for window in range(plan.n_windows)])
        batches.append(np.empty(sum(sizes), int))
        batches[-1][order] = np.repeat(
            np.arange(plan.n_steps), [stop - start for start, stop in map(plan.bounds, range(plan.n_steps))]
        )
    _, together = np.unique(batches[0] * plan.n_steps + batches[1], return_counts=True)
    mates = (together**2).sum() / sum(sizes) - 1
    assert mates <= 1.5 * batch_size**2 / sum(sizes)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"batch_size": 8, "block": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="found a size below 1"):
        Epoch([10], seed=0, epoch=0, **sizes)
