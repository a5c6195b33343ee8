"""Marker genes of each cluster: Welch's t-test of log-normalized counts, one cluster against the rest, streamed.

Equals scanpy.tl.rank_genes_groups(method="t-test") on log1p of counts per 10,000, from moments that merge, so that no
more than one chunk of cells is in memory.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, ttest_ind_from_stats

TARGET = 1e4


class Moments:
    """Number of cells (c,), mean, sum of squared deviations and number of expressing cells (c, g) of c clusters."""

    def __init__(self, n_clusters: int, n_genes: int):
        self.n = np.zeros(n_clusters)
        self.mean, self.m2, self.expressing = (np.zeros((n_clusters, n_genes)) for _ in range(3))

    def add(self, x_ng: sp.csr_matrix, codes: np.ndarray) -> None:
        """Take in log-normalized rows with their cluster codes; Chan, Golub, LeVeque 1983."""
        for code in np.unique(codes):
            rows = x_ng[codes == code].tocsc()
            n, nonzero = rows.shape[0], np.diff(rows.indptr)
            mean = np.asarray(rows.sum(0)).ravel() / n
            rows.data = (rows.data - np.repeat(mean, nonzero)) ** 2
            m2 = np.asarray(rows.sum(0)).ravel() + (n - nonzero) * mean**2
            self._merge(code, n, mean, m2)
            self.expressing[code] += nonzero

    def _merge(self, code: int, n: float, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.n[code] + n
        delta = mean - self.mean[code]
        self.m2[code] += m2 + delta**2 * self.n[code] * n / total
        self.mean[code] += delta * n / total
        self.n[code] = total

    def rest_of(self, code: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """Return n, mean, sum of squared deviations and expressing cells of all clusters but one, merged."""
        others = [c for c in range(len(self.n)) if c != code and self.n[c]]
        rest = Moments(1, self.mean.shape[1])
        for c in others:
            rest._merge(0, self.n[c], self.mean[c], self.m2[c])
        return rest.n[0], rest.mean[0], rest.m2[0], self.expressing[others].sum(0)


def log_normalize(counts: sp.csr_matrix, total_counts: np.ndarray) -> sp.csr_matrix:
    """Return log1p of counts per 10,000 of each cell's total over all its genes, float64."""
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    data = np.log1p(counts.data * (TARGET / np.maximum(total_counts, 1))[rows])
    return sp.csr_matrix((data, counts.indices.astype(np.int32), counts.indptr), shape=counts.shape)


def markers(blocks: Iterator[tuple[sp.csr_matrix, np.ndarray]], clusters: pd.Series, var: pd.DataFrame) -> pd.DataFrame:
    """Return a row per cluster and gene, best score first within a cluster.

    `blocks`: counts (n, g) with the cells' total counts, in the order of `clusters` (categorical). Columns: cluster,
    gene, symbol, rank, score (Welch's t), logfoldchange (log2 of mean counts per 10,000), mean (log1p scale), pct_in,
    pct_out (share of expressing cells), pval, pval_adj (Benjamini-Hochberg within the cluster).
    """
    codes, names = clusters.cat.codes.to_numpy(), clusters.cat.categories
    moments, done = Moments(len(names), len(var)), 0
    for counts, total_counts in blocks:
        moments.add(log_normalize(counts, total_counts), codes[done : done + counts.shape[0]])
        done += counts.shape[0]
    return pd.concat([_one_cluster(moments, code, name, var) for code, name in enumerate(names)], ignore_index=True)


def _one_cluster(moments: Moments, code: int, name: str, var: pd.DataFrame) -> pd.DataFrame:
    n, mean, m2, expressing = moments.n[code], moments.mean[code], moments.m2[code], moments.expressing[code]
    n_rest, mean_rest, m2_rest, expressing_rest = moments.rest_of(code)
    score, pval = np.zeros(len(var)), np.ones(len(var))
    if n > 1 and n_rest > 1:
        std, std_rest = np.sqrt(m2 / (n - 1)), np.sqrt(m2_rest / (n_rest - 1))
        varies = (std > 0) | (std_rest > 0)
        score[varies], pval[varies] = ttest_ind_from_stats(
            mean[varies], std[varies], n, mean_rest[varies], std_rest[varies], n_rest, equal_var=False
        )
    table = pd.DataFrame(
        {
            "cluster": name,
            "gene": var.index,
            "symbol": var["symbol"].to_numpy(),
            "score": score,
            "logfoldchange": np.log2((np.expm1(mean) + 1e-9) / (np.expm1(mean_rest) + 1e-9)),
            "mean": mean,
            "pct_in": expressing / max(n, 1),
            "pct_out": expressing_rest / max(n_rest, 1),
            "pval": pval,
            "pval_adj": false_discovery_control(pval),
        }
    ).sort_values("score", ascending=False, kind="stable")
    table.insert(3, "rank", np.arange(len(table)))
    return table
