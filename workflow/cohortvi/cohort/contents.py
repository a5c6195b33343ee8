"""What a sample's file says of itself: cells, genes, layers, and how its matrix is read; no count is read for it.

Names and obs values are text, whatever type they had in the file, so that they can be compared with the sheet.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cohortvi.cohort.matrices import Matrix
from cohortvi.cohort.places import Place

MISSING = "NA"


@dataclass(frozen=True)
class Contents:
    """The description of one layer of a file.

    obs_names: the cells (n,). obs: the wanted columns that exist, as text (n,); obs_columns: all there are. var: the
    genes with their columns, indexed by the file's own names (g,). matrix: (n, features). features: which features of
    the matrix are the genes of var, ascending (g,); None: all.
    """

    obs_names: np.ndarray
    obs: dict[str, np.ndarray]
    obs_columns: tuple[str, ...]
    var: pd.DataFrame
    layers: tuple[str, ...]
    matrix: Matrix
    features: np.ndarray | None = None


def pick_layer(place: Place, layers: tuple[str, ...]) -> str:
    """Return the layer that the sheet asks for, X if it names none; InputError if the file has no such layer."""
    layer = place.sample.layer or "X"
    if layer not in layers:
        raise place.fault(
            f"has no layer {layer!r}",
            f"expected one of {', '.join(layers) or 'none: the file holds no matrix'}: set `layer` in the sheet to it",
        )
    return layer


def check_shape(place: Place, matrix: Matrix, n_obs: int, n_vars: int) -> None:
    """Raise InputError unless the matrix has a row for each of `n_obs` cells, a column for each of `n_vars` genes."""
    if matrix.shape != (n_obs, n_vars):
        raise place.fault(
            f"holds a matrix of {matrix.shape[0]} cells x {matrix.shape[1]} genes beside the names of {n_obs} cells "
            f"and {n_vars} genes",
            "expected a name for each row and column: write the file anew",
        )


def as_text(values: Iterable) -> np.ndarray:
    """Return values of any type as an object array of str: 1016.0 as '1016', a missing value as 'NA'."""
    if isinstance(values, pd.Categorical):
        return np.append(as_text(values.categories), MISSING)[values.codes]
    texts = [_text(value) for value in values]
    return np.array(texts, dtype=object) if texts else np.empty(0, dtype=object)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if value is None or value is pd.NA or value != value:
        return MISSING
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))  # whole numbers become floats as soon as one of them is missing
    return str(value)
