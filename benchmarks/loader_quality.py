"""How well our loader's minibatches are mixed, and whether they hold what the source does.

Entropy of a label in a minibatch, over that of as many cells drawn at random, falls below 1 where neighbours of the
source stay together. It does not see that the same cells meet again; `repeated_mates` does, which is 1 for a true
shuffle and rises where too few cells are mixed at a time.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import scipy.sparse as sp

COMPARED = 3  # minibatches, of each output
DRAWN = 300  # random minibatches to compare the entropy with


def entropy(labels: np.ndarray) -> float:
    """Return the entropy of labels, codes from 0 on, in bits."""
    share = np.bincount(labels) / len(labels)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def entropy_ratio(labels: np.ndarray, minibatches: list[np.ndarray], rng: np.random.Generator) -> float:
    """Return the mean entropy of the labels in minibatches of rows, all of one size, over that of random ones."""
    size = len(minibatches[0])
    drawn = [entropy(labels[rng.choice(len(labels), size, replace=False)]) for _ in range(DRAWN)]
    return float(np.mean([entropy(labels[rows]) for rows in minibatches]) / np.mean(drawn))


def repeated_mates(first: list[np.ndarray], second: list[np.ndarray], n_obs: int) -> float:
    """Return how many of its minibatch mates a cell meets again in the second epoch, over what chance would give.

    Epochs are lists of minibatches of rows that hold every cell once. Of its B - 1 mates, a cell meets each again with
    a chance of (B - 1) / (N - 1), if the second epoch does not depend on the first.
    """
    group = np.empty((2, n_obs), np.int64)
    for epoch, minibatches in enumerate((first, second)):
        for number, rows in enumerate(minibatches):
            group[epoch, rows] = number
    _, together = np.unique(group[0] * len(second) + group[1], return_counts=True)
    met = (together * (together - 1)).sum()
    sizes = [np.array([len(rows) for rows in minibatches]) for minibatches in (first, second)]
    pairs = [(size * (size - 1)).sum() for size in sizes]
    return float(met / (pairs[0] * pairs[1] / (n_obs * (n_obs - 1))))


def equals(minibatch: Any, expected: sp.csr_matrix) -> bool:
    """Say whether a minibatch of our loader, dense or as CSR arrays, holds these counts."""
    if isinstance(minibatch, tuple):
        indptr, indices, data = minibatch
        shape = expected.shape
        minibatch = sp.csr_matrix((data.astype(np.float32), indices.astype(np.int32), indptr), shape=shape).toarray()
    return bool(np.array_equal(minibatch, expected.toarray()))


def quality(job: dict[str, Any]) -> dict[str, Any]:
    """Compare the outputs with the h5ad; return entropy ratio, repeated mates and coverage of two epochs.

    Errors: ValueError if an output differs from the source or an epoch does not hold every cell once.
    """
    import anndata as ad
    from loaders import epoch

    source, size = ad.read_h5ad(job["h5ad"]), job["batch_size"]
    for output in ("dense", "counts", "csr", "csr_counts"):
        for minibatch, rows in islice(epoch(job["path"], size, output, 0), COMPARED):
            if not equals(minibatch, source.X[rows]):
                raise ValueError(f"output {output}: a minibatch differs from {job['h5ad']}")
    epochs = [list(_rows(epoch(job["path"], size, "csr_counts", number))) for number in (1, 2)]
    coverage = [len(np.unique(np.concatenate(minibatches))) / source.n_obs for minibatches in epochs]
    if coverage != [1.0, 1.0] or any(sum(map(len, minibatches)) != source.n_obs for minibatches in epochs):
        raise ValueError(f"two epochs hold shares of {coverage} of the cells; expected every cell once")
    labels = source.obs["batch"].cat.codes.to_numpy(np.int64)
    full = [rows for rows in epochs[0] if len(rows) == size]
    mixed = entropy_ratio(labels, full, np.random.default_rng(0))
    return {"entropy_ratio": mixed, "repeated_mates": repeated_mates(*epochs, source.n_obs), "coverage": min(coverage)}


def _rows(minibatches: Iterator[tuple[Any, np.ndarray]]) -> Iterator[np.ndarray]:
    return (rows.copy() for _, rows in minibatches)
