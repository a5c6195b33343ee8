"""Every fault of an input is told at the door: path, sample, what was found, what was expected, what to do."""

import gzip
import re
import shutil
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from make_inputs import (
    WRITERS,
    make_anndata,
    make_sample,
    make_source,
    open_sample,
    truncate,
    write_10x_h5,
    write_10x_h5_v2,
    write_10x_mtx,
    write_h5ad,
    write_loom,
    write_zarr,
)

from cohortvi.cohort.readers import iter_counts

SOURCE = make_source()


def refused(sample, *words: str, read: bool = False, **settings) -> str:
    """Return the message with which a sample is refused: when opened, or (`read`) only when its counts are read."""
    if read:
        raw = open_sample(sample, **settings)
        with pytest.raises(ValueError, match=re.escape(sample.path)) as caught:
            list(iter_counts(raw))
    else:
        with pytest.raises(ValueError, match=re.escape(sample.path)) as caught:
            open_sample(sample, **settings)
    message = str(caught.value)
    for word in (f"sample {sample.name!r}", "; expected", *words):
        assert word in message, message
    return message


# Files


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr", "a.h5", "folder", "a.loom"])
def test_missing_file(tmp_path, name):
    refused(make_sample(tmp_path / name), "does not exist", "correct `path`")


@pytest.mark.parametrize("name", ["a.csv", "folder"])
def test_unknown_format(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("1,2\n")
    refused(make_sample(path), "unknown format", "h5ad, zarr, 10x_h5, 10x_mtx, loom", "set `format`")


def test_unknown_format_in_the_sheet(tmp_path):
    path = WRITERS["h5ad_csr"](tmp_path, SOURCE)
    refused(make_sample(path, format="h5da"), "has format 'h5da'", "h5ad, zarr, 10x_h5, 10x_mtx, loom")


def test_url_that_nothing_can_open():
    refused(make_sample("nowhere://bucket/a.h5ad"), "cannot be opened", "Protocol not known", "install")
    refused(make_sample("memory://nothing/a.h5ad"), "does not exist")


@pytest.mark.parametrize("kind", ["h5ad_csr", "10x_h5", "10x_h5_v2", "loom"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_hdf5(tmp_path, kind, share):
    path = WRITERS[kind](tmp_path, make_source(200))
    truncate(path, share)
    message = refused(make_sample(path), "cannot be read as", "copy or write it anew")
    assert "OSError" in message


@pytest.mark.parametrize(("name", "format"), [("a.h5ad", "h5ad"), ("a.h5", "10x_h5"), ("a.loom", "loom")])
def test_file_that_is_no_hdf5(tmp_path, name, format):
    (tmp_path / name).write_text("sample\tpath\n" * 1000)
    refused(make_sample(tmp_path / name), f"cannot be read as {format}", "`format`")


def test_hdf5_of_another_kind(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pixels"] = np.zeros(3)
    for format, word in (("h5ad", "'obs'"), ("10x_h5", "no 10x matrix"), ("loom", "no loom file")):
        refused(make_sample(tmp_path / "a.h5", format=format), word, "it holds pixels", "correct")


def test_frame_older_than_anndata_0_7(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", make_anndata(SOURCE))
    with h5py.File(path, "a") as file:
        del file["obs"]
        file["obs"] = np.zeros(3, dtype=[("index", "S8"), ("donor", "i1")])
    refused(make_sample(path), "no data frame 'obs' of AnnData 0.7 or later", "write it anew with a current anndata")


@pytest.mark.parametrize("kind", ["h5ad_csr", "h5ad_csc"])
def test_damaged_values_are_found_when_they_are_read(tmp_path, kind):
    path = WRITERS[kind](tmp_path, SOURCE)
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with Path(path).open("r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 2)
        file.write(bytes(chunk.size // 3))
    refused(make_sample(path), "cannot be read as h5ad", read=True)


@pytest.mark.parametrize(("version", "chunk"), [(2, "X/data/0"), (3, "X/data/c/0")])
def test_damaged_zarr_chunks_are_found_when_they_are_read(tmp_path, version, chunk):
    path = write_zarr(tmp_path / "a.zarr", make_anndata(make_source(200, 50)), version)
    truncate(tmp_path / "a.zarr" / chunk)
    refused(make_sample(path), "cannot be read as zarr", read=True)


@pytest.mark.parametrize("kind", ["zarr2_csr", "zarr2_csc", "zarr3_csr"])
@pytest.mark.parametrize("name", ["data", "indices"])
def test_missing_zarr_chunks_are_not_read_as_zeros(tmp_path, kind, name):
    path = WRITERS[kind](tmp_path, SOURCE)
    array = Path(path) / "X" / name
    (array / ("0" if kind.startswith("zarr2") else "c/0")).unlink()
    refused(make_sample(path), f"is damaged: it holds 0 of the 1 chunks of X/{name}", "copy or write it anew")


def test_missing_zarr_row_pointer(tmp_path):
    path = WRITERS["zarr3_csr"](tmp_path, SOURCE)
    (Path(path) / "X/indptr/c/0").unlink()
    refused(make_sample(path), "is damaged", "a pointer of length 38 to 0")


def test_zarr_metadata_that_is_cut_or_absent(tmp_path):
    path = WRITERS["zarr3_csr"](tmp_path, SOURCE)
    truncate(Path(path) / "zarr.json")
    refused(make_sample(path), "cannot be read as zarr (JSONDecodeError")
    (Path(path) / "zarr.json").unlink()
    refused(make_sample(path), "cannot be read as zarr", "GroupNotFoundError")


def test_truncated_gzip(tmp_path):
    path = WRITERS["10x_mtx_gz"](tmp_path, make_source(200))
    truncate(tmp_path / "a/matrix.mtx.gz")
    refused(make_sample(path), "cannot be read as 10x_mtx (EOFError", read=True)
    truncate(tmp_path / "a/barcodes.tsv.gz")
    refused(make_sample(path), "cannot be read as 10x_mtx (EOFError")


def test_file_that_is_no_gzip(tmp_path):
    path = WRITERS["10x_mtx_gz"](tmp_path, SOURCE)
    (tmp_path / "a/features.tsv.gz").write_text("ENSG1\tA\n")
    refused(make_sample(path), "cannot be read as 10x_mtx (BadGzipFile")


MTX = "%%MatrixMarket matrix coordinate integer general\n2 3 2\n"


@pytest.mark.parametrize(
    ("text", "read", "words"),
    [
        (MTX + "1 1 4\n", True, ("1 entries", "the header says 2", "truncated")),
        (MTX + "1 1 4\n2 3 5\n2 2 1\n", True, ("3 entries", "the header says 2")),
        (MTX + "1 1 4\n2 4 5\n", True, ("is damaged", "an entry for cell 3 (counted from 0) of 3")),
        (MTX + "0 1 4\n2 3 5\n", True, ("is damaged", "an entry for gene -1")),
        (MTX + "1 1 4\n2 3\n", True, ("cannot be read as 10x_mtx",)),
        (MTX + "1 1 4\n2 3 five\n", True, ("cannot be read as 10x_mtx",)),
        (MTX + "1 1 4\n2 3 2.5\n", True, ("cannot be read as 10x_mtx",)),
        ("%%MatrixMarket matrix array integer general\n2 3\n1\n", False, ("matrix.mtx that begins with", "coordinate")),
        ("%%MatrixMarket matrix coordinate pattern general\n2 3 0\n", False, ("pattern", "integer general")),
        ("", False, ("matrix.mtx that begins with ''",)),
        (MTX.split("\n")[0], False, ("cannot be read as 10x_mtx",)),
        (MTX.replace("2 3 2", "3 2 2"), False, ("2 cells x 3 genes beside the names of 3 cells and 2 genes",)),
    ],
)
def test_mtx_that_is_not_as_its_header_says(tmp_path, text, read, words):
    write_10x_mtx(tmp_path / "a", make_source(3, 2), zipped=False)
    (tmp_path / "a/matrix.mtx").write_text(text)
    refused(make_sample(tmp_path / "a"), *words, read=read)


@pytest.mark.parametrize("name", ["barcodes.tsv", "features.tsv"])
def test_mtx_folder_without_names(tmp_path, name):
    path = WRITERS["10x_mtx_gz"](tmp_path, SOURCE)
    (tmp_path / "a" / f"{name}.gz").unlink()
    refused(make_sample(path), f"has no {name}", f"{name}, {name}.gz")


def test_mtx_features_of_one_column(tmp_path):
    path = WRITERS["10x_mtx_gz"](tmp_path, SOURCE)
    (tmp_path / "a/features.tsv.gz").write_bytes(gzip.compress("\n".join(SOURCE.ids).encode()))
    refused(make_sample(path), "features.tsv.gz with one column", "gene id and symbol")


def test_names_that_do_not_fit_the_matrix(tmp_path):
    path = WRITERS["10x_h5"](tmp_path, SOURCE)
    with h5py.File(path, "a") as file:
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array(SOURCE.barcodes[:-1], dtype="S")
    refused(make_sample(path), "37 cells x 23 genes beside the names of 36 cells and 23 genes")


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
@pytest.mark.parametrize("kind", ["h5ad_csr", "h5ad_csc", "10x_h5"])
def test_sparse_arrays_that_do_not_fit_each_other(tmp_path, kind, name):
    path = WRITERS[kind](tmp_path, SOURCE)
    node = "matrix" if kind == "10x_h5" else "X"
    with h5py.File(path, "a") as file:
        values = file[node][name][:-1]
        del file[node][name]
        file[node][name] = values
    refused(make_sample(path), "is damaged", "rows or columns")


@pytest.mark.parametrize("kind", ["h5ad_csr", "h5ad_csc"])
def test_indices_outside_the_matrix(tmp_path, kind):
    path = WRITERS[kind](tmp_path, SOURCE)
    with h5py.File(path, "a") as file:
        file["X/indices"][3] = 99
    refused(make_sample(path), "is damaged: it holds an entry for", "99 (counted from 0)", read=True)


@pytest.mark.parametrize("kind", ["h5ad_csr", "h5ad_csc"])
def test_row_pointer_that_runs_back(tmp_path, kind):
    path = WRITERS[kind](tmp_path, SOURCE)
    with h5py.File(path, "a") as file:
        file["X/indptr"][3] = 0
    refused(make_sample(path), read=True)


def test_values_that_are_no_numbers(tmp_path):
    path = write_loom(tmp_path / "a.loom", SOURCE)
    with h5py.File(path, "a") as file:
        file["layers/text"] = SOURCE.counts.T.astype("S")
    refused(make_sample(path, layer="layers/text"), "values of type |S", "expected numbers")


@pytest.mark.parametrize("name", ["row_attrs/Gene", "col_attrs/CellID"])
def test_loom_without_names(tmp_path, name):
    path = write_loom(tmp_path / "a.loom", SOURCE)
    with h5py.File(path, "a") as file:
        del file[name]
    refused(make_sample(path), f"has no {name.split('/')[1]}", "it has")


# Layers, columns, names


@pytest.mark.parametrize(
    ("kind", "there"),
    [("h5ad_csr", "X, layers/counts, raw"), ("zarr3_csr", "X"), ("10x_h5", "X"), ("10x_mtx_gz", "X"),
     ("loom", "X, layers/double")],
)  # fmt: skip
def test_no_such_layer(tmp_path, kind, there):
    adata = make_anndata(SOURCE)
    adata.raw, adata.layers["counts"] = adata, adata.X
    path = write_h5ad(tmp_path / "a.h5ad", adata) if kind == "h5ad_csr" else WRITERS[kind](tmp_path, SOURCE)
    sample = make_sample(path, layer="layers/count")
    refused(sample, f"has no layer 'layers/count'; expected one of {there}: set `layer`")


def test_no_x(tmp_path):
    adata = make_anndata(SOURCE)
    adata = ad.AnnData(None, obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    for path in (write_h5ad(tmp_path / "a.h5ad", adata), write_zarr(tmp_path / "a.zarr", adata)):
        refused(make_sample(path), "has no layer 'X'; expected one of layers/counts")


def test_several_genomes(tmp_path):
    path = write_10x_h5_v2(tmp_path / "a.h5", {"hg19": SOURCE, "mm10": SOURCE})
    refused(make_sample(path), "has no layer 'X'; expected one of hg19, mm10: set `layer`")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gene_key": "ensembl"}, ("var column 'ensembl', which cohort.gene_key names", "var_names, gene_ids")),
        ({"symbols": "name"}, ("var column 'name', which qc.symbols names", "var_names, gene_ids")),
        ({"keep_obs": ("sex",)}, ("obs column 'sex', which cohort.keep_obs names", "donor, run, code, age, female")),
    ],
)
def test_no_such_column(tmp_path, settings, words):
    refused(make_sample(WRITERS["zarr3_csr"](tmp_path, SOURCE)), *words, **settings)


def test_no_such_column_to_select_by(tmp_path):
    path = WRITERS["h5ad_csr"](tmp_path, SOURCE)
    words = ("no obs column 'patient', which select names", "donor, run, code, age, female")
    refused(make_sample(path, select="donor=101,patient=3"), *words)
    path = WRITERS["10x_h5"](tmp_path, SOURCE)
    refused(make_sample(path, select="donor=101"), "no obs column 'donor'", "the file has no obs columns")


def test_select_that_matches_nothing(tmp_path):
    path = WRITERS["h5ad_csr"](tmp_path, SOURCE)
    words = ("has no cell with donor=1017, run=1", "donor: 101, 1016, NA; run: 0, 1, 2", "correct `select`")
    refused(make_sample(path, select="donor=1017,run=1"), *words)
    refused(make_sample(path, select="donor=101,run=1"), "has no cell with donor=101, run=1")
    refused(make_sample(path, select="code=x"), "c0, c1, c10", "and 27 more")


def test_duplicate_barcodes(tmp_path):
    adata = make_anndata(SOURCE)
    adata.obs_names = ["A", "B", "A", *SOURCE.barcodes[3:]]
    path = write_h5ad(tmp_path / "a.h5ad", adata)
    refused(make_sample(path), "has 1 barcodes that stand more than once: A;", "`select` (obs columns: donor, run")
    assert len(open_sample(make_sample(path, select="run=0")).obs) == 13


@pytest.mark.parametrize("write", [write_10x_h5, write_10x_mtx])
def test_duplicate_genes_with_a_column_that_is_unique(tmp_path, write):
    source = make_source()
    source.symbols[4] = source.symbols[7] = "TBCE"
    source.symbols[5] = source.symbols[6] = "ATXN7"
    sample = make_sample(write(tmp_path / "a", source), format=write.__name__[6:])
    refused(sample, "has 2 gene names that stand more than once: ATXN7, TBCE", "set cohort.gene_key to gene_ids")
    assert len(open_sample(sample, gene_key="gene_ids").var) == 23


def test_duplicate_genes_without_a_way_out(tmp_path):
    adata = make_anndata(SOURCE)
    adata.var["gene_ids"] = "E"
    adata.var["mean"] = np.arange(23.0)
    adata.var_names = ["A", "A", *SOURCE.symbols[2:]]
    sample = make_sample(write_h5ad(tmp_path / "a.h5ad", adata))
    refused(sample, "has 1 gene names that stand more than once: A;", "no column of var is: rename the genes")


@pytest.mark.parametrize(("n_obs", "n_vars"), [(0, 5), (5, 0)])
@pytest.mark.parametrize("kind", ["h5ad", "zarr", "10x_h5", "10x_mtx", "loom"])
def test_empty_sample(tmp_path, kind, n_obs, n_vars):
    source = make_source(max(n_obs, 1), max(n_vars, 1))
    source.counts.resize((n_obs, n_vars), refcheck=False)
    del source.barcodes[n_obs:], source.ids[n_vars:], source.symbols[n_vars:]
    writers = {"h5ad": lambda path: write_h5ad(path, make_anndata(source)),
               "zarr": lambda path: write_zarr(path, make_anndata(source)),
               "10x_h5": lambda path: write_10x_h5(path, source),
               "10x_mtx": lambda path: write_10x_mtx(path, source),
               "loom": lambda path: write_empty_loom(path, source)}  # fmt: skip
    sample = make_sample(writers[kind](tmp_path / "a"), format=kind)
    refused(sample, f"is empty: it holds {n_obs} cells and {n_vars} genes", "leave the sample out")


def write_empty_loom(path, source) -> str:
    with h5py.File(path, "w") as file:
        file["matrix"] = source.counts.T
        file["row_attrs/Gene"] = np.array(source.symbols, dtype="S1")
        file["col_attrs/CellID"] = np.array(source.barcodes, dtype="S1")
    return str(path)


def test_no_feature_is_a_gene(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", SOURCE, types=["Antibody Capture"] * 23)
    refused(make_sample(path), "is empty: it holds 37 cells and 0 genes")


# Values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, ("non-finite value nan",)),
        (np.inf, ("non-finite value inf",)),
        (-2, ("negative value -2.0", "Scaled and log-normalised matrices are the commonest mistake")),
        (1.5, ("non-integer value 1.5", "Log-normalised matrices are the commonest mistake")),
        (2.0**32, ("too large value 4294967296.0", "at most 4294967295")),
    ],
)
@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_values_that_are_no_counts(tmp_path, make, value, words):
    adata = make_anndata(SOURCE, np.asarray, np.float64)
    adata.X[20, 6] = value
    adata.X = make(adata.X)
    sample = make_sample(write_h5ad(tmp_path / "a.h5ad", adata))
    words = (*words, "at cell 'CELL20-1', gene 'Gene6' of X", "expected raw counts", "The file has no other layer")
    refused(sample, *words, read=True)


@pytest.mark.parametrize(("dtype", "value"), [("i1", -1), ("i4", -(2**31)), ("i8", 2**40), ("u8", 2**63)])
def test_whole_numbers_that_are_no_counts(tmp_path, dtype, value):
    path = write_loom(tmp_path / "a.loom", SOURCE)
    with h5py.File(path, "a") as file:
        counts = np.minimum(SOURCE.counts, 9).T.astype(dtype)
        counts[5, 30] = value
        file["layers/bad"] = counts
    message = refused(make_sample(path, layer="layers/bad"), str(value), "'CELL30-1', gene 'Gene5'", read=True)
    assert "whole numbers are in X, layers/double." in message


def test_the_cell_is_named_right_under_select_and_keep(tmp_path):
    adata = make_anndata(SOURCE)
    adata.X[22, 6] = 0.5
    raw = open_sample(make_sample(write_h5ad(tmp_path / "a.h5ad", adata), select="run=1"), chunk_cells=3)
    assert sum(len(positions) for positions, _ in iter_counts(raw, np.array([0, 2, 4, 8]))) == 4
    with pytest.raises(ValueError, match=r"non-integer value 0\.5 at cell 'CELL22-1', gene 'Gene6'"):
        list(iter_counts(raw, np.array([0, 2, 7, 8])))


def test_log_normalised_matrix_names_the_layer_to_take(tmp_path):
    adata = make_anndata(SOURCE)
    adata.layers["counts"] = sp.csc_matrix(adata.X)
    adata.layers["half"] = adata.X / 2
    adata.X = adata.X.log1p()
    adata.raw = adata
    message = refused(make_sample(write_h5ad(tmp_path / "a.h5ad", adata)), "of X", "Set `layer`", read=True)
    assert "whole numbers are in layers/counts." in message
    message = refused(make_sample(tmp_path / "a.h5ad", layer="raw"), "of raw", read=True)
    assert "whole numbers are in layers/counts." in message


def test_log_normalised_matrix_without_raw_counts(tmp_path):
    adata = make_anndata(SOURCE)
    adata.X = adata.X.log1p()
    adata.raw = adata
    sample = make_sample(write_zarr(tmp_path / "a.zarr", adata))
    refused(sample, "No other layer holds whole numbers (raw): take a file with raw counts", read=True)


def test_no_room_to_lay_a_matrix_out(tmp_path, monkeypatch):
    raw = open_sample(make_sample(WRITERS["10x_mtx_gz"](tmp_path, SOURCE)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(OSError, match=r"sample 'donor07' is not stored by cells.*has 10 left; set TMPDIR"):
        list(iter_counts(raw))


def test_zarr_array_instead_of_a_group(tmp_path):
    zarr.save_array(str(tmp_path / "a.zarr"), np.zeros(3))
    refused(make_sample(tmp_path / "a.zarr"), "cannot be read as zarr")


def test_file_where_a_folder_is_expected(tmp_path):
    path = WRITERS["h5ad_csr"](tmp_path, SOURCE)
    refused(make_sample(path, format="zarr"), "cannot be read as zarr")
    refused(make_sample(path, format="10x_mtx"), "has no barcodes.tsv")
    refused(make_sample(tmp_path, format="h5ad"), "cannot be read as h5ad")
