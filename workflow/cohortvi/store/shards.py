"""shards/{split}-{shard}.zarr: every kept cell of the cohort once, shuffled for training.

A cell's draw, 64 random bits, is a function of (seed, sample, row in the raw store): neither QC nor other samples
change it. Its low half chooses the shard, its high half decides validation by cell, and the cells of a shard lie in the
order of their draws. So a shard is a random sample of the cohort and may be read from front to back; it may be empty.
All shards of a cohort have the same genes, columns and categories.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cohortvi.config import Store, Validation
from cohortvi.store.counts import CountsReader
from cohortvi.store.kernels import take_rows
from cohortvi.store.layout import Rows, id_type, write_store
from cohortvi.store.names import n_shards
from cohortvi.store.opening import open_counts, read_manifest

DRAWS = 65_536  # draws made together
READ_CELLS = 2_048  # rows of a counts store in memory at a time
WRITE_CELLS = 8_192


def draw(seed: int, sample: str, row: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each row of a sample's raw store: row r has the r-th draw of the sample's stream.

    Streams are Philox4x64 (Salmon et al. 2011) keyed by the seed and a hash of the sample's name.
    """
    key = np.array([seed, _hash(sample)], np.uint64)
    draws = np.empty(len(row), np.uint64)
    part = row // DRAWS
    for index in np.unique(part):
        stream = np.random.Philox(key=key).advance(int(index) * DRAWS // 4)  # four draws a count
        here = part == index
        draws[here] = stream.random_raw(DRAWS)[row[here] % DRAWS]
    return draws


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def held_out_values(values: Iterable[str], seed: int, fraction: float) -> set[str]:
    """Return the values that are held out: their share of all, at least one, those of smallest hash of (seed, value).

    Errors: ValueError if there are not two values, so that none could be left for training.
    """
    ranked = sorted(set(values), key=lambda value: _hash(f"{seed}:{value}"))
    if len(ranked) < 2:
        raise ValueError(
            f"store.validation.by: its column has {len(ranked)} value(s) over the cells; expected at least two, one to "
            "train on and one to hold out. Hold out by another column, or by: cell."
        )
    return set(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])


def assign_split(draws: np.ndarray, obs: pd.DataFrame, validation: Validation, held_out: Collection[str]) -> np.ndarray:
    """Return which cells are held out, bool: by their draws, or those whose value of a column of obs is `held_out`.

    Errors: ValueError if there is no such column or a cell has no value in it.
    """
    if validation.by == "cell":
        return draws >> np.uint64(32) < int(validation.fraction * 2**32)
    if validation.by not in obs or obs[validation.by].isna().any():
        found = f"has no value for some cells; the columns are {', '.join(obs)}"
        raise ValueError(f"store.validation.by: {validation.by!r} {found}; expected cell, sample or a full column")
    return obs[validation.by].astype(str).isin(held_out).to_numpy()


class _Held(NamedTuple):
    """The values of a column by which cells are held out, and those of them that are."""

    values: set[str]
    held_out: set[str]


def _held_out(readers: Sequence[CountsReader], seed: int, validation: Validation, earlier: Sequence[Path]) -> _Held:
    """Decide on the values over the cells; those that an earlier generation has stay as they were decided there."""
    if validation.by == "cell" or any(validation.by not in reader.manifest["columns"] for reader in readers):
        return _Held(set(), set())  # by cell, or a fault that assign_split words
    facts = [read_manifest(path)["held_out"] for path in earlier]
    known = {value for fact in facts for value in fact["values"]}
    values = {value for reader in readers for value in reader.obs[validation.by].dropna().astype(str).unique()}
    decided = {value for fact in facts for value in fact["held_out"]}
    new = values - known
    # One new value alone is trained on: the earlier ones have some that are held out.
    chosen = held_out_values(new, seed, validation.fraction) if len(new) > 1 or not known else set()
    return _Held(values | known, decided | chosen)


def assign_shard(draws: np.ndarray, n_shards: int) -> np.ndarray:
    """Return the shard of each cell, 0 to n_shards - 1, all equally likely."""
    return (draws & np.uint64(2**32 - 1)) * np.uint64(n_shards) >> np.uint64(32)


class _Share(NamedTuple):
    """What a shard takes from one sample: positions in its counts store, ascending, with their obs and draws."""

    manifest: Path
    sample: str
    positions: np.ndarray
    obs: pd.DataFrame
    draws: np.ndarray


def write_shard(
    counts: Sequence[str | Path],
    split: str,
    shard: int,
    path: str | Path,
    *,
    seed: int,
    store: Store,
    genes: pd.DataFrame | None = None,
    earlier: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Gather a shard's cells out of all counts stores, write them in the order of their draws, return the manifest.

    `counts`: the manifests of a generation's samples, in the same order for each of its shards, of which this is number
    `shard`; `store.shards`: how many the generation has; `earlier`: a validation shard's manifest of each one before
    it. `genes`: the var of the shard, by whose index genes are taken, absent ones counting 0; None: the stores'
    own, all the same. Memory: the shard's rows as compact CSR, their obs, and READ_CELLS rows of one counts store.
    Errors: ValueError if genes or columns differ.
    """
    manifests = {Path(name): read_manifest(name) for name in counts}
    if genes is None:
        check_genes(manifests)
    first = open_counts(next(iter(manifests)))
    var = first.var if genes is None else genes
    filled = [name for name, manifest in manifests.items() if manifest["n_obs"]]
    held = _held_out([open_counts(name) for name in filled], seed, store.validation, [Path(path) for path in earlier])
    choose = partial(_chosen, split=split, shard=shard, store=store, held_out=held.held_out)
    shares = [_share(open_counts(name), seed, choose) for name in filled]
    obs = _join_obs(shares) if shares else first.obs
    draws = np.concatenate([np.empty(0, np.uint64), *(share.draws for share in shares)])
    order = np.argsort(draws, kind="stable")
    dtype = np.result_type(np.uint8, *(manifest["dtype"] for manifest in manifests.values()))
    rows = _gather(shares, var.index, dtype)
    blocks = (Rows(*take_rows(*rows, order[i : i + WRITE_CELLS])) for i in range(0, len(order), WRITE_CELLS))
    samples = {share.sample: len(share.positions) for share in shares if len(share.positions)}
    facts = {"samples": samples, "split": split, "shard": shard, "generation": len(earlier)}
    held_out = {name: sorted(values) for name, values in held._asdict().items()}
    return write_store(blocks, obs.iloc[order], var, path, {**facts, "held_out": held_out})


def check_genes(manifests: dict[Path, dict[str, Any]]) -> None:
    """Raise ValueError if the stores do not all hold the same genes in the same order."""
    genes = {manifest["genes"]: path for path, manifest in manifests.items()}
    if len(genes) != 1:
        names = ", ".join(str(path) for path in genes.values()) or "none"
        raise ValueError(f"stores of different genes: {names}; expected one gene selection. Run the workflow again")


def _chosen(
    draws: np.ndarray, obs: pd.DataFrame, *, split: str, shard: int, store: Store, held_out: Collection[str]
) -> np.ndarray:
    """Return which cells of a sample, bool, belong to the shard."""
    chosen = assign_split(draws, obs, store.validation, held_out) == (split == "validation")
    return chosen & (assign_shard(draws, n_shards(split, store)) == shard)


def _share(reader: CountsReader, seed: int, choose: Callable[[np.ndarray, pd.DataFrame], np.ndarray]) -> _Share:
    (sample,) = reader.manifest["samples"]
    draws = draw(seed, sample, reader.obs["row"].to_numpy())
    positions = np.flatnonzero(choose(draws, reader.obs))
    manifest = Path(reader.path).with_suffix(".json")
    return _Share(manifest, sample, positions, reader.obs.iloc[positions], draws[positions])


def _join_obs(shares: Sequence[_Share]) -> pd.DataFrame:
    """Stack the shares' obs; categories are the union of what the samples declare, in the shard or not."""
    kinds = shares[0].obs.dtypes.map(str)
    for share in shares:
        found = share.obs.dtypes.map(str)
        if not found.equals(kinds):
            both = f"sample {share.sample!r} has {found.to_dict()}, {shares[0].sample!r} has {kinds.to_dict()}"
            raise ValueError(f"obs of the counts stores: {both}; expected the same columns and types in every sample")
    unions = {
        name: pd.CategoricalDtype(sorted(set().union(*(share.obs[name].cat.categories for share in shares))))
        for name in kinds.index[kinds == "category"]
    }
    return pd.concat([share.obs.astype(unions) for share in shares])


class _Gathered:
    """Rows in the order of their arrival, in arrays that grow in place: at most a ninth of them is unused."""

    def __init__(self, ids: str, counts: np.dtype):
        self.indices, self.data, self.filled = np.empty(0, ids), np.empty(0, counts), 0
        self.lengths = [np.zeros(1, np.int64)]

    def append(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        begin, self.filled = self.filled, self.filled + len(indices)
        if self.filled > len(self.indices):
            for array in (self.indices, self.data):
                array.resize(self.filled + self.filled // 8, refcheck=False)
        self.indices[begin : self.filled], self.data[begin : self.filled] = indices, data
        self.lengths.append(np.diff(indptr))

    def rows(self) -> Rows:
        indptr = np.cumsum(np.concatenate(self.lengths))
        return Rows(indptr, self.indices[: self.filled], self.data[: self.filled])


def _gather(shares: Sequence[_Share], genes: pd.Index, dtype: np.dtype) -> Rows:
    """Return the shares' rows over `genes`, share by share."""
    gathered = _Gathered(id_type(len(genes)), dtype)
    for share in shares:
        reader, positions = open_counts(share.manifest, genes), share.positions
        for chunk in range(0, reader.n_obs, READ_CELLS):
            low, high = np.searchsorted(positions, [chunk, chunk + READ_CELLS])
            if low < high:
                start, stop = positions[low], positions[high - 1] + 1
                gathered.append(*take_rows(*reader.read(start, stop), positions[low:high] - start))
    return gathered.rows()
