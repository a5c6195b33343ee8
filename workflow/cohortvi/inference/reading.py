"""What a trained model is told of the cells of a counts store: columns of its obs and the sheet, in its own codes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cohortvi.inference.covariates import BATCH, Columns, Sheet
from cohortvi.store.counts import CountsReader


def covariates_of(reader: CountsReader, columns: Columns, sheet: Sheet) -> dict[str, np.ndarray]:
    """Return {name: (n,)} for every covariate of the model: codes int64, or raw continuous values.

    `sheet`: as `fit` takes it. Errors: ValueError for a value that the model was not trained on.
    """
    tables = columns.sheet_tables(sheet, list(reader.manifest["samples"]))
    found = {name: np.repeat(table.numpy(), reader.n_obs) for name, table in tables.items()}
    for name, known in {BATCH: columns.batches, **columns.categories}.items():
        if name not in found:
            found[name] = _codes(reader, name, known)
    rest = [name for name in columns.continuous if name not in found]
    return found | {name: reader.column(name, 0, reader.n_obs) for name in rest}


def check_genes(reader: CountsReader, genes: list[str]) -> None:
    """Raise ValueError if a store with cells has none of the model's genes."""
    if reader.n_obs and not reader.var.index.isin(genes).any():
        raise ValueError(
            f"{reader.path}: it has none of the {len(genes)} genes of the model ({', '.join(genes[:3])} ...); expected "
            "names as the model knows them. Check cohort.gene_key, or train the model again."
        )


def _codes(reader: CountsReader, name: str, known: Sequence[str]) -> np.ndarray:
    values = pd.Index(reader.categories(name) or [])
    codes = pd.Index(known).get_indexer(values)[reader.column(name, 0, reader.n_obs)]
    if (codes < 0).any():
        new = sorted(set(values) - set(known))
        raise ValueError(
            f"{reader.path}: {name} {', '.join(map(repr, new))} is not among the model's {', '.join(known)}; expected "
            "values that it was trained on. Train the model again, or one with encode_covariates: false."
        )
    return codes.astype(np.int64)
