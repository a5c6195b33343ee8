"""One table of all cells with everything that is known of them, in the order of the latent store."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cohortvi.store.loader import Loader
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts


def cell_table(
    counts: Sequence[Path], sheet: Mapping[str, Mapping[str, str]], tables: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return a row per cell: the stores' obs, the sheet's columns (categorical), and the columns of `tables`.

    `counts`: manifests, in order; `sheet`: {sample: {column: value}}; `tables`: by their names, for errors. Errors:
    ValueError if the cells of a table are not those of the stores, in the same order.
    """
    cells = pd.concat([open_counts(path).obs for path in counts])
    for name, table in tables.items():
        if not cells.index.equals(table.index):
            raise ValueError(
                f"{name}: {len(table)} cells that are not the {len(cells)} of the counts stores in their order; "
                f"expected the same. Remove {name} of this model and run again."
            )
    columns = list(next(iter(sheet.values())))
    for column in columns:
        cells[column] = cells["sample"].astype(str).map({sample: row[column] for sample, row in sheet.items()})
    for column in cells.select_dtypes(object).columns:
        cells[column] = cells[column].astype("category")
    for column in ("sample", "batch"):
        cells[column] = cells[column].astype(str).astype("category")
    return pd.concat([cells, *tables.values()], axis=1)


def count_blocks(
    counts: Sequence[Path], genes: pd.Index, chunk_cells: int
) -> Iterator[tuple[sp.csr_matrix, np.ndarray]]:
    """Yield the counts (n, g) over `genes` of all stores, in order, with the cells' total_counts (n,)."""
    for path in counts:
        store = open_counts(path, genes)
        totals = store.obs["total_counts"].to_numpy() if store.n_obs else np.zeros(0)
        settings = {"batch_size": chunk_cells, "seed": 0, "shuffle": False, "output": "csr_counts"}
        for x_ng, _, rows in Loader(ShardedCounts([store]), **settings):
            # Copies: the next minibatch is written over this one.
            arrays = (x_ng.data.numpy().astype(np.uint32), x_ng.indices.numpy().astype(np.int32), x_ng.indptr.numpy())
            yield sp.csr_matrix(arrays, shape=(len(rows), x_ng.n_vars)), totals[rows]
