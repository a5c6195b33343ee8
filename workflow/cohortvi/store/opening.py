"""Stores of counts, opened: those of this program by their manifests, and those of others as they lie.

A path, or a URL of any file system that fsspec knows, names either a manifest, the JSON file beside a store; or a store
of AnnData in zarr whose X is CSR; or a collection of such, as annbatch writes them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import zarr

from cohortvi.files import digest
from cohortvi.store.counts import CountsReader
from cohortvi.store.layout import quiet, repair

FACTS = ("n_obs", "n_vars", "nnz", "dtype", "genes", "var", "obs", "columns", "content", "zarr.json", "samples")
COLLECTION = "annbatch-preshuffled"


def open_counts(path: str | Path, genes: Sequence[str] | None = None) -> CountsReader:
    """Open one store, to be read over its own genes or over `genes`.

    Errors: ValueError if the store is not there, not the one that its manifest describes, or no counts in CSR.
    """
    (reader,) = open_all(path, genes)
    return reader


def open_all(path: str | Path, genes: Sequence[str] | None = None) -> Iterator[CountsReader]:
    """Yield the stores of a collection, or the one store that a path names, as `open_counts` does."""
    place, manifest = str(path), None
    if place.endswith(".json"):
        manifest, place = read_manifest(path), place.removesuffix(".json") + ".zarr"
        check_metadata(place, manifest)
    with quiet():
        root = _open_group(place)
        groups = {place: root}
        if root.attrs.get("encoding-type") == COLLECTION:
            groups = {f"{place}/{name}": root[name] for name in sorted(root.group_keys(), key=_number)}
        for name, group in groups.items():
            shown = name if "://" in name else Path(name)
            yield CountsReader(shown, group, manifest or group.attrs.get("manifest") or describe(shown, group), genes)


def _number(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name if letter.isdigit())
    return (int(digits or 0), name)


def check_metadata(place: str, manifest: dict[str, Any]) -> None:
    """Raise ValueError if a store's zarr.json is not the one of its manifest: zarr believes whatever stands there."""
    try:
        with fsspec.open(f"{place}/zarr.json", "rb") as file:
            raw = file.read()
        written = {**json.loads(raw)["attributes"]["manifest"], "zarr.json": digest(raw)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        found = f"no store that can be opened (zarr.json: {error!r})"
        raise ValueError(f"{place}: {found}; {repair(place)}") from error
    names = sorted(written.keys() | manifest.keys())
    differing = ", ".join(name for name in names if written.get(name) != manifest.get(name))
    if differing:
        raise ValueError(f"{place}: {differing} differ from the manifest beside it; {repair(place)}")


def _open_group(place: str) -> zarr.Group:
    try:
        return zarr.open_group(place, mode="r")
    except (FileNotFoundError, ValueError) as error:
        expected = "a manifest, AnnData in zarr, or a collection of annbatch"
        raise ValueError(f"{place}: no store that can be opened ({error}); expected {expected}") from error


def describe(path: str | Path, root: zarr.Group) -> dict[str, Any]:
    """Return a manifest of a store that another program wrote; ValueError if it is no AnnData with X in CSR."""
    x = root.get("X")
    if not isinstance(x, zarr.Group) or x.attrs.get("encoding-type") != "csr_matrix":
        found = "no X" if x is None else f"X as {x.attrs.get('encoding-type', 'an array')!r}"
        raise ValueError(f"{path}: found {found}; expected AnnData in zarr whose X is a csr_matrix of counts")
    n_obs, n_vars = map(int, x.attrs["shape"])
    nnz, dtype = x["data"].shape[0], x["data"].dtype.name
    genes = digest([str(name) for name in root["var"][root["var"].attrs["_index"]][:]])
    columns = {name: kind for name, element in root["obs"].members() if (kind := _kind(element)) is not None}
    facts = {"n_obs": n_obs, "n_vars": n_vars, "nnz": nnz, "dtype": dtype, "genes": genes, "columns": columns}
    return {**facts, "obs": "", "var": "", "content": digest([n_obs, n_vars, nnz, dtype, genes]), "samples": {}}


def _kind(element: zarr.Array | zarr.Group) -> str | None:
    """Return what describes a column of obs: the digest of its categories, or its type; None for text and others."""
    if isinstance(element, zarr.Group):
        is_categorical = element.attrs.get("encoding-type") == "categorical"
        return digest([str(value) for value in element["categories"][:]]) if is_categorical else None
    return element.dtype.name if np.dtype(element.dtype).kind in "iufb" and element.ndim == 1 else None


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return a manifest; ValueError if the file is absent, no JSON, or lacks what a manifest holds."""
    try:
        with fsspec.open(str(path), "rt") as file:
            manifest = json.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such manifest; {repair(path)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); the manifest is damaged: {repair(path)}") from error
    missing = [name for name in FACTS if not isinstance(manifest, dict) or name not in manifest]
    if missing:
        raise ValueError(f"{path}: the manifest lacks {', '.join(missing)}; {repair(path)}")
    return manifest
