"""The readers against what was written by hand, and against scanpy and anndata on real data."""

import gc
import tempfile
from itertools import pairwise

import anndata as ad
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from make_inputs import (
    WRITERS,
    make_anndata,
    make_sample,
    make_source,
    open_sample,
    write_10x_h5,
    write_10x_h5_v2,
    write_10x_mtx,
    write_h5ad,
    write_loom,
    write_zarr,
)

from cohortvi.cohort.bands import Banded
from cohortvi.cohort.contents import as_text
from cohortvi.cohort.formats import describe
from cohortvi.cohort.matrices import GAP, Compressed, read_rows, spans
from cohortvi.cohort.places import locate
from cohortvi.cohort.readers import iter_counts

SOURCE = make_source()
ALL = len(SOURCE.barcodes)


def all_counts(raw, keep=None) -> np.ndarray:
    return np.vstack([block.toarray() for _, block in iter_counts(raw, keep)])


# Every format


@pytest.mark.parametrize("kind", WRITERS)
def test_chunks_hold_the_matrix_that_was_written(tmp_path, kind):
    sample = make_sample(WRITERS[kind](tmp_path, SOURCE))
    assert kind.startswith(locate(sample).format)  # guessed
    for chunk_cells in (1, 5, 8, ALL, 1000):
        raw = open_sample(sample, chunk_cells=chunk_cells)
        assert list(raw.obs.index) == SOURCE.barcodes
        assert list(raw.var.index) == list(raw.var["symbol"]) == SOURCE.symbols
        np.testing.assert_array_equal(raw.row, np.arange(ALL))
        seen = []
        for positions, block in iter_counts(raw):
            assert (block.data.dtype, block.indices.dtype, block.has_sorted_indices) == (np.uint32, np.int32, True)
            assert len(positions) == block.shape[0] <= chunk_cells
            assert block.data.all()
            np.testing.assert_array_equal(block.toarray(), SOURCE.counts[positions])
            seen.extend(positions)
        assert seen == list(range(ALL))


@pytest.mark.parametrize("kind", WRITERS)
def test_dask_blocks_are_csr_of_the_file_s_type(tmp_path, kind):
    raw = open_sample(make_sample(WRITERS[kind](tmp_path, SOURCE)))
    assert raw.counts.chunks == ((8, 8, 8, 8, 5), (len(SOURCE.symbols),))
    blocks = [block.compute() for block in raw.counts.to_delayed().ravel()]
    assert all(isinstance(block, sp.csr_matrix) and block.dtype == raw.counts.dtype for block in blocks)
    np.testing.assert_array_equal(raw.counts.compute().toarray(), SOURCE.counts)  # in threads


@pytest.mark.parametrize("kind", ["h5ad_csr", "h5ad_csc", "h5ad_dense", "zarr2_csr", "zarr3_csr", "loom"])
def test_row_is_the_file_s_row_under_select(tmp_path, kind):
    sample = make_sample(WRITERS[kind](tmp_path, SOURCE), select="run=1")
    for chunk_cells in (1, 4, 100):
        raw = open_sample(sample, chunk_cells=chunk_cells)
        np.testing.assert_array_equal(raw.row, np.arange(1, ALL, 3))
        assert raw.row.dtype == np.int64
        assert list(raw.obs.index) == [SOURCE.barcodes[row] for row in raw.row]
        np.testing.assert_array_equal(all_counts(raw), SOURCE.counts[raw.row])


@pytest.mark.parametrize("kind", WRITERS)
def test_gene_ids_name_genes_and_symbols_stay(tmp_path, kind):
    key = "Accession" if kind == "loom" else "gene_ids"
    raw = open_sample(make_sample(WRITERS[kind](tmp_path, SOURCE)), gene_key=key)
    assert (list(raw.var.index), list(raw.var["symbol"])) == (SOURCE.ids, SOURCE.symbols)
    raw = open_sample(raw.sample, symbols=key)
    assert (list(raw.var.index), list(raw.var["symbol"])) == (SOURCE.symbols, SOURCE.ids)


@pytest.mark.parametrize("kind", ["h5ad_csr", "zarr2_csr", "zarr3_csr", "10x_h5", "10x_mtx_gz", "loom"])
def test_urls_are_read_like_paths(tmp_path, kind):
    path = WRITERS[kind](tmp_path, SOURCE)
    name = path.rsplit("/", 1)[1]
    memory = fsspec.filesystem("memory")
    memory.put(path, f"/{kind}/{name}", recursive=True)
    for url in (f"memory://{kind}/{name}", f"file://{path}"):
        raw = open_sample(make_sample(url))
        np.testing.assert_array_equal(all_counts(raw), SOURCE.counts)
        assert list(raw.obs.index) == SOURCE.barcodes
    memory.rm(f"/{kind}", recursive=True)


def test_format_of_the_sheet_goes_before_the_name(tmp_path):
    path = write_h5ad(tmp_path / "counts.bin", make_anndata(SOURCE))
    raw = open_sample(make_sample(path, format="h5ad"))
    np.testing.assert_array_equal(all_counts(raw), SOURCE.counts)


# Rows


@given(st.sets(st.integers(0, 2000)), st.integers(1, 300))
def test_spans_cover_the_rows_once_within_bounds(rows, most):
    rows = np.array(sorted(rows), dtype=np.int64)
    cut = list(spans(rows, most))
    assert [k for i, j in cut for k in range(i, j)] == list(range(len(rows)))
    assert all(rows[j - 1] - rows[i] < most and (np.diff(rows[i:j]) <= GAP).all() for i, j in cut)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_banded_rows_equal_scipy_s(data):
    n_obs, n_vars = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size = data.draw(st.integers(0, 80))
    rows, columns = rng.integers(0, n_obs, size), rng.integers(0, n_vars, size)
    values = rng.integers(0, 5, size)
    cuts = sorted([0, *data.draw(st.lists(st.integers(0, size), max_size=4)), size])
    pieces = [(rows[a:b], columns[a:b], values[a:b]) for a, b in pairwise(cuts)]
    band = data.draw(st.integers(1, 12))
    matrix = Banded(None, (n_obs, n_vars), values.dtype, band, lambda: (piece for piece in pieces))
    wanted = np.flatnonzero(rng.random(n_obs) < 0.6)
    if len(wanted):
        block = read_rows(matrix, wanted, None, band)
        expected = sp.coo_matrix((values, (rows, columns)), (n_obs, n_vars)).toarray()[wanted]
        np.testing.assert_array_equal(block.toarray(), expected)


def test_no_more_rows_than_a_chunk_are_read_at_a_time(tmp_path, monkeypatch):
    source = make_source(n_obs=2000, n_vars=5)
    adata = make_anndata(source)
    adata.obs["picked"] = np.isin(np.arange(2000), [3, 4, 90, 91, 700, 1999])
    read, asked = Compressed._read, []

    def record(self, node, start, stop):
        asked.append((int(start), int(stop)))
        return read(self, node, start, stop)

    monkeypatch.setattr(Compressed, "_read", record)
    sample = make_sample(write_h5ad(tmp_path / "a.h5ad", adata), select="picked=True")
    raw = open_sample(sample, chunk_cells=50)
    assert not asked
    np.testing.assert_array_equal(all_counts(raw), source.counts[raw.row])
    assert asked == [(3, 5), (90, 92), (700, 701), (1999, 2000)]


def test_keep_delivers_those_positions_only(tmp_path):
    raw = open_sample(make_sample(WRITERS["h5ad_csr"](tmp_path, SOURCE), select="run=1"), chunk_cells=3)
    keep = np.array([0, 1, 7, 8, 11])
    positions = np.concatenate([positions for positions, _ in iter_counts(raw, keep)])
    np.testing.assert_array_equal(positions, keep)
    np.testing.assert_array_equal(all_counts(raw, keep), SOURCE.counts[raw.row[keep]])
    assert list(iter_counts(raw, keep[:0])) == []


def test_layout_file_has_no_name_and_goes_with_the_matrix(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    matrix = describe(make_sample(WRITERS["10x_mtx_plain"](tmp_path, SOURCE)), [], 8).matrix
    with matrix.open() as read:
        assert read(0, 3).shape == (3, len(SOURCE.ids))
        assert not list((tmp_path / "scratch").iterdir())
    file = matrix._layout[0]
    del matrix, read
    gc.collect()
    assert file.closed


def test_rows_whose_genes_are_unsorted_or_repeated_come_in_order(tmp_path):
    adata = make_anndata(make_source(2, 4))
    path = write_h5ad(tmp_path / "a.h5ad", adata)
    with h5py.File(path, "a") as file:
        del file["X/data"], file["X/indices"], file["X/indptr"]
        file["X/data"] = np.array([1, 2, 3, 0, 9], dtype=np.int16)
        file["X/indices"] = np.array([3, 0, 3, 1, 2], dtype=np.uint16)
        file["X/indptr"] = np.array([0, 4, 5])
    [(_, block)] = iter_counts(open_sample(make_sample(path)))
    np.testing.assert_array_equal(block.toarray(), [[2, 0, 0, 4], [0, 0, 9, 0]])
    np.testing.assert_array_equal(block.indices, [0, 3, 2])


@pytest.mark.parametrize("dtype", ["bool", "u1", ">i4", "u8", "f2", ">f8"])
def test_every_type_of_number_is_read(tmp_path, dtype):
    source = make_source()
    counts = np.minimum(source.counts, 1)
    path = write_loom(tmp_path / "a.loom", source)
    with h5py.File(path, "a") as file:
        file["layers/typed"] = counts.T.astype(dtype)
    np.testing.assert_array_equal(all_counts(open_sample(make_sample(path, layer="layers/typed"))), counts)


def test_large_counts_are_exact(tmp_path):
    source = make_source()
    source.counts[1, 1] = 2**32 - 1
    raw = open_sample(make_sample(write_10x_mtx(tmp_path / "a", source)))
    np.testing.assert_array_equal(all_counts(raw), source.counts)


# Obs, select, layers, features


@pytest.mark.parametrize(
    ("select", "first"),
    [("donor=1016", 1), ("donor=NA", 2), ("run=0", 0), ("age=31", 0), ("age=40.5", 1), ("age=NA", 2),
     ("female=True", 1), ("donor=101,run=0", 0)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["h5ad_csr", "zarr2_csr", "zarr3_csr"])
def test_select_compares_as_text(tmp_path, kind, select, first):
    raw = open_sample(make_sample(WRITERS[kind](tmp_path, SOURCE), select=select))
    np.testing.assert_array_equal(raw.row, np.arange(first, ALL, 3))


def test_select_compares_strings(tmp_path):
    raw = open_sample(make_sample(WRITERS["h5ad_csr"](tmp_path, SOURCE), select="code=c4"))
    np.testing.assert_array_equal(raw.row, [4])


def test_kept_columns_are_text(tmp_path):
    columns = ("age", "donor", "female")
    raw = open_sample(make_sample(WRITERS["h5ad_csr"](tmp_path, SOURCE), select="run=2"), keep_obs=columns)
    assert list(raw.obs.columns) == list(columns)
    assert raw.obs.iloc[0].tolist() == ["NA", "NA", "False"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, 2], ["1", "2"]),
        (np.array([1016.0, np.nan, 0.1], np.float32), ["1016", "NA", "0.1"]),
        (np.array([b"a", b"\xc3\xa9"]), ["a", "é"]),
        (["NA", None, pd.NA, "x"], ["NA", "NA", "NA", "x"]),
        (pd.array([True, None], dtype="boolean"), ["True", "NA"]),
        (pd.Categorical([3, None, 3]), ["3", "NA", "3"]),
        ([], []),
    ],
)
def test_values_as_text(values, texts):
    assert as_text(values).tolist() == texts


def test_layers_and_raw_are_read_with_their_own_genes(tmp_path):
    adata = make_anndata(SOURCE)
    adata.raw = adata
    adata = adata[:, 5:].copy()
    adata.layers["counts"] = sp.csc_matrix(adata.X)
    sc.pp.log1p(adata)
    for path in (write_h5ad(tmp_path / "a.h5ad", adata), write_zarr(tmp_path / "a.zarr", adata)):
        raw = open_sample(make_sample(path, layer="layers/counts"))
        assert set(raw.layers) == {"X", "layers/counts", "raw"}
        np.testing.assert_array_equal(all_counts(raw), SOURCE.counts[:, 5:])
        raw = open_sample(make_sample(path, layer="raw"), gene_key="gene_ids")
        np.testing.assert_array_equal(all_counts(raw), SOURCE.counts)
        assert (list(raw.var.index), list(raw.var["symbol"])) == (SOURCE.ids, SOURCE.symbols)


def test_a_file_may_have_layers_and_no_x(tmp_path):
    adata = make_anndata(SOURCE)
    adata = ad.AnnData(None, obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    raw = open_sample(make_sample(write_h5ad(tmp_path / "a.h5ad", adata), layer="layers/counts"))
    assert raw.layers == ("layers/counts",)
    np.testing.assert_array_equal(all_counts(raw), SOURCE.counts)


def test_loom_layers_are_read(tmp_path):
    raw = open_sample(make_sample(write_loom(tmp_path / "a.loom", SOURCE), layer="layers/double"))
    np.testing.assert_array_equal(all_counts(raw), 2 * SOURCE.counts)


def test_genomes_of_cell_ranger_2_are_layers(tmp_path):
    other = make_source(n_obs=ALL, n_vars=4, seed=1)
    path = write_10x_h5_v2(tmp_path / "a.h5", {"hg19": SOURCE, "mm10": other})
    raw = open_sample(make_sample(path, layer="mm10"))
    np.testing.assert_array_equal(all_counts(raw), other.counts)


TYPES = ["Gene Expression", "Antibody Capture", "Gene Expression"] * 8


@pytest.mark.parametrize("write", [write_10x_h5, write_10x_mtx])
def test_features_that_are_no_genes_are_left_out(tmp_path, write):
    raw = open_sample(make_sample(write(tmp_path / "a.h5", SOURCE, types=TYPES[:23]), format=write.__name__[6:]))
    genes = [i for i, kind in enumerate(TYPES[:23]) if kind == "Gene Expression"]
    assert list(raw.var.index) == [SOURCE.symbols[i] for i in genes]
    np.testing.assert_array_equal(all_counts(raw), SOURCE.counts[:, genes])


def test_frames_of_anndata_0_7_are_read(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", make_anndata(SOURCE))
    with h5py.File(path, "a") as file:
        for column in file["obs"].values():
            column.attrs.clear()
        codes, categories = file["obs/donor/codes"][:], file["obs/donor/categories"][:]
        del file["obs/donor"]
        file["obs/donor"] = codes
        file["obs/__categories/donor"] = categories
        file["obs/donor"].attrs["categories"] = file["obs/__categories/donor"].ref
        file["obs"].attrs["encoding-version"] = "0.1.0"
    raw = open_sample(make_sample(path, select="donor=1016"))
    np.testing.assert_array_equal(raw.row, np.arange(1, ALL, 3))


def test_sharded_zarr_is_read(tmp_path):
    adata = make_anndata(SOURCE)
    path = write_zarr(tmp_path / "a.zarr", adata)
    group = zarr.open_group(path, mode="a", use_consolidated=False)
    for name in ("data", "indices"):
        values = group["X"][name][:]
        group["X"].create_array(name, data=values, chunks=(16,), shards=(64,), overwrite=True)
    (tmp_path / "a.zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    np.testing.assert_array_equal(all_counts(open_sample(make_sample(path))), SOURCE.counts)


# Against scanpy and anndata


def assert_equals(raw, adata, rows=slice(None)):
    expected = sp.csr_matrix(adata.X[rows])
    found = sp.vstack([block for _, block in iter_counts(raw)])
    assert (found != expected).nnz == 0
    assert list(raw.obs.index) == list(adata.obs_names[rows])


def test_10x_h5_files_equal_scanpy_s(tmp_path):
    of_3, of_2 = write_10x_h5(tmp_path / "3.h5", SOURCE, TYPES[:23]), write_10x_h5_v2(tmp_path / "2.h5", {"hg": SOURCE})
    for path in (of_3, of_2):
        adata = sc.read_10x_h5(path)
        raw = open_sample(make_sample(path), symbols="gene_ids")
        assert_equals(raw, adata)
        assert list(raw.var.index) == list(adata.var_names)
        assert list(raw.var["symbol"]) == list(adata.var["gene_ids"])


@pytest.mark.parametrize("zipped", [True, False])
def test_10x_mtx_folders_equal_scanpy_s(tmp_path, zipped):
    path = write_10x_mtx(tmp_path / "a", SOURCE, zipped=zipped, types=TYPES[:23], shuffled=True)
    adata = sc.read_10x_mtx(path)
    raw = open_sample(make_sample(path), symbols="gene_ids")
    assert_equals(raw, adata)
    assert list(raw.var.index) == list(adata.var_names)
    assert list(raw.var["symbol"]) == list(adata.var["gene_ids"])


def test_mtx_entries_of_equal_place_add_up_as_in_scipy(tmp_path):
    folder = tmp_path / "a"
    write_10x_mtx(folder, make_source(3, 2), zipped=False)
    header = "%%MatrixMarket matrix coordinate real general\n2 3 4\n"
    (folder / "matrix.mtx").write_text(header + "1 1 2.0\n2\t3 1\n1 1 3e0\n1 2 0\n")
    expected = scipy.io.mmread(folder / "matrix.mtx").toarray().T
    np.testing.assert_array_equal(all_counts(open_sample(make_sample(folder))), expected)


COVID = ["Normal_PBMC_5", "Normal_PBMC_14", "nCoV_PBMC_1", "nCoV_PBMC_15", "nCoV_PBMC_16", "nCoV_PBMC_17"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("name", COVID)
def test_covid_files_equal_scanpy_s(test_data, name):
    path = test_data / "covid_pbmc_6samples" / f"{name}.h5"
    adata = sc.read_10x_h5(path)
    raw = open_sample(make_sample(path), gene_key="gene_ids", chunk_cells=512)
    assert_equals(raw, adata)
    assert list(raw.var.index) == list(adata.var["gene_ids"])
    assert list(raw.var["symbol"]) == list(adata.var_names)


@pytest.mark.parametrize("name", ["pbmc3k/pbmc3k", "sc_mixology_5batches/sc_mixology_5batches"])
def test_h5ad_files_equal_anndata_s(test_data, name):
    path = test_data / f"{name}.h5ad"
    adata = ad.read_h5ad(path)
    symbols = "symbol" if "symbol" in adata.var else None
    raw = open_sample(make_sample(path), symbols=symbols, chunk_cells=1000)
    assert_equals(raw, adata)
    assert list(raw.var["symbol"]) == list(adata.var["symbol"] if symbols else adata.var_names)


def test_kang_sample_is_selected_as_anndata_does(test_data):
    path = test_data / "kang_ifnb_13999/kang_ifnb_13999.h5ad"
    adata = ad.read_h5ad(path)
    rows = np.flatnonzero((adata.obs["donor"] == "1016") & (adata.obs["condition"] == "ctrl"))
    sample = make_sample(path, select="donor=1016,condition=ctrl")
    raw = open_sample(sample, keep_obs=("cell_type",), chunk_cells=256)
    assert len(raw.obs) == len(rows) == 717
    np.testing.assert_array_equal(raw.row, rows)
    assert_equals(raw, adata, rows)
    assert list(raw.obs["cell_type"]) == list(adata.obs["cell_type"].iloc[rows])


@pytest.mark.parametrize("kind", ["zarr2_csr", "zarr2_csc", "10x_mtx_gz", "loom"])
def test_real_counts_come_back_from_other_formats(test_data, tmp_path, kind):
    adata = ad.read_h5ad(test_data / "pbmc3k/pbmc3k.h5ad")[:200, :3000].copy()
    source = make_source(200, 3000)
    source.counts[:] = adata.X.toarray()
    raw = open_sample(make_sample(WRITERS[kind](tmp_path, source)), chunk_cells=64)
    np.testing.assert_array_equal(all_counts(raw), adata.X.toarray())
