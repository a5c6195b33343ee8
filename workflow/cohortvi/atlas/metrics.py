"""Figures on the quality of an atlas: clusters against known labels, mixing of batches, separation of clusters."""

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

SILHOUETTE_CELLS = 5_000


def agreement(clusters: pd.DataFrame, labels: pd.Series) -> dict[str, dict[str, float]]:
    """Return ARI and NMI of each column of clusters with the labels; cells labelled "", NA or nan do not count."""
    labels = labels.astype(str)
    known = ~labels.isin(["", "NA", "nan"]).to_numpy()
    return {
        name: {
            "ari": float(adjusted_rand_score(labels[known], clusters.loc[known, name])),
            "nmi": float(normalized_mutual_info_score(labels[known], clusters.loc[known, name])),
            "n_labelled": int(known.sum()),
        }
        for name in clusters
    }


def batch_mixing(graph: ad.AnnData, batches: pd.Series) -> float | None:
    """Return the mean entropy of the batches among a cell's neighbours over that of the batches as a whole.

    1: the neighbours of every cell mirror the cohort; 0: no cell has a neighbour of another batch; None: one batch.
    """
    codes = batches.astype("category").cat.codes.to_numpy()
    shares = np.bincount(codes) / len(codes)
    if (shares > 0).sum() < 2:
        return None
    onehot = np.eye(len(shares))[codes]
    adjacency = graph.obsp["distances"].astype(bool).astype(np.float64)
    local = adjacency @ onehot
    local /= np.maximum(local.sum(1, keepdims=True), 1)
    return float(_entropy(local).mean() / _entropy(shares[None])[0])


def _entropy(shares: np.ndarray) -> np.ndarray:
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)


def silhouette(latent_nk: np.ndarray, clusters: pd.Series, seed: int) -> float | None:
    """Return the mean silhouette width of a seeded sample of cells; None where there is one cluster."""
    chosen = np.sort(np.random.default_rng([seed, 5]).permutation(len(clusters))[:SILHOUETTE_CELLS])
    found = clusters.iloc[chosen].astype(str).to_numpy()
    if not 1 < len(np.unique(found)) < len(found):
        return None
    return float(silhouette_score(latent_nk[chosen], found))
