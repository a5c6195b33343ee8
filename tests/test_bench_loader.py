"""benchmarks/: what makes numbers of measurements and tables of numbers; and that what is measured on is as said."""

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import nbinom

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


tables, quality, worker = load("loader_tables"), load("loader_quality"), load("loader_worker")
plot, scale, simulated = load("loader_plot"), load("scale_loader"), load("simulated")


def record(loader: str, setting: str, speed: float, **where) -> dict:
    measured = {"cores": 2.0, "peak_mb": 100.0, "p99_gap_ms": 5.0, "first_batch_s": 0.5, "open_s": 0.1}
    place = {"data": "A", "batch_size": 1024, "output": "dense", "round": 0}
    return {"loader": loader, "setting": setting, "cells_per_s": speed, **measured, **place, **where}


@pytest.fixture
def results() -> dict:
    """A run of two rounds, in which the rivals slow down as we do."""
    warm = []
    for index, slow in enumerate((1, 4)):
        warm += [
            record("cohortvi", "dense", 2e6 / slow, round=index),
            record("cohortvi", "counts", 3e6 / slow, round=index),
            record("annbatch", "32x256", 1e5 / slow, round=index),
            record("annbatch", "2048x16", 4e5 / slow, round=index),
            record("cohortvi", "csr", 1e6 / slow, round=index, output="csr"),
        ]
    cold = [record("cohortvi", "dense", 1e6, read_mb=93.0), record("annbatch", "32x256", 1e5, read_mb=250.0)]
    size = {"seconds": 10.0, "cpu_s": 9.0, "peak_mb": 300.0}
    written = [
        {"data": "A", "loader": "cohortvi", "counts_mb": 90.0, "mb": 95.0, **size},
        {"data": "A", "loader": "annbatch", "counts_mb": 225.0, "mb": 250.0, **size},
    ]
    return {
        "machine": {
            "cpu": "CPU",
            "cores": 4,
            "cores_used": 2,
            "memory_gib": 8,
            "system": "Linux",
            "date": "2026-01-01",
        },
        "settings": {"rounds": 2, "seconds": 3.0, "batch_sizes": [1024], "outputs": ["dense", "csr"]},
        "versions": {"cohortvi": {"cohortvi": "0.1.0"}, "annbatch": {"annbatch": "0.3.1"}},
        "skipped": {"scDataset": "ModuleNotFoundError: No module named 'scdataset'"},
        "data": {"A": {"n_obs": 500_000, "n_vars": 2_000, "nnz": 100_000_000}},
        "warm": warm,
        "cold": cold,
        "written": written,
        "mixing": [
            {"data": "A", "batch_size": 1024, "entropy_ratio": 1.0, "repeated_mates": 1.16, "coverage": 1.0},
        ],
    }


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of that name."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return next(cells[1:] for cells in lines if cells[0].strip("*") == name)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 3, ""), (0, 3, "0.00"), (1234567.8, 3, "1,234,568"), (12.345, 3, "12.3"), (0.01234, 2, "0.012"),
     (0.9996, 3, "1.00"), (99.96, 3, "100")],
)  # fmt: skip
def test_a_number_has_its_significant_digits(value, digits, text):
    assert tables.number(value, digits) == text


def test_a_ratio_compares_within_rounds_with_the_best_of_the_round():
    ours = [record("cohortvi", "dense", speed, round=index) for index, speed in enumerate((100, 10, 40, 7))]
    others = [record("annbatch", setting, speed, round=index)
              for setting, speeds in (("32x256", (20, 1, 8)), ("512x32", (10, 5, 4)))
              for index, speed in enumerate(speeds)]  # fmt: skip
    assert tables.ratio(ours, others) == 5  # of 100 / 20, 10 / 5, 40 / 8; round 3 has no other
    assert tables.ratio(ours, others[:1]) == 5
    assert tables.ratio(ours, []) is None


def test_a_table_has_a_line_a_row_and_as_many_cells_everywhere():
    lines = tables.markdown(["a", "b"], [["1", "2"], ["3", "4"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| 1 | 2 |", "| 3 | 4 |"]


def test_the_tables_hold_medians_and_ratios_of_the_same_round(results):
    text = tables.tables(results)
    assert row(text, "cohortvi, float32") == ["1,250", "625"]  # of 2,000 and 500 thousand
    assert row(text, "annbatch 32x256") == ["62.5", ""]
    assert row(text, "float32 / annbatch's best of the round") == ["5.00", ""]
    assert row(text, "integers / annbatch's best of the round") == ["7.50", ""]
    assert row(text, "float32 / annbatch 32x256") == ["20.0", ""]
    assert row(text, "A, dense") == ["1,000", "100", "10.0", "93.0", "250"]
    assert row(text, "A, cohortvi") == ["180", "90.0", "95.0", "10.0", "9.00", "300"]
    assert row(text, "A, ratio") == ["0.40", "0.40", "0.38", "1.0", "1.0", "1.0"]
    assert "10.0% above zero" in text
    assert "1.16 times" in text


def test_what_was_skipped_is_told_with_its_reason(results):
    assert "Skipped: scDataset: ModuleNotFoundError: No module named 'scdataset'." in tables.tables(results)


def test_a_run_without_peers_or_rounds_still_makes_tables(results):
    for name in ("warm", "cold", "written", "mixing"):
        results[name] = [found for found in results[name] if found.get("loader") == "cohortvi"][:1]
    assert "cohortvi, float32" in tables.tables(results)


def test_equal_results_give_the_same_plot(results, tmp_path):
    for name in ("a.svg", "b.svg"):
        plot.write_plot(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_tables_replace_what_stands_between_the_markers_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    for text in ("first", "second"):
        tables.put_between_markers(path, text)
    assert path.read_text() == f"above\n{tables.BEGIN}\n\nsecond\n\n{tables.END}\nbelow\n"


def test_a_file_without_markers_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{tables.END}{tables.BEGIN}")
    with pytest.raises(ValueError, match=r"README\.md: expected <!-- bench-loader -->"):
        tables.put_between_markers(path, "text")


@pytest.mark.parametrize(
    ("values", "share", "found"), [(range(1, 101), 99, 99), (range(1, 1001), 99, 990), ([3], 99, 3), ([2, 1], 50, 1)]
)
def test_a_percentile_is_the_smallest_value_not_exceeded_by_its_share(values, share, found):
    assert worker.percentile(list(values), share) == found


def test_consuming_counts_cells_of_epoch_after_epoch():
    found = worker.consume(lambda: iter([np.zeros((3, 2)), (np.zeros(5), None, None, 2)]), 0.02)
    assert found["cells_per_s"] > 1_000
    assert 0 <= found["p99_gap_ms"] < 20


def test_consuming_goes_on_for_as_many_minibatches_as_asked():
    begun = []
    worker.consume(lambda: begun.append(1) or iter([np.zeros((3, 2))]), 0, at_least=5)
    assert len(begun) == 5


@pytest.mark.parametrize("minibatch", [np.ones((4, 10)), sp.csr_matrix(np.ones((4, 10))),
                                       (np.arange(5) * 10, np.tile(np.arange(10), 4), np.ones(40), 10)])  # fmt: skip
def test_a_minibatch_of_another_shape_or_density_is_refused(minibatch):
    output = "dense" if isinstance(minibatch, np.ndarray) else "csr"
    worker.check(minibatch, output, (4, 10), 10.0)
    for shape, nnz in (((4, 11), 10.0), ((5, 10), 10.0), ((4, 10), 20.0), ((4, 10), 5.0)):
        with pytest.raises(ValueError, match="a minibatch has shape"):
            worker.check(minibatch, output, shape, nnz)


def test_entropy_is_that_of_the_labels_shares():
    assert quality.entropy(np.array([0, 1, 2, 3])) == 2
    assert quality.entropy(np.array([5, 5, 5])) == 0
    assert quality.entropy(np.array([0, 0, 0, 2])) == pytest.approx(2 - 0.75 * np.log2(3))


def test_entropy_falls_where_neighbours_stay_together():
    labels, rng = np.repeat(np.arange(20), 100), np.random.default_rng(0)
    mixed = np.split(rng.permutation(2_000), 20)
    assert quality.entropy_ratio(labels, mixed, rng) == pytest.approx(1, abs=0.01)
    assert quality.entropy_ratio(labels, np.split(np.arange(2_000), 20), rng) == 0


def test_mates_are_met_again_by_chance_alone_in_a_true_shuffle():
    rng = np.random.default_rng(0)
    epochs = [np.split(rng.permutation(4_000), 40) for _ in range(2)]
    assert quality.repeated_mates(*epochs, 4_000) == pytest.approx(1, abs=0.05)
    assert quality.repeated_mates(epochs[0], epochs[0], 4_000) == pytest.approx(3_999 / 99)


def test_mates_are_counted_as_by_hand():
    first, second = [np.array([0, 1, 2]), np.array([3, 4, 5])], [np.array([0, 1, 3]), np.array([2, 4, 5])]
    pairs = [
        {frozenset(pair) for rows in epoch for pair in itertools.combinations(rows, 2)} for epoch in (first, second)
    ]
    expected = len(pairs[0] & pairs[1]) / (len(pairs[0]) * len(pairs[1]) / 15)  # of 15 pairs in all
    assert quality.repeated_mates(first, second, 6) == pytest.approx(expected)


def test_goals_of_scale_that_are_missed_are_named():
    small = {"open_s": 0.3, "first_batch_s": 0.4, "cells_per_s": 1e6, "peak_mb": 100.0}
    rows, missed = scale.rows_of({"small": [small] * 3, "large": [small] * 3})
    assert not missed
    assert [cells[-1] for cells in rows] == ["1.00"] * 4
    large = {"open_s": 1.5, "first_batch_s": 1.9, "cells_per_s": 8e5, "peak_mb": 120.0}
    _, missed = scale.rows_of({"small": [small] * 3, "large": [large] * 3})
    assert [text.split(":")[0] for text in missed] == ["open, s", "cells/s", "peak MB"]


@pytest.fixture(scope="module")
def small():
    """A data set of A's kind, its truth and cells."""
    preset = simulated.PRESETS["A"]._replace(n_obs=1_300, n_vars=200)
    truth = simulated.draw_truth(preset)
    return preset, truth, simulated.draw_cells(preset, truth)


def test_simulated_counts_are_quantiles_of_their_negative_binomials(small):
    preset, truth, cells = small
    part = simulated.Cells(*(array[:50] for array in cells))
    rows = simulated.draw_counts(preset, truth, part, 7)
    u_ng = np.random.default_rng([preset.seed, 2, 7]).random((50, preset.n_vars), np.float32)
    mean_ng = part.depth_n[:, None] * truth.mean_tg[part.type_n] * truth.shift_bg[part.batch_n]
    expected = nbinom.ppf(u_ng.astype(np.float64), truth.theta_g, truth.theta_g / (truth.theta_g + mean_ng))
    found = sp.csr_matrix((rows.data, rows.indices, rows.indptr), shape=u_ng.shape).toarray()
    assert (found != expected).mean() < 1e-3  # u on the edge of two counts falls to one or the other
    assert np.abs(found - expected).max() <= 1


def test_simulated_cells_are_sorted_by_batch_and_their_counts_as_dense_as_said(small):
    preset, truth, cells = small
    assert (np.diff(cells.batch_n) >= 0).all()
    rows = simulated.joined(list(simulated.draw_blocks(preset, truth, cells)))
    assert len(rows.indptr) == preset.n_obs + 1
    assert rows.indptr[-1] / preset.n_obs / preset.n_vars == pytest.approx(preset.density, rel=0.1)
