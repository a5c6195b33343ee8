"""Tiny inputs of known content in every format that the readers read, and the samples that name them."""

import gzip
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cohortvi.cohort.readers import Raw, open_raw
from cohortvi.cohort.sheet import Sample


@dataclass(frozen=True)
class Source:
    """What was written: counts (n, g) as int64, barcodes, Ensembl ids and symbols."""

    counts: np.ndarray
    barcodes: list[str]
    ids: list[str]
    symbols: list[str]


def make_source(n_obs: int = 37, n_vars: int = 23, seed: int = 0) -> Source:
    """Draw sparse counts with an empty cell, an empty gene and one count that needs more than 8 bits."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.4, (n_obs, n_vars)).astype(np.int64)
    counts[n_obs // 2] = 0
    counts[:, n_vars // 2] = 0
    counts[0, 0] = 70_000
    barcodes = [f"CELL{i}-1" for i in range(n_obs)]
    return Source(counts, barcodes, [f"ENSG{i:05d}" for i in range(n_vars)], [f"Gene{i}" for i in range(n_vars)])


def make_anndata(source: Source, kind: Callable = sp.csr_matrix, dtype: type = np.float32) -> ad.AnnData:
    """Return the source as AnnData, its X made by `kind`, with obs columns of every type that `select` must match."""
    n_obs = len(source.barcodes)
    donors = np.arange(n_obs) % 3
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(np.array(["101", "1016", "NA"])[donors]),
            "run": donors.astype(np.int64),
            "code": [f"c{i}" for i in range(n_obs)],
            "age": np.array([31.0, 40.5, np.nan])[donors],
            "female": donors == 1,
        },
        index=source.barcodes,
    )
    var = pd.DataFrame({"gene_ids": source.ids}, index=source.symbols)
    return ad.AnnData(kind(source.counts.astype(dtype)), obs=obs, var=var)


def write_h5ad(path: Path, adata: ad.AnnData) -> str:
    """Write an h5ad file."""
    adata.write_h5ad(path, compression="gzip")
    return str(path)


def write_zarr(path: Path, adata: ad.AnnData, version: int = 3) -> str:
    """Write an AnnData zarr store in format v2 or v3."""
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)
    return str(path)


def write_10x_h5(path: Path, source: Source, types: list[str] | None = None) -> str:
    """Write the .h5 of Cell Ranger 3 and later; `types`: the feature types, Gene Expression if None."""
    types = types or ["Gene Expression"] * len(source.ids)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _write_compressed(group, source)
        features = {"id": source.ids, "name": source.symbols, "feature_type": types, "genome": ["GRCh38"] * len(types)}
        for name, values in features.items():
            group.create_dataset(f"features/{name}", data=np.array(values, dtype="S"))
        group.create_dataset("features/_all_tag_keys", data=np.array(["genome"], dtype="S"))
    return str(path)


def write_10x_h5_v2(path: Path, sources: dict[str, Source]) -> str:
    """Write the .h5 of Cell Ranger 2: a group for each genome."""
    with h5py.File(path, "w") as file:
        for genome, source in sources.items():
            group = file.create_group(genome)
            _write_compressed(group, source)
            group["genes"], group["gene_names"] = np.array(source.ids, "S"), np.array(source.symbols, "S")
    return str(path)


def _write_compressed(group: h5py.Group, source: Source) -> None:
    matrix = sp.csr_matrix(source.counts.astype(np.int32))
    group["barcodes"] = np.array(source.barcodes, dtype="S")
    group["shape"] = np.array(source.counts.shape[::-1], dtype=np.int32)
    group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices.astype(np.int64), matrix.indptr


def write_10x_mtx(
    folder: Path, source: Source, *, zipped: bool = True, types: list[str] | None = None, shuffled: bool = False
) -> str:
    """Write a 10x mtx folder: gzipped with features.tsv, or plain with genes.tsv; `shuffled`: entries in any order."""
    folder.mkdir()
    matrix = sp.coo_matrix(source.counts)
    order = np.random.default_rng(0).permutation(matrix.nnz) if shuffled else np.arange(matrix.nnz)
    entries = [f"{matrix.col[i] + 1} {matrix.row[i] + 1} {matrix.data[i]}" for i in order]
    shape = f"{source.counts.shape[1]} {source.counts.shape[0]} {matrix.nnz}"
    columns = [source.ids, source.symbols]
    if zipped:
        columns.append(types or ["Gene Expression"] * len(source.ids))
    tables = {
        "matrix.mtx": ["%%MatrixMarket matrix coordinate integer general", "%made by hand", shape, *entries],
        "barcodes.tsv": source.barcodes,
        "features.tsv" if zipped else "genes.tsv": ["\t".join(row) for row in zip(*columns, strict=True)],
    }
    for name, lines in tables.items():
        data = "".join(f"{line}\n" for line in lines).encode()
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return str(folder)


def write_loom(path: Path, source: Source, dtype: type = np.int32) -> str:
    """Write a loom file with a layer `double` that holds every count twice."""
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=source.counts.T.astype(dtype), chunks=(8, 8), compression="gzip")
        file.create_dataset("layers/double", data=2 * source.counts.T)
        text = h5py.string_dtype()
        file.create_dataset("row_attrs/Gene", data=np.array(source.symbols, dtype=object), dtype=text)
        file.create_dataset("row_attrs/Accession", data=np.array(source.ids, dtype="S"))
        file.create_dataset("col_attrs/CellID", data=np.array(source.barcodes, dtype=object), dtype=text)
        file["col_attrs/run"] = np.arange(len(source.barcodes)) % 3
        file["col_attrs/pca"] = np.zeros((len(source.barcodes), 2))
    return str(path)


WRITERS: dict[str, Callable[[Path, Source], str]] = {
    "h5ad_csr": lambda folder, source: write_h5ad(folder / "a.h5ad", make_anndata(source)),
    "h5ad_csc": lambda folder, source: write_h5ad(folder / "a.h5ad", make_anndata(source, sp.csc_matrix)),
    "h5ad_dense": lambda folder, source: write_h5ad(folder / "a.h5ad", make_anndata(source, np.asarray)),
    "zarr2_csr": lambda folder, source: write_zarr(folder / "a.zarr", make_anndata(source), 2),
    "zarr2_csc": lambda folder, source: write_zarr(folder / "a.zarr", make_anndata(source, sp.csc_matrix), 2),
    "zarr3_csr": lambda folder, source: write_zarr(folder / "a.zarr", make_anndata(source, dtype=np.uint32)),
    "zarr3_dense": lambda folder, source: write_zarr(folder / "a", make_anndata(source, np.asarray, np.float64)),
    "10x_h5": lambda folder, source: write_10x_h5(folder / "a.h5", source),
    "10x_h5_v2": lambda folder, source: write_10x_h5_v2(folder / "a.h5", {"hg19": source}),
    "10x_mtx_gz": lambda folder, source: write_10x_mtx(folder / "a", source),
    "10x_mtx_plain": lambda folder, source: write_10x_mtx(folder / "a", source, zipped=False, shuffled=True),
    "loom": lambda folder, source: write_loom(folder / "a.loom", source),
}


def truncate(path: str | Path, share: float = 0.5) -> None:
    """Cut a file, as a copy that was broken off leaves it."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])


def make_sample(path: str | Path, *, name: str = "donor07", format: str | None = None, layer: str | None = None,
                select: str = "") -> Sample:  # fmt: skip
    """Return a sample as the sheet would name it; `select` as in the sheet."""
    pairs = tuple(tuple(part.split("=", 1)) for part in select.split(",") if part)
    return Sample(name=name, path=str(path), format=format, layer=layer, select=pairs, batch="b", columns={})


def open_sample(sample: Sample, *, gene_key: str = "var_names", symbols: str | None = None,
                keep_obs: tuple[str, ...] = (), chunk_cells: int = 8) -> Raw:  # fmt: skip
    """Open a sample with the defaults of the config and small chunks."""
    return open_raw(sample, gene_key=gene_key, symbols=symbols, keep_obs=keep_obs, chunk_cells=chunk_cells)
