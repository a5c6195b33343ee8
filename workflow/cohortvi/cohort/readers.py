"""Raw counts of one sample, as row chunks, out of any format: the door through which counts come in.

What has passed here holds: cells and genes have unique names, every count that was delivered is a whole number from 0
to 2^32 - 1, and its value is that of the file. `open_raw` reads metadata only; no more than one chunk of rows is held.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cohortvi.cohort.contents import MISSING, Contents, as_text
from cohortvi.cohort.formats import describe
from cohortvi.cohort.matrices import read_rows
from cohortvi.cohort.places import InputError, fault
from cohortvi.cohort.sheet import Sample

INDEX = "var_names"
MAX_COUNT = np.iinfo(np.uint32).max
SHOWN = 10  # names listed in a message


@dataclass(frozen=True)
class Raw:
    """The cells of a sample that `select` picks, and their counts.

    obs: index = barcode, columns = keep_obs as text. var: index = gene, column `symbol`. row: the row of each cell in
    the file (n,), int64, ascending. counts: (n, g) in row chunks, each block a scipy.sparse.csr_matrix with sorted
    indices and the file's own values, unchecked. layers: those that the file has. lacking: columns of obs that the file
    has not, all of whose values are missing ones.
    """

    sample: Sample
    obs: pd.DataFrame
    var: pd.DataFrame
    row: np.ndarray
    counts: da.Array
    layers: tuple[str, ...]
    lacking: tuple[str, ...]


def open_raw(
    sample: Sample,
    *,
    gene_key: str,
    symbols: str | None,
    keep_obs: Sequence[str],
    chunk_cells: int,
    may_lack: Collection[str] = (),
) -> Raw:
    """Open the raw counts of a sample, reading no count.

    gene_key: `var_names`, or the column of var that names the genes. symbols: the column that `symbol` is filled from;
    None: the file's own gene names. keep_obs: columns of the file's obs to keep; may_lack: those it may be without.
    chunk_cells: cells held at a time.
    Errors: ValueError for every fault that the file's metadata can tell.
    """
    wanted = dict.fromkeys([name for name, _ in sample.select] + list(keep_obs))
    contents = describe(sample, list(wanted), chunk_cells)
    _check_obs_columns(sample, contents, [name for name, _ in sample.select], "select")
    _check_obs_columns(sample, contents, [name for name in keep_obs if name not in may_lack], "cohort.keep_obs")
    if not len(contents.obs_names) or not len(contents.var):
        raise _empty(sample, contents)
    row = _selected(sample, contents)
    names = pd.Index(contents.obs_names[row], dtype=object)
    _check_barcodes(sample, contents, names)
    genes = pd.Index(_gene_names(sample, contents, gene_key, "cohort.gene_key"), dtype=object)
    _check_genes(sample, contents, genes)
    symbol = _gene_names(sample, contents, symbols or INDEX, "qc.symbols")
    return Raw(
        sample=sample,
        obs=pd.DataFrame(
            {name: contents.obs[name][row] if name in contents.obs else MISSING for name in keep_obs}, names
        ),
        var=pd.DataFrame({"symbol": symbol}, index=genes),
        row=row,
        counts=_row_chunks(contents, row, chunk_cells),
        layers=contents.layers,
        lacking=tuple(name for name in keep_obs if name not in contents.obs),
    )


def _empty(sample: Sample, contents: Contents) -> ValueError:
    found = f"is empty: it holds {len(contents.obs_names)} cells and {len(contents.var)} genes"
    return fault(sample, found, "expected at least one of each: correct `path`, or leave the sample out of the sheet")


def _check_obs_columns(sample: Sample, contents: Contents, names: Sequence[str], setting: str) -> None:
    for name in names:
        if name not in contents.obs:
            raise fault(
                sample,
                f"has no obs column {name!r}, which {setting} names",
                f"expected one of {', '.join(contents.obs_columns) or 'none: the file has no obs columns'}: "
                f"correct {setting}",
            )


def _selected(sample: Sample, contents: Contents) -> np.ndarray:
    mask = np.ones(len(contents.obs_names), bool)
    for name, value in sample.select:
        mask &= contents.obs[name] == value
    if not mask.any():
        asked = ", ".join(f"{name}={value}" for name, value in sample.select)
        seen = "; ".join(f"{name}: {_some(sorted(set(contents.obs[name])))}" for name, _ in sample.select)
        raise fault(sample, f"has no cell with {asked}", f"expected values as in the file ({seen}): correct `select`")
    return np.flatnonzero(mask).astype(np.int64)


def _check_barcodes(sample: Sample, contents: Contents, names: pd.Index) -> None:
    twice = names[names.duplicated()].unique()
    if len(twice):
        raise fault(
            sample,
            f"has {len(twice)} barcodes that stand more than once: {_some(twice)}",
            "expected every barcode once: if the file holds several samples, give each its row of the sheet, with "
            f"`select` (obs columns: {', '.join(contents.obs_columns) or 'none'}), else rename the cells",
        )


def _gene_names(sample: Sample, contents: Contents, key: str, setting: str) -> np.ndarray:
    if key == INDEX:
        return contents.var.index.to_numpy(object)
    if key not in contents.var:
        raise fault(
            sample,
            f"has no var column {key!r}, which {setting} names",
            f"expected one of {', '.join([INDEX, *contents.var.columns])}: correct {setting}",
        )
    return as_text(contents.var[key].array)


def _check_genes(sample: Sample, contents: Contents, genes: pd.Index) -> None:
    twice = genes[genes.duplicated()].unique()
    if len(twice):
        unique = _unique_keys(contents)
        advice = f"set cohort.gene_key to {' or '.join(unique)}" if unique else "no column of var is: rename the genes"
        raise fault(
            sample,
            f"has {len(twice)} gene names that stand more than once: {_some(twice)}",
            f"expected names that are unique; {advice}",
        )


def _unique_keys(contents: Contents) -> list[str]:
    table = contents.var.select_dtypes(exclude=["number", "bool"])
    names = {INDEX: contents.var.index} | {name: pd.Index(as_text(table[name].array)) for name in table}
    return [key for key, values in names.items() if values.is_unique and MISSING not in values]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _row_chunks(contents: Contents, row: np.ndarray, chunk_cells: int) -> da.Array:
    starts = range(0, len(row), chunk_cells)
    read = partial(read_rows, contents.matrix, features=contents.features, most=chunk_cells)
    name = f"counts-{uuid4().hex}"
    tasks = {(name, n, 0): (partial(read, rows=row[a : a + chunk_cells]),) for n, a in enumerate(starts)}
    sizes = tuple(min(chunk_cells, len(row) - a) for a in starts)
    meta = sp.csr_matrix((0, 0), dtype=contents.matrix.dtype)
    return da.Array(tasks, name, chunks=(sizes, (len(contents.var),)), meta=meta)


def iter_counts(raw: Raw, keep: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """Yield positions into raw.obs (n,) and the counts of these cells (n, g), chunk by chunk, in order.

    Counts: data uint32, indices int32, sorted, no zeros stored. keep: the positions to deliver, ascending; None: all.
    Errors: ValueError for values that are no counts.
    """
    start = 0
    for n, size in enumerate(raw.counts.chunks[0]):
        stop = start + size
        wanted = np.arange(start, stop) if keep is None else keep[slice(*np.searchsorted(keep, [start, stop]))]
        if len(wanted):
            block = raw.counts.blocks[n].compute(scheduler="synchronous")
            block = block if len(wanted) == size else block[wanted - start]
            yield wanted, _as_counts(raw, wanted, block)
        start = stop


def _as_counts(raw: Raw, positions: np.ndarray, block: sp.csr_matrix) -> sp.csr_matrix:
    # NaN, infinities, fractions, negative and too large numbers all differ from what uint32 makes of them.
    with np.errstate(invalid="ignore"):
        data = block.data.astype(np.uint32)
    if (data != block.data).any():
        raise _no_counts(raw, positions, block)
    counts = sp.csr_matrix((data, block.indices, block.indptr), block.shape)
    if not data.all():
        counts = counts.copy()  # the block's indices may be held by others
        counts.eliminate_zeros()
    return counts


def _no_counts(raw: Raw, positions: np.ndarray, block: sp.csr_matrix) -> ValueError:
    values = block.data
    kinds = {
        "non-finite": ~np.isfinite(values),
        "negative": values < 0,
        "non-integer": values != np.rint(values),
        "too large": values > MAX_COUNT,
    }
    kind, at = next((kind, int(mask.argmax())) for kind, mask in kinds.items() if mask.any())
    cell = raw.obs.index[positions[np.searchsorted(block.indptr, at, side="right") - 1]]
    gene = raw.var.index[block.indices[at]]
    hints = {
        "negative": ". Scaled and log-normalised matrices are the commonest mistake",
        "non-integer": ". Log-normalised matrices are the commonest mistake",
        "too large": f" of at most {MAX_COUNT}",
    }
    return fault(
        raw.sample,
        f"has the {kind} value {values[at]} at cell {cell!r}, gene {gene!r} of {raw.sample.layer or 'X'}",
        f"expected raw counts{hints.get(kind, '')}. {_layer_advice(raw)}",
    )


def _layer_advice(raw: Raw) -> str:
    others = [name for name in raw.layers if name != (raw.sample.layer or "X")]
    if not others:
        return "The file has no other layer: take a file with raw counts."
    whole = [name for name in others if _looks_raw(replace(raw.sample, layer=name))]
    if whole:
        return f"Set `layer` in the sheet to the one that holds them: whole numbers are in {', '.join(whole)}."
    return f"No other layer holds whole numbers ({', '.join(others)}): take a file with raw counts."


def _looks_raw(sample: Sample) -> bool:
    try:
        values = describe(sample, [], 1).matrix.peek()
    except InputError:
        return False
    return bool(len(values)) and bool((np.isfinite(values) & (values >= 0) & (values == np.rint(values))).all())
