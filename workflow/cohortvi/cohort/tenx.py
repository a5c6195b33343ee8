"""10x Genomics' own files: .h5 of Cell Ranger 2 and of 3 and later, and mtx folders, plain or gzipped.

Genes have the columns that scanpy.read_10x_h5 and read_10x_mtx give them: the index is the symbol, `gene_ids` the
Ensembl id. Features of other types than gene expression are left out, as scanpy does.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import IO

import h5py
import numpy as np
import pandas as pd

from cohortvi.cohort.bands import PIECE, Banded, Entries
from cohortvi.cohort.contents import Contents, as_text, check_shape, pick_layer
from cohortvi.cohort.matrices import Compressed, check_compressed, value_type
from cohortvi.cohort.places import Place

GENE_EXPRESSION = "Gene Expression"
VALUE_TYPES = {"integer": np.dtype(np.int64), "real": np.dtype(np.float64), "double": np.dtype(np.float64)}


def describe_h5(place: Place, obs_columns: Sequence[str], chunk_cells: int) -> Contents:
    """Return what a 10x .h5 file holds; it has no obs columns.

    Cell Ranger 2 wrote a group for each genome: they are the layers if there are several.
    """
    with place.hdf5() as file:
        groups = _groups(place, file)
        layers = ("X",) if len(groups) == 1 else tuple(groups)
        name = groups[0] if len(groups) == 1 else pick_layer(place, layers)
        pick_layer(place, layers)
        group = file[name]
        n_vars, n_obs = (int(n) for n in group["shape"][:])
        check_compressed(place, group, n_obs)
        matrix = Compressed(place, place.hdf5, name, (n_obs, n_vars), value_type(place, group["data"].dtype))
        var = _features(group["features"], n_vars) if "features" in group else _genes(group)
        contents = Contents(as_text(group["barcodes"][:]), {}, (), var, layers, matrix)
    check_shape(place, matrix, len(contents.obs_names), len(var))
    return _gene_expression(contents)


def _groups(place: Place, file: h5py.File) -> list[str]:
    if "matrix" in file and "features" in file["matrix"]:
        return ["matrix"]
    groups = [name for name in file if isinstance(file[name], h5py.Group) and "genes" in file[name]]
    if not groups:
        raise place.fault(
            f"is no 10x matrix: it holds {', '.join(file) or 'nothing'}",
            "expected /matrix/features (Cell Ranger 3) or /GENOME/genes (2): correct `path` or `format` in the sheet",
        )
    return groups


def _features(features: h5py.Group, n_vars: int) -> pd.DataFrame:
    renamed = {"id": "gene_ids", "feature_type": "feature_types"}
    wanted = [
        name
        for name, node in features.items()
        if name not in ("name", "_all_tag_keys") and getattr(node, "shape", None) == (n_vars,)
    ]
    columns = {renamed.get(name, name): as_text(features[name][:]) for name in wanted}
    return pd.DataFrame(columns, index=as_text(features["name"][:]))


def _genes(group: h5py.Group) -> pd.DataFrame:
    return pd.DataFrame({"gene_ids": as_text(group["genes"][:])}, index=as_text(group["gene_names"][:]))


def _gene_expression(contents: Contents) -> Contents:
    if "feature_types" not in contents.var:
        return contents
    genes = np.flatnonzero(contents.var["feature_types"] == GENE_EXPRESSION)
    if len(genes) == len(contents.var):
        return contents
    return replace(contents, var=contents.var.iloc[genes], features=genes)


def describe_mtx(place: Place, obs_columns: Sequence[str], chunk_cells: int) -> Contents:
    """Return what a 10x mtx folder holds; it has no obs columns."""
    layers = ("X",)
    pick_layer(place, layers)
    barcodes = [line[0] for line in _lines(place, _member(place, "barcodes.tsv"))]
    var = _feature_table(place)
    with _entries_file(place) as (_, shape, _, dtype):
        matrix = Banded(place, shape, dtype, chunk_cells, partial(_entries, place))
    check_shape(place, matrix, len(barcodes), len(var))
    return _gene_expression(Contents(np.array(barcodes, dtype=object), {}, (), var, layers, matrix))


def _member(place: Place, *names: str) -> str:
    candidates = [name + suffix for name in names for suffix in ("", ".gz")]
    for name in candidates:
        if place.fs.exists(f"{place.path}/{name}"):
            return name
    advice = f"expected one of {', '.join(candidates)} in the folder: put it there"
    raise place.fault(f"has no {' or '.join(names)}", advice)


def _open(place: Place, name: str) -> IO[bytes]:
    return place.fs.open(f"{place.path}/{name}", "rb", compression="infer")


def _lines(place: Place, name: str) -> list[list[str]]:
    with _open(place, name) as file, io.TextIOWrapper(file, "utf-8") as text:
        return [line.rstrip("\n").split("\t") for line in text if line.strip()]


def _feature_table(place: Place) -> pd.DataFrame:
    name = _member(place, "features.tsv", "genes.tsv")
    lines = _lines(place, name)
    if min((len(line) for line in lines), default=2) < 2:
        raise place.fault(f"has a line in {name} with one column", "expected gene id and symbol, separated by a tab")
    columns = {"gene_ids": [line[0] for line in lines]}
    if name.startswith("features") and all(len(line) > 2 for line in lines):
        columns["feature_types"] = [line[2] for line in lines]
    return pd.DataFrame(columns, index=pd.Index([line[1] for line in lines], dtype=object))


@contextmanager
def _entries_file(place: Place) -> Iterator[tuple[IO[bytes], tuple[int, int], int, np.dtype]]:
    """Open matrix.mtx behind its header; yield the file, (cells, genes), the number of entries, the type of values."""
    name = _member(place, "matrix.mtx")
    with place.reading(), _open(place, name) as file:
        header = file.readline().decode("ascii", "replace").lower().split()
        if header[:3] != ["%%matrixmarket", "matrix", "coordinate"] or header[3:] not in (
            [field, "general"] for field in VALUE_TYPES
        ):
            raise place.fault(
                f"has a {name} that begins with {' '.join(header)[:80]!r}",
                "expected '%%MatrixMarket matrix coordinate integer general' (or real): write the file anew",
            )
        line = file.readline()
        while line.startswith(b"%"):
            line = file.readline()
        n_vars, n_obs, n_entries = (int(n) for n in line.split())
        yield file, (n_obs, n_vars), n_entries, VALUE_TYPES[header[3]]


def _entries(place: Place) -> Entries:
    with _entries_file(place) as (file, _, n_entries, dtype):
        seen = 0
        if n_entries:
            types = {"gene": np.int64, "cell": np.int64, "value": dtype}
            with pd.read_csv(file, sep=r"\s+", names=list(types), dtype=types, chunksize=PIECE) as parts:
                for part in parts:
                    seen += len(part)
                    yield part["cell"].to_numpy() - 1, part["gene"].to_numpy() - 1, part["value"].to_numpy()
        if seen != n_entries:
            raise place.fault(
                f"has {seen:,} entries in its matrix.mtx where the header says {n_entries:,}",
                "expected all of them: the file is truncated, copy or write it anew",
            )
