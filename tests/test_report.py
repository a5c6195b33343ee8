import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_results import VERDICT, Fake, make

from cohortvi.report import inputs, words
from cohortvi.report.inputs import cross, draw_rows, effective, read_benchmarks, read_rows
from cohortvi.report.maps import coloring
from cohortvi.report.page import write_report

SMALL = Fake(cells=60, genes=100, models=("nb",), types=4)


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, text, and the cells of each table by its number."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.tags, self.texts, self.tables, self.open = html, [], [], {}, []
        self.feed(html)
        self.close()

    @classmethod
    def of(cls, path: Path) -> "Page":
        return cls(path.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if dict(attrs).get("id", "").startswith("table-"):
            self.rows = self.tables[dict(attrs)["id"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag in {"td", "th", "script", "style"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def build(folder: Path, fake: Fake) -> Page:
    given, config = make(folder / "results", fake)
    write_report(given, config, folder / "index.html")
    return Page.of(folder / "index.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return build(folder, replace(SMALL, models=("nb", "zinb"), color_by=("donor", "run", "cell_type", "total_counts")))


def test_page_refers_to_nothing_outside_itself(page: Page) -> None:
    named = {"src", "href", "srcset", "xlink:href"}
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in named]
    assert len(addresses) > 20
    assert [address for address in addresses if not address.startswith(("#", "data:image/png;base64,"))] == []
    assert re.findall(r"url\((?!#)[^)]*\)|@import|https?://", page.html) == []
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_every_id_is_there_once_and_every_reference_leads_to_one(page: Page) -> None:
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert [name for name, count in ids.items() if count > 1] == []
    asked = set(re.findall(r'href="#([^"]+)"', page.html)) | set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert asked - set(ids) == set()


def test_every_sample_and_every_quarantined_reason_is_shown(page: Page) -> None:
    rows = {row[0]: row for row in page.tables["table-1"]}
    assert set(rows) == {"sample", "all", *(f"sample{i:02d}" for i in range(1, 9))}
    assert f"quarantined: {VERDICT}" in rows["sample08"]
    assert f"Sample sample08 is quarantined: {VERDICT}." in page.text


def test_ledger_shown_equals_the_file(page: Page, folder: Path) -> None:
    ledger = pd.read_csv(folder / "results/cohort/ledger.tsv", sep="\t").drop(columns="quarantined")
    _, *rows, total = page.tables["table-2"]
    shown = [[row[0], *(int(cell.replace(",", "")) for cell in row[2:])] for row in (*rows, total)]
    assert shown[:-1] == ledger.to_numpy().tolist()
    assert shown[-1] == ["all", *ledger.iloc[:, 1:].sum().tolist()]


def test_every_figure_is_numbered_and_has_a_caption(page: Page) -> None:
    figures = [int(n) for n in re.findall(r"<figcaption><b>Figure (\d+)\. [^<]+</b> [^<]{40,}</figcaption>", page.html)]
    assert figures == list(range(1, 2 + 6 * 2 + 1 + 1 + 1))  # that of labels is of one model
    assert [attrs["id"] for tag, attrs in page.tags if attrs.get("id", "").startswith("figure-")] == [
        f"figure-{n}" for n in figures
    ]


def test_every_drawing_says_what_it_shows(page: Page) -> None:
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) > 20
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in drawings)


def test_page_has_the_same_bytes_for_the_same_inputs(page: Page, folder: Path) -> None:
    fake = replace(SMALL, models=("nb", "zinb"), color_by=("donor", "run", "cell_type", "total_counts"))
    again = build(folder / "again", fake)
    assert again.html == page.html


def test_only_the_resource_table_depends_on_measured_times(tmp_path: Path) -> None:
    first = build(tmp_path / "a", SMALL)
    given, config = make(tmp_path / "b/results", SMALL)
    for path in (tmp_path / "b/benchmarks").rglob("*.tsv"):
        header, values = path.read_text().splitlines()
        path.write_text(f"{header}\n" + "\t".join(["77.7", *values.split("\t")[1:]]) + "\n")
    write_report(given, config, tmp_path / "b/index.html")
    cut = re.compile(r"<!-- resources -->.*<!-- /resources -->", re.S)
    second = (tmp_path / "b/index.html").read_text()
    assert second != first.html
    assert cut.sub("", second) == cut.sub("", first.html)


def test_words_of_users_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('a')</script> & \"b\" $x_1$ \N{CJK UNIFIED IDEOGRAPH-7D30}"
    given, config = make(tmp_path / "results", replace(SMALL, title=bad))
    files = given.models["nb"]
    cells = pd.read_parquet(files.cells)
    cells[bad] = pd.Categorical(np.where(np.arange(len(cells)) % 2, bad, "\x07other"))
    cells.to_parquet(files.cells)
    markers = pd.read_parquet(files.markers)
    markers["symbol"] = bad
    markers.to_parquet(files.markers)
    config["report"]["color_by"] = [bad]
    sheet = {name: {**row, bad: bad} for name, row in given.sheet.items()}
    write_report(replace(given, sheet=sheet), config, tmp_path / "index.html")
    page = Page.of(tmp_path / "index.html")
    assert "script" not in {tag for tag, _ in page.tags}
    assert bad in page.text
    assert bad in page.tables["table-1"][0]


def test_share_drawn_is_the_same_of_every_sample_and_bounded() -> None:
    samples = pd.Series(np.repeat(["a", "b", "c"], [4000, 1000, 200])).astype("category")
    rows = draw_rows(samples, 520, seed=3)
    assert samples.iloc[rows].value_counts().to_dict() == {"a": 400, "b": 100, "c": 20}
    assert len(np.unique(rows)) == len(rows)
    assert np.array_equal(rows, draw_rows(samples, 520, seed=3))
    assert not np.array_equal(rows, draw_rows(samples, 520, seed=4))
    assert sorted(draw_rows(samples, 10_000, seed=3)) == list(range(5200))


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_rows_are_read_in_the_order_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(inputs, "BATCH_ROWS", batch_rows)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=100), "k": pd.Categorical(rng.choice(list("abc"), 100), list("cabd"))})
    table.set_index(np.arange(100).astype(str)).to_parquet(tmp_path / "t.parquet", row_group_size=13)
    rows = rng.permutation(100)[:30]
    found = read_rows(tmp_path / "t.parquet", ["k", "x"], rows)
    pd.testing.assert_frame_equal(found, table.loc[rows, ["k", "x"]].reset_index(drop=True))


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_cross_counts_equal_those_of_pandas(monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    monkeypatch.setattr(inputs, "BATCH_ROWS", batch_rows)
    rng = np.random.default_rng(0)
    samples = pd.Series([f"s{i}" for i in rng.integers(12, size=300)])
    clusters = pd.Series(rng.integers(4, size=300).astype(str))
    found = cross(samples, clusters)
    assert list(found.index) == [f"s{i}" for i in range(12)]
    assert found.to_dict() == pd.crosstab(samples, clusters).to_dict()


def test_caption_says_how_many_cells_are_drawn(tmp_path: Path) -> None:
    given, config = make(tmp_path / "results", replace(SMALL, cells=100))
    config["report"]["max_cells"] = 200
    write_report(given, config, tmp_path / "index.html")
    kept = pd.read_csv(given.ledger, sep="\t")["kept"]
    drawn = int(sum(np.floor(kept * (200 / kept.sum()))))
    assert f"{drawn} of {kept.sum()} cells," in Page.of(tmp_path / "index.html").text


@pytest.mark.parametrize(
    ("fake", "absent"),
    [
        (replace(SMALL, truth=False), "What was recovered of the truth"),
        (replace(SMALL, labels=False), "ARI, cell_type"),
        (replace(SMALL, labels=False), "Marginal likelihood"),
        (replace(SMALL, runs=1), "The effect of the batch"),
        (replace(SMALL, failed=False), "is quarantined"),
        (replace(SMALL, types=1), "Marker genes."),
        (replace(SMALL, samples=1, runs=1, failed=False, color_by=()), "is quarantined"),
    ],
    ids=["no-truth", "no-labels", "no-likelihood", "one-batch", "no-quarantine", "one-cluster", "one-sample"],
)
def test_page_leaves_out_what_is_not_there(tmp_path: Path, fake: Fake, absent: str) -> None:
    page = build(tmp_path, fake)
    assert absent not in page.text
    assert "Provenance" in page.text


def test_simulator_is_not_part_of_the_config_of_other_cohorts(tmp_path: Path, page: Page) -> None:
    assert "dying_rate" in page.text
    assert "dying_rate" not in build(tmp_path, replace(SMALL, truth=False)).text


def test_missing_benchmarks_leave_out_their_table_alone(tmp_path: Path) -> None:
    given, config = make(tmp_path / "results", SMALL)
    shutil.rmtree(given.benchmarks)
    write_report(given, config, tmp_path / "index.html")
    assert "Time and memory" not in Page.of(tmp_path / "index.html").text


def test_legend_of_many_categories_is_folded(tmp_path: Path) -> None:
    page = build(tmp_path, replace(SMALL, cells=200, many=30, types=24, color_by=("donor", "pool")))
    summaries = re.findall(r"<summary>([^<]+)</summary>", page.html)
    assert summaries == ["30 categories", "24 categories"]
    assert "Colours repeat after 20 categories." in page.text
    assert all(f"pool {i:03d}" in page.text for i in range(30))


def test_many_samples_are_ranked_and_their_tables_scroll(tmp_path: Path) -> None:
    page = build(tmp_path, replace(SMALL, samples=70, cells=30))
    assert "70 samples, ranked by median" in page.text
    assert "70 rows, of which the box shows some at a time." in page.text
    assert {f"sample{i:02d}" for i in range(1, 71)} <= {row[0] for row in page.tables["table-1"]}


@pytest.mark.slow
def test_page_of_20_000_cells_is_smaller_than_6_megabytes(tmp_path: Path) -> None:
    build(tmp_path, Fake(cells=2500, color_by=("donor", "condition", "cell_type", "total_counts")))
    assert (tmp_path / "index.html").stat().st_size < 6e6


def test_unknown_column_to_color_by_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    given, config = make(tmp_path / "results", replace(SMALL, color_by=("dnor",)))
    with pytest.raises(ValueError, match=r"cells\.parquet: no column 'dnor'; found .*donor.*report\.color_by"):
        write_report(given, config, tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()


def test_effective_bounds_are_the_tighter_ones() -> None:
    assert effective({"low": 200, "mad_low": 350, "high": 20, "mad_high": 31}) == (350, 20)
    assert effective({"mad_high": 9}) == (None, 9)
    assert effective({}) == (None, None)


def test_numbers_with_many_values_are_continuous_and_others_are_categories() -> None:
    ages = coloring("age", pd.Series(pd.Categorical([str(age) for age in range(30, 50)] + ["NA"])))
    assert ages.values is not None
    assert np.nanmax(ages.values) == 49
    assert np.isnan(ages.values).sum() == 1
    donors = coloring("donor", pd.Series(["10", "9", "10", ""]))
    assert donors.values is None
    assert donors.categories == ("9", "10")
    assert donors.codes.tolist() == [1, 0, 1, -1]


def test_benchmarks_are_summed_per_rule(tmp_path: Path) -> None:
    header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    (tmp_path / "qc").mkdir()
    (tmp_path / "qc/a.tsv").write_text(header + "10.0\t0:00:10\t512.5\t1\t1\t1\t0\t0\t90\t9.0\n")
    (tmp_path / "qc/b.tsv").write_text(header + "20.0\t0:00:20\t300\t1\t1\t1\t0\t0\t90\t18.0\n")
    (tmp_path / "ledger.tsv").write_text(header + "0.5\t0:00:00\tNA\tNA\tNA\tNA\tNA\tNA\tNA\tNA\n")
    (tmp_path / "figures.tsv").write_text("rule\tcells\nqc\t7\n")
    found = read_benchmarks(tmp_path).set_index("rule")
    assert found.loc["qc"].to_dict() == {"jobs": 2, "seconds": 30, "longest": 20, "rss": 512.5, "cpu_seconds": 27}
    assert list(found.index) == ["qc", "ledger"]
    assert found.loc["ledger", "seconds"] == 0.5
    assert np.isnan(found.loc["ledger", "rss"])


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.number(1234567), "1,234,567"),
        (words.number(-624.749, 2), "−624.75"),
        (words.number(None), "–"),
        (words.percent(3, 4), "75.0 %"),
        (words.percent(0, 0), "–"),
        (words.duration(59.96), "1 min 00 s"),
        (words.duration(3725), "1 h 02 min"),
        (words.megabytes(1536), "1.50 GB"),
        (words.p_value(0), "< 1e−300"),
        (words.p_value(3e-7), "3.0e−7"),
        (words.short(12_500), "12.5k"),
        (words.plural(1, "batch"), "1 batch"),
        (words.plural(2000, "batch"), "2,000 batches"),
        (words.reason("n_genes_by_counts_mad_low"), "genes low (MAD)"),
        (words.reason("pct_counts_mt_high"), "% mt high"),
        (words.listed(["a", "b", "c"]), "a, b and c"),
        (words.listed(list("abcdefg")), "a, b, c, d, e and 2 more"),
        (sorted(["run10", "run2", "a", "run1"], key=words.natural), ["a", "run1", "run2", "run10"]),
    ],
)
def test_words_and_numbers(shown: object, expected: object) -> None:
    assert shown == expected


def test_a_mapped_model_tells_of_its_reference_and_is_not_compared_with_others(tmp_path: Path) -> None:
    given, config = make(tmp_path / "results", replace(SMALL, models=("nb", "mapped")))
    path = tmp_path / "results/models/mapped/model.json"
    facts = json.loads(path.read_text())
    known = {"path": "references/nb", "digest": "0123456789abcdef", "surgery": False, "n_trained": 0}
    known |= {"new": {"batch": ["run7", "run8"], "sex": ["x"]}, "validation_elbo": -617.25, "elbo_before": -499.5}
    facts |= {"reference": known, "n_epochs": 0, "best_epoch": 0, "best_validation_elbo": -499.5}
    path.write_text(json.dumps(facts))
    write_report(given, config, tmp_path / "index.html")
    page = Page.of(tmp_path / "index.html")
    for expected in ("references/nb (0123456789abcdef)", "batch run7 and run8; sex x", "−617.25 nats per cell, of its"):
        assert expected in page.text
    assert "Nothing was trained" in page.text
    assert "−499.50 (new cells)" in page.text
    assert "Model nb reached a held-out ELBO of" in page.text


def test_changes_shown_are_the_first_of_the_file(page: Page, folder: Path) -> None:
    table = next(rows for rows in page.tables.values() if rows and "P(change)" in rows[0])
    found = pd.read_parquet(folder / "results/models/nb/differential.parquet")
    expected = pd.concat([part.head(10) for _, part in found.groupby("stratum")])
    assert [row[4] for row in table[1:]] == list(expected["gene"])
    np.testing.assert_allclose([float(row[5]) for row in table[1:]], expected["p_change"], atol=5e-4)
    assert [row[:4] for row in table[1:] if row[0]] == [
        ["arm", stratum, "120 / 80", f"3 of {len(found) // 2}"] for stratum in ("0", "1")
    ]


def test_marginal_likelihoods_are_shown_by_sample_in_natural_order(page: Page, folder: Path) -> None:
    table = next(rows for rows in page.tables.values() if rows and "log p(x), mean" in rows[0])
    kept = pd.read_csv(folder / "results/cohort/ledger.tsv", sep="\t").set_index("sample")["kept"]
    shown = [[name, str(n), "−612.50", "1.23", "0.057", "12.3"] for name, n in kept[kept > 0].items()]
    assert table[1:-1] == shown
    assert table[-1] == ["all", str(kept.sum()), "−612.50", words.DASH, "0.057", "12.3"]
