"""The k-nearest-neighbour graph of the latent space, in the order of its cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from cohortvi.files import replacing

EXACT_CELLS = 50_000


def neighbor_graph(latent_nk: np.ndarray, names: pd.Index, n_neighbors: int, seed: int) -> ad.AnnData:
    """Return an AnnData with obsp distances and connectivities (UMAP's fuzzy graph) over the latent means (n, k).

    Exact up to EXACT_CELLS cells, nearest-neighbour descent beyond; scanpy.pp.neighbors. Errors: ValueError if there
    are not more cells than neighbours.
    """
    import scanpy as sc

    if len(names) <= n_neighbors:
        raise ValueError(
            f"{len(names)} cells for atlas.neighbors.n_neighbors = {n_neighbors}; expected more cells than neighbours. "
            "Lower n_neighbors, or see results/cohort/ledger.tsv for where the cells went."
        )
    graph = ad.AnnData(obs=pd.DataFrame(index=names), obsm={"X_latent": latent_nk})
    exact = "sklearn" if len(names) <= EXACT_CELLS else "pynndescent"
    sc.pp.neighbors(graph, n_neighbors=n_neighbors, use_rep="X_latent", transformer=exact, random_state=seed)
    del graph.obsm["X_latent"]
    return graph


def write_graph(graph: ad.AnnData, path: Path) -> None:
    """Write the graph as an AnnData zarr store."""
    from cohortvi.store.counts import write_anndata

    with replacing(path) as partial:
        write_anndata(graph, partial)
