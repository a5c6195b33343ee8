"""The sample sheet: what is wrong is said with line, sample and column, before any job starts."""

import pytest

from cohortvi.cohort.sheet import from_source, read_sheet


def write(tmp_path, text):
    path = tmp_path / "samples.tsv"
    path.write_text(text)
    return path


def test_rows_come_by_name_and_keep_their_columns(tmp_path, samples_schema):
    path = write(tmp_path, "path\tsample\trun\tage\nb.h5ad\tB\tr1\t40\na.h5ad\tA\tr2\t50\n\n")
    samples = read_sheet(path, ["run"], samples_schema)
    assert [sample.name for sample in samples] == ["A", "B"]
    assert samples[0].columns == {"run": "r2", "age": "50"}
    assert samples[0].batch == "r2"


def test_several_batch_columns_are_joined(tmp_path, samples_schema):
    path = write(tmp_path, "sample\tpath\tdonor\trun\nA\ta.h5ad\td1\tr1\n")
    assert read_sheet(path, ["donor", "run"], samples_schema)[0].batch == "d1-r1"
    assert read_sheet(path, [], samples_schema)[0].batch == "all"


def test_select_is_split_and_survives_a_round_trip(tmp_path, samples_schema):
    path = write(tmp_path, "sample\tpath\tselect\nA\tk.h5ad\tdonor=1016,condition=ctrl\n")
    sample = read_sheet(path, [], samples_schema)[0]
    assert sample.select == (("donor", "1016"), ("condition", "ctrl"))
    assert from_source(sample.source()).source() == sample.source()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the sheet is empty"),
        ("sample\tpath\trun\n", "no sample; expected at least one row"),
        ("sample,path,run\nA,a.h5ad,r\n", "is the sheet separated by tabs?"),
        ("sample\trun\nA\tr\n", "line 1: no column 'path'"),
        ("sample\tpath\nA\ta.h5ad\n", "no column 'run', which cohort.batch_key names"),
        ("sample\tpath\trun\trun\nA\ta\tr\tr\n", "column 'run' stands 2 times"),
        ("sample\tpath\trun\nA\ta.h5ad\tr\nA\tb.h5ad\tr\n", "sample 'A' stands in 2 rows"),
        ("sample\tpath\trun\nA/B\ta.h5ad\tr\n", "line 2: sample 'A/B': column 'sample': found 'A/B'; expected a name"),
        ("sample\tpath\trun\nA\t\tr\n", "column 'path': found ''; expected a file, a folder or a URL"),
        ("sample\tpath\trun\nA\ta.h5ad\t\n", "line 2: sample 'A': column 'run' is empty"),
        ("sample\tpath\trun\nA\ta.h5ad\n", "column 'run' is empty"),
        ("sample\tpath\trun\tformat\nA\ta\tr\tcsv\n", "column 'format': found 'csv'; expected one of h5ad"),
        (
            "sample\tpath\trun\tlayer\nA\ta\tr\tcounts\n",
            "column 'layer': found 'counts'; expected where the raw counts",
        ),
        ("sample\tpath\trun\tselect\nA\ta\tr\tdonor\n", "column 'select': found 'donor'; expected column=value"),
        ("sample\tpath\trun\nA\ta\tr 1\nB\tb\tr_1\n", "batches 'r 1' and 'r_1' differ in special characters only"),
    ],
)
def test_each_fault_is_named_with_what_was_expected(tmp_path, samples_schema, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"samples\.tsv") as error:
        read_sheet(path, ["run"], samples_schema)
    assert expected in str(error.value)


def test_a_missing_sheet_says_where_it_was_looked_for(tmp_path, samples_schema):
    with pytest.raises(ValueError, match=r"no such sample sheet; write one, or set cohort\.sheet"):
        read_sheet(tmp_path / "none.tsv", [], samples_schema)
