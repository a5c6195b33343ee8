"""Two dimensions to look at: UMAP of the neighbour graph."""

import anndata as ad
import numpy as np
import pandas as pd


def umap_layout(graph: ad.AnnData, latent_nk: np.ndarray, min_dist: float, spread: float, seed: int) -> pd.DataFrame:
    """Return umap_1 and umap_2 of each cell. McInnes et al. 2018, by scanpy; `latent_nk` (n, k) starts the layout."""
    import scanpy as sc

    # The first two principal axes start it: the spectral start is slow and differs between LAPACK builds.
    centred = latent_nk - latent_nk.mean(0)
    _, _, axes = np.linalg.svd(np.cov(centred, rowvar=False).astype(np.float64))
    axes = axes[:2] * np.sign(axes[:2].sum(1, keepdims=True))
    start = centred @ axes.T
    graph.obsm["start"] = (10 * start / np.abs(start).max()).astype(np.float32)
    graph.obsm["X_latent"] = latent_nk
    sc.tl.umap(graph, min_dist=min_dist, spread=spread, init_pos="start", random_state=seed)
    return pd.DataFrame(graph.obsm["X_umap"], index=graph.obs_names, columns=["umap_1", "umap_2"])
