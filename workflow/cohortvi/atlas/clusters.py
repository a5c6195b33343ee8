"""Leiden clusters of the neighbour graph at several resolutions."""

from collections.abc import Sequence

import anndata as ad
import pandas as pd

from cohortvi.config import cluster_column


def leiden_clusters(graph: ad.AnnData, resolutions: Sequence[float], seed: int) -> pd.DataFrame:
    """Return a categorical column a resolution, clusters numbered from the largest. Traag et al. 2019, by igraph."""
    import scanpy as sc

    for resolution in resolutions:
        sc.tl.leiden(
            graph,
            resolution=resolution,
            key_added=cluster_column(resolution),
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
    return graph.obs[[cluster_column(resolution) for resolution in resolutions]].apply(from_largest)


def from_largest(clusters: pd.Series) -> pd.Series:
    """Return the clusters as categories "0", "1" ... from the largest to the smallest; ties keep their order."""
    names = clusters.value_counts(sort=False).sort_values(ascending=False, kind="stable").index
    renamed = clusters.astype(str).map({str(name): str(i) for i, name in enumerate(names)})
    return renamed.astype(pd.CategoricalDtype([str(i) for i in range(len(names))]))
