"""Stores of what a model says of every cell: latent.zarr, expression.zarr.

A valid AnnData: obs holds the cells' names and samples in the order of the counts stores, X, layers and obsm dense
values, float32. Cells are written as they come, a shard at a time, so memory does not grow with the cohort; the store
is whole or not there.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec
from zarr.core.dtype import VariableLengthUTF8

from cohortvi.files import digest, replacing
from cohortvi.store.layout import quiet

CHUNK_CELLS = 8_192  # cells decoded together, at most
CHUNK_BYTES = 2**22  # of a chunk of all arrays, at most
SHARD_CHUNKS = 16  # chunks a file


class Block(NamedTuple):
    """Consecutive cells: names (n,), the code of their sample (n,), and their part of every array of the store."""

    names: np.ndarray
    codes: np.ndarray
    values: tuple[np.ndarray, ...]


def write_cells(
    path: str | Path,
    samples: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Iterator[Block],
    facts: Callable[[], dict[str, Any]],
    *,
    genes: Sequence[str] = (),
    uns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the store `path` of all blocks, in order, and return its manifest.

    `samples`: {name: cells}, in order; `shapes`: {X, layers/NAME or obsm/NAME: what a cell has there}, in the order of
    the blocks' values. The manifest holds n_obs, samples, a digest of names and values, and `facts()`, which is called
    when all blocks are written.
    """
    n_obs = sum(samples.values())
    chunk = max(1, min(CHUNK_CELLS, CHUNK_BYTES // (4 * sum(int(np.prod(shape)) for shape in shapes.values()))))
    with replacing(path) as partial, quiet(), ad.settings.override(auto_shard_zarr_v3=True):
        root = zarr.open_group(partial, mode="w", zarr_format=3)
        arrays = _create(root, list(samples), n_obs, shapes, chunk)
        ad.io.write_elem(root, "var", pd.DataFrame(index=pd.Index(genes, dtype=object)))
        ad.io.write_elem(root, "uns", dict(uns or {}))
        content = _write(arrays, blocks, SHARD_CHUNKS * chunk)
        manifest = {"n_obs": n_obs, "samples": dict(samples), "content": content, **facts()}
        root.attrs["manifest"] = manifest
        zarr.consolidate_metadata(partial)
    return manifest


def _create(
    root: zarr.Group, samples: list[str], n_obs: int, shapes: Mapping[str, tuple[int, ...]], chunk: int
) -> list[zarr.Array]:
    """Create the store with room for all cells; return the arrays of names, of the samples' codes and of the values."""
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    frame = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index", "column-order": ["sample"]}
    obs = root.create_group("obs", attributes=frame)
    column = {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False}
    sample = obs.create_group("sample", attributes=column)
    ad.io.write_elem(sample, "categories", np.array(samples, dtype=object))
    for name in dict.fromkeys(place.split("/")[0] for place in shapes if "/" in place):
        root.create_group(name, attributes={"encoding-type": "dict", "encoding-version": "0.1.0"})
    arrays = [_create_array(obs, "_index", (n_obs,), VariableLengthUTF8(), chunk)]
    arrays.append(_create_array(sample, "codes", (n_obs,), np.dtype("int32"), chunk))
    values = ((place, (n_obs, *shape)) for place, shape in shapes.items())
    return [*arrays, *(_create_array(root, place, shape, np.dtype("float32"), chunk) for place, shape in values)]


def _create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype | VariableLengthUTF8, most: int
) -> zarr.Array:
    is_text = isinstance(dtype, VariableLengthUTF8)
    chunk = min(max(shape[0], 1), most)
    whole = min(-(-max(shape[0], 1) // chunk) * chunk, SHARD_CHUNKS * most)
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(whole, *shape[1:]),
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle" if is_text else "shuffle")],
        attributes={"encoding-type": "string-array" if is_text else "array", "encoding-version": "0.2.0"},
    )


def _write(arrays: list[zarr.Array], blocks: Iterator[Block], shard: int) -> str:
    """Write cells in order and return their digest; whole shards, for a part of one would be read and written again."""
    names, codes, *values = arrays
    shas, start = [hashlib.sha256() for _ in (names, *values)], 0
    for part in _in_shards(blocks, shard):
        stop = start + len(part.names)
        names[start:stop], codes[start:stop] = part.names, part.codes
        shas[0].update("\0".join([*part.names, ""]).encode())
        for array, sha, found in zip(values, shas[1:], part.values, strict=True):
            array[start:stop] = found
            sha.update(np.ascontiguousarray(found, dtype="<f4"))
        start = stop
    return digest([sha.hexdigest() for sha in shas])


def _in_shards(blocks: Iterator[Block], shard: int) -> Iterator[Block]:
    """Yield the same cells, as many as a shard at a time; the last are those that are left."""
    waiting: list[Block] = []
    for block in blocks:
        waiting.append(block)
        while sum(len(part.names) for part in waiting) >= shard:
            joined = _join(waiting)
            yield _part(joined, slice(shard))
            waiting = [_part(joined, slice(shard, None))]
    if sum(len(part.names) for part in waiting):
        yield _join(waiting)


def _part(block: Block, rows: slice) -> Block:
    return Block(block.names[rows], block.codes[rows], tuple(values[rows] for values in block.values))


def _join(parts: list[Block]) -> Block:
    values = zip(*(part.values for part in parts), strict=True)
    names, codes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("names", "codes"))
    return Block(names, codes, tuple(np.concatenate(found) for found in values))
