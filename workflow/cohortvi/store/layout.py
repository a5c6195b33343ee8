"""The layout that counts/ and shards/ share: an AnnData group in zarr v3, counts as compact CSR, written as a stream.

indices are uint16 (uint32 above 65,535 genes), stored as differences; data the smallest unsigned integer that holds
the largest count; indptr int64. Each lies in few large files of checked chunks (store/array_writer.py). Rows are sorted
by gene and hold no zero. The manifest stands in the root's attributes and, as JSON, beside the store, so that
the two can be told to belong together. Metadata is consolidated: stray files in the folder are never looked at. The
JSON beside the store also holds the digest of zarr.json, in which all shapes, types and codecs stand.
"""

import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ZarrUserWarning

from cohortvi.files import digest, replacing
from cohortvi.store.array_writer import ArrayWriter
from cohortvi.store.codec import Codec
from cohortvi.store.kernels import first_bad_row

OBS_CHUNK = 8_192  # cells of an obs column decoded together; a column is one file
MAX_COUNT = 2**32 - 1
RUN = "snakemake --cores all"


class Codecs(NamedTuple):
    """How the three arrays of a store are compressed."""

    indices: Codec
    data: Codec
    indptr: Codec


# docs/store.md has what was tried.
COMPACT = Codecs(Codec(delta=True), Codec(), Codec(delta=True, chunk=2_048))
# Known to every reader: no differences.
PLAIN = Codecs(Codec(), Codec(), Codec())


class Rows(NamedTuple):
    """CSR arrays of consecutive rows: indptr int64 from 0; indices and data unsigned."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


@contextmanager
def quiet() -> Iterator[None]:
    """Silence zarr on what this layout does on purpose: numcodecs.delta and consolidated metadata, in no spec yet."""
    with warnings.catch_warnings():
        for text in ("Numcodecs codecs are not in the Zarr", "Consolidated metadata is currently not part"):
            warnings.filterwarnings("ignore", text, ZarrUserWarning)
        yield


def write_store(
    blocks: Iterable[Rows],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    path: str | Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write rows, in order, as the store `path`, and return its manifest; `facts` are added to it.

    Memory: a block, and a chunk of each array. The store appears under its name when it is whole. Errors: ValueError if
    the blocks and obs differ in number of cells, a name stands twice, or a block is not as the layout wants it.
    """
    path, obs = Path(path), with_categories(obs)
    check_names(obs, var, path)
    with replacing(path) as partial, quiet():
        root = zarr.open_group(partial, mode="w", zarr_format=3)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        written = write_x(blocks, root, partial, (len(obs), len(var)), COMPACT)
        manifest = {**written, **_describe(obs, var), **facts}
        size = max(min(len(obs), OBS_CHUNK), 1)
        whole = max(-(-len(obs) // size), 1) * size
        checked = {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}
        with zarr.config.set({"array.write_empty_chunks": True}):  # a file that is not there is then a lost one
            ad.io.write_elem(root, "obs", obs, dataset_kwargs={"chunks": (size,), "shards": (whole,), **checked})
            with ad.settings.override(auto_shard_zarr_v3=True):
                ad.io.write_elem(root, "var", var, dataset_kwargs=checked)
        root.attrs["manifest"] = manifest
        zarr.consolidate_metadata(partial)
        return {**manifest, "zarr.json": digest((partial / "zarr.json").read_bytes())}


def with_categories(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its columns of text as categoricals, categories sorted."""
    text = [name for name, column in obs.items() if pd.api.types.is_object_dtype(column)]
    text += [name for name, column in obs.items() if isinstance(column.dtype, pd.StringDtype)]
    return obs.astype(dict.fromkeys(text, "category"))


def check_names(obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> None:
    """Raise ValueError if a cell or a gene stands twice."""
    for what, index in (("cell", obs.index), ("gene", var.index)):
        if not index.is_unique:
            raise ValueError(f"{path}: {what} {index[index.duplicated()][0]!r} stands twice; expected unique names")


def id_type(n_vars: int) -> str:
    """Return the type of gene ids."""
    return "uint16" if n_vars <= np.iinfo(np.uint16).max else "uint32"


def write_x(
    blocks: Iterable[Rows],
    root: zarr.Group,
    folder: Path,
    shape: tuple[int, int],
    codecs: Codecs,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write rows as X of the group that lies in `folder`; return nnz, dtype and the digest of the content.

    `dtype`: None for the compact types of this layout, otherwise the type of the counts, with int32 ids.
    """
    encoding = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)}
    place = (root.create_group("X", attributes=encoding), folder / "X")
    with (
        ArrayWriter(*place, "indices", "int32" if dtype else id_type(shape[1]), codecs.indices) as indices,
        ArrayWriter(*place, "data", dtype or "uint8", codecs.data, grows=dtype is None) as data,
        ArrayWriter(*place, "indptr", "int64", codecs.indptr) as indptr,
    ):
        lengths = [np.zeros(1, np.int64)]
        for block in blocks:
            bad = first_bad_row(*block, shape[1])
            if bad >= 0:
                row = sum(map(len, lengths)) - 1 + bad
                found = f"row {row} has a zero, an unsorted gene or one beyond the {shape[1]} of var"
                raise ValueError(f"{folder.with_suffix('')}: {found}; expected rows sorted by gene, without zeros")
            indices.append(block.indices)
            data.append(block.data)
            lengths.append(np.diff(block.indptr))
        ends = np.cumsum(np.concatenate(lengths))
        if len(ends) != shape[0] + 1:
            found = f"{len(ends) - 1} rows of counts for the {shape[0]} cells of obs"
            raise ValueError(f"{folder.with_suffix('')}: {found}; expected as many rows as cells")
        indptr.append(ends)
        for array in (indices, data, indptr):
            array.close()
    content = content_digest(shape, (array.digest for array in (indptr, indices, data)))
    return {"nnz": int(ends[-1]), "dtype": data.dtype.name, "content": content}


def content_digest(shape: tuple[int, int], arrays: Iterable[str]) -> str:
    """Return the digest of X from its shape and the digests of indptr, indices and data."""
    return digest(list(shape), *arrays)


def _describe(obs: pd.DataFrame, var: pd.DataFrame) -> dict[str, Any]:
    columns = {
        name: digest(column.cat.categories.astype(str).tolist()) if is_categorical(column) else column.dtype.name
        for name, column in obs.items()
    }
    sizes = {"n_obs": len(obs), "n_vars": len(var)}
    digests = {"genes": digest(var.index.tolist()), "var": table_digest(var), "obs": table_digest(obs)}
    return {**sizes, **digests, "columns": columns}


def table_digest(table: pd.DataFrame) -> str:
    """Return the digest of a table: index, names of the columns, values."""
    parts: list[Any] = [table.index.tolist()]
    for name, column in table.items():
        if is_categorical(column):
            parts += [name, column.cat.categories.astype(str).tolist(), column.cat.codes.to_numpy(np.int64)]
        else:
            values = column.to_numpy()
            parts += [name, values.astype(str).tolist() if values.dtype == object else values]
    return digest(*parts)


def repair(path: str | Path) -> str:
    """Return what to do about a damaged store; `path`: its own or its manifest's."""
    place = str(path).removesuffix(".zarr").removesuffix(".json")
    if "://" in place:
        return f"copy {place}.zarr and {place}.json there again, from where they were made"
    store, manifest = (shlex.quote(f"{place}{end}") for end in (".zarr", ".json"))
    return f"run the workflow again without it (rm -rf {store} {manifest}; {RUN} {manifest})"


def is_categorical(column: pd.Series) -> bool:
    """Say whether a column is categorical."""
    return isinstance(column.dtype, pd.CategoricalDtype)
