"""store.counts: what anndata and scipy read is what was written, and what was not written whole is never read."""

import json
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cohortvi.files import write_json
from cohortvi.store import array_writer, layout
from cohortvi.store.counts import write_anndata, write_counts, write_stream
from cohortvi.store.opening import open_counts


def matrix(n_obs: int, n_vars: int, seed: int = 0) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.4, (n_obs, n_vars)).astype(np.uint32))


def tables(n_obs: int, n_vars: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    obs = pd.DataFrame({"batch": "run1", "row": np.arange(n_obs) * 3, "score": np.linspace(0, 1, n_obs)})
    obs.index = pd.Index([f"s_{i}" for i in range(n_obs)], dtype=object)
    return obs, pd.DataFrame(index=pd.Index([f"g{i}" for i in range(n_vars)], dtype=object))


def write(x: sp.csr_matrix, folder: Path, size: int = 7, name: str = "s") -> Path:
    """Write `x` in blocks of `size` rows; return the manifest's path."""
    blocks = (x[start : start + size] for start in range(0, x.shape[0], size))
    manifest = write_counts(blocks, *tables(*x.shape), folder / f"{name}.zarr", sample=name)
    write_json(manifest, folder / f"{name}.json")
    return folder / f"{name}.json"


def read_zarr(path: Path) -> ad.AnnData:
    """Read by anndata; any warning is an error but zarr's on the codec of the ids."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        return ad.io.read_zarr(path)


SMALL = layout.Codecs(*(codec._replace(chunk=16) for codec in layout.COMPACT))

counts = arrays(
    np.uint32,
    st.tuples(st.integers(0, 12), st.integers(1, 9)),
    elements=st.one_of(st.just(0), st.integers(0, 3), st.sampled_from([255, 256, 65_535, 65_536, 2**32 - 1])),
    fill=st.just(0),
)


@settings(max_examples=12, deadline=None)
@given(x=counts, written=st.integers(1, 13), read=st.integers(1, 13))
def test_what_is_read_by_anndata_and_in_chunks_of_any_size_is_what_was_written(x, written, read):
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(sp.csr_matrix(x), Path(folder), written)
        adata, facts = read_zarr(manifest.with_suffix(".zarr")), json.loads(manifest.read_text())
        chunks = list(open_counts(manifest).chunks(read))
    obs, var = tables(*x.shape)
    np.testing.assert_array_equal(adata.X.toarray(), x)
    pd.testing.assert_index_equal(adata.var.index, var.index)
    pd.testing.assert_frame_equal(adata.obs.astype({"batch": str}), obs.astype({"batch": str}))
    assert adata.X.data.dtype == np.min_scalar_type(x.max(initial=0))
    assert (facts["n_obs"], facts["n_vars"], facts["nnz"]) == (*x.shape, np.count_nonzero(x))
    assert facts["samples"] == {"s": len(x)}
    assert [start for start, _ in chunks] == list(range(0, len(x), read))
    assert all(chunk.dtype == np.uint32 and chunk.has_canonical_format for _, chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([x[:0], *(chunk.toarray() for _, chunk in chunks)]), x)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32"), (2**32 - 1, "uint32")],
)
def test_counts_lie_in_the_smallest_type_wherever_the_largest_comes(tmp_path, monkeypatch, largest, dtype):
    monkeypatch.setattr(array_writer, "FILE_CHUNKS", 4)  # several files are on disk before the largest count comes
    monkeypatch.setattr(layout, "COMPACT", SMALL)
    x = np.ones((50, 10), np.uint32)
    x[20, 3], x[45, 9] = min(largest, 300), largest
    read = read_zarr(write(sp.csr_matrix(x), tmp_path).with_suffix(".zarr"))
    np.testing.assert_array_equal(read.X.toarray(), x)
    assert read.X.data.dtype == dtype


@pytest.mark.parametrize(("n_vars", "dtype"), [(65_535, "uint16"), (65_536, "uint32"), (70_000, "uint32")])
def test_gene_ids_take_two_bytes_up_to_65535_genes(tmp_path, n_vars, dtype):
    x = sp.random(20, n_vars, 0.001, "csr", random_state=0)
    x.data = np.ones(x.nnz, np.uint32)
    x = sp.csr_matrix(sp.hstack([x[:, :-1], np.ones((20, 1), np.uint32)]), dtype=np.uint32)
    manifest = write(x, tmp_path)
    reader = open_counts(manifest)
    assert reader.indices.dtype == dtype
    assert (sp.vstack([chunk for _, chunk in reader.chunks(6)]) != x).nnz == 0
    np.testing.assert_array_equal(read_zarr(manifest.with_suffix(".zarr")).X.toarray(), x.toarray())


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 1)])
def test_stores_of_few_or_no_cells_are_valid(tmp_path, shape):
    manifest = write(matrix(*shape), tmp_path)
    reader, read = open_counts(manifest), read_zarr(manifest.with_suffix(".zarr"))
    assert read.shape == (reader.n_obs, reader.n_vars) == shape
    assert list(reader.obs.index) == list(read.obs_names)
    assert [chunk.shape for _, chunk in reader.chunks(10)] == ([shape] if shape[0] else [])


def test_a_cell_without_counts_stays(tmp_path):
    x = sp.csr_matrix(np.array([[0, 0], [1, 2], [0, 0], [0, 0]], np.uint32))
    np.testing.assert_array_equal(read_zarr(write(x, tmp_path).with_suffix(".zarr")).X.toarray(), x.toarray())


def test_the_digest_is_of_the_content_not_of_the_blocks_it_came_in(tmp_path):
    x = matrix(60, 20)
    whole = json.loads(write(x, tmp_path, size=60).read_text())
    assert json.loads(write(x, tmp_path, size=1).read_text()) == whole
    other = x.copy()
    other.data[-1] += 1
    assert json.loads(write(other, tmp_path).read_text())["content"] != whole["content"]
    assert json.loads(write(x[::-1], tmp_path).read_text())["content"] != whole["content"]


def test_a_stray_file_in_the_folder_disturbs_no_reader(tmp_path):
    adata = ad.AnnData(np.ones((3, 2), np.float32), obsm={"X_latent": np.zeros((3, 4))}, uns={"seed": 0})
    write_anndata(adata, tmp_path / "latent.zarr")
    manifest = write(matrix(5, 4), tmp_path)
    for path in (tmp_path / "latent.zarr", manifest.with_suffix(".zarr")):
        (path / ".snakemake_timestamp").touch()
    assert read_zarr(tmp_path / "latent.zarr").obsm["X_latent"].shape == (3, 4)
    assert read_zarr(manifest.with_suffix(".zarr")).shape == (5, 4)
    assert open_counts(manifest).obs.shape[0] == 5


def test_a_streamed_anndata_is_plain_csr_that_opens_without_a_warning(tmp_path):
    x, (obs, var) = matrix(40, 30), tables(40, 30)
    graph = {"distances": sp.eye_array(40, format="csr")}
    frame = ad.AnnData(obs=obs, var=var, obsm={"X_umap": np.zeros((40, 2))}, obsp=graph)
    write_stream((x[start : start + 7] for start in range(0, 40, 7)), frame, tmp_path / "atlas.zarr", dtype=np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = ad.io.read_zarr(tmp_path / "atlas.zarr")
    assert (read.X.dtype, read.X.indices.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(read.X.toarray(), x.toarray())
    assert (list(read.obsm), list(read.obsp), list(read.obs_names)) == (["X_umap"], ["distances"], list(obs.index))
    large = sp.csr_matrix(np.full((40, 30), 2**31))
    with pytest.raises(ValueError, match="no counts up to 2147483647"):
        write_stream([large], frame, tmp_path / "atlas.zarr", dtype=np.int32)


def interrupted(x: sp.csr_matrix):
    yield x[:5]
    raise KeyboardInterrupt


def test_a_writer_that_is_interrupted_leaves_no_store_and_the_old_one_as_it_was(tmp_path):
    x = matrix(10, 4)
    with pytest.raises(KeyboardInterrupt):
        write_counts(interrupted(x), *tables(*x.shape), tmp_path / "s.zarr", sample="s")
    assert not list(tmp_path.iterdir())
    manifest = write(x, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_counts(interrupted(2 * x), *tables(*x.shape), tmp_path / "s.zarr", sample="s")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.zarr"]
    assert (next(open_counts(manifest).chunks(10))[1] != x).nnz == 0


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (sp.csr_matrix(np.full((10, 4), 0.5)), "no counts"),
        (sp.csr_matrix(np.full((10, 4), -1)), "no counts"),
        (sp.csr_matrix(np.full((10, 4), 2**32)), "no counts"),
        (matrix(10, 5), "has 5 genes; expected the 4 of var"),
        (matrix(9, 4), "9 rows of counts for the 10 cells"),
        (sp.csr_matrix((np.zeros(1, int), [0], [0, *[1] * 10]), shape=(10, 4)), "row 0 has a zero"),
        (
            sp.csr_matrix((np.ones(2, int), [2, 1], [0, 0, *[2] * 9]), shape=(10, 4)),
            "row 1 has a zero, an unsorted",
        ),
    ],
)
def test_blocks_that_are_no_counts_of_these_cells_and_genes_are_refused(tmp_path, block, message):
    with pytest.raises(ValueError, match=message):
        write_counts([block], *tables(10, 4), tmp_path / "s.zarr", sample="s")
    assert not list(tmp_path.iterdir())


def test_names_that_stand_twice_are_refused(tmp_path):
    obs, var = tables(2, 3)
    with pytest.raises(ValueError, match="cell 'c' stands twice"):
        write_counts([matrix(2, 3)], obs.set_axis(["c", "c"]), var, tmp_path / "s.zarr", sample="s")
    with pytest.raises(ValueError, match="gene 'g' stands twice"):
        write_counts([matrix(2, 3)], obs, var.set_axis(["f", "g", "g"]), tmp_path / "s.zarr", sample="s")


def test_a_manifest_that_is_absent_or_cut_is_refused(tmp_path):
    manifest = write(matrix(5, 4), tmp_path)
    text = manifest.read_text()
    with pytest.raises(ValueError, match=r"other\.json: no such manifest"):
        open_counts(tmp_path / "other.json")
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"s\.json: no JSON .* run the workflow again"):
        open_counts(manifest)
    manifest.write_text('{"n_obs": 5}')
    with pytest.raises(ValueError, match=r"s\.json: the manifest lacks n_vars, nnz"):
        open_counts(manifest)


@pytest.mark.parametrize("fact", ["n_obs", "nnz", "genes", "obs", "content"])
def test_a_manifest_that_differs_from_its_store_is_refused(tmp_path, fact):
    manifest = write(matrix(5, 4), tmp_path)
    facts = json.loads(manifest.read_text())
    write_json({**facts, fact: facts[fact] * 2}, manifest)
    with pytest.raises(ValueError, match=rf"s\.zarr: {fact} differ from the manifest"):
        open_counts(manifest)


def test_a_manifest_does_not_open_the_store_of_another_sample(tmp_path):
    first, second = write(matrix(5, 4), tmp_path), write(matrix(5, 4, seed=1), tmp_path, name="t")
    first.write_text(second.read_text())
    with pytest.raises(ValueError, match=r"content, .*samples, zarr\.json differ from the manifest"):
        open_counts(first)


def test_a_store_that_is_absent_is_refused(tmp_path):
    manifest = write(matrix(5, 4), tmp_path)
    manifest.with_suffix(".zarr").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"s\.zarr: no store that can be opened"):
        open_counts(manifest)


@settings(max_examples=10, deadline=None)
@given(x=counts, data=st.data())
def test_rows_over_other_genes_are_those_of_pandas_reindex(x, data):
    names = [f"g{i}" for i in range(x.shape[1])]
    genes = data.draw(st.lists(st.sampled_from([*names, "absent", "other"]), min_size=1, unique=True))
    with tempfile.TemporaryDirectory() as folder:
        reader = open_counts(write(sp.csr_matrix(x), Path(folder)), genes)
        chunks = [chunk for _, chunk in reader.chunks(5)]
    expected = pd.DataFrame(x.astype(np.int64), columns=names).reindex(columns=genes, fill_value=0).to_numpy()
    assert (reader.n_vars, list(reader.var_names)) == (len(genes), genes)
    assert all(chunk.has_canonical_format for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([expected[:0], *(chunk.toarray() for chunk in chunks)]), expected)


def read_all(manifest: Path) -> list:
    return list(open_counts(manifest).chunks(10))


@pytest.mark.parametrize("array", ["indptr", "indices", "data"])
def test_a_file_that_is_lost_or_cut_is_noticed_when_read(tmp_path, array):
    manifest = write(matrix(50, 30), tmp_path)
    file = manifest.with_suffix(".zarr") / "X" / array / "c" / "0"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"s\.zarr: .*run the workflow again"):
        read_all(manifest)
    file.unlink()
    with pytest.raises(ValueError, match=r"s\.zarr: .*run the workflow again"):
        read_all(manifest)
