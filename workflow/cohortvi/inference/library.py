"""The depth of the cells of each batch, as models with a latent library take it."""

import torch
from torch import Tensor

from cohortvi.inference.covariates import BATCH
from cohortvi.inference.networks import observed_library
from cohortvi.inference.sparse import sparse_counts
from cohortvi.store.loader import Loader
from cohortvi.store.sharded import ShardedCounts

READ_CELLS = 1024  # at a time
MIN_VARIANCE = 1e-4  # of the log libraries of a batch


def library_moments(store: ShardedCounts, *, seed: int, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells (b,), mean (b,) and standard deviation (b,) of the log libraries of the store's batches.

    In one pass over the counts; in float64. A batch without cells has mean 0.
    """
    n, total, squares = (torch.zeros(len(store.categories[BATCH]), dtype=torch.float64) for _ in range(3))
    common = {"batch_size": READ_CELLS, "seed": seed, "shuffle": False, "threads": threads}
    for minibatch in Loader(store, columns=[BATCH], output="csr", **common):
        batch_n = minibatch.obs[BATCH]
        log_library_n = observed_library(sparse_counts(*minibatch.x_ng))[:, 0].log().double()
        n.index_add_(0, batch_n, torch.ones_like(log_library_n))
        total.index_add_(0, batch_n, log_library_n)
        squares.index_add_(0, batch_n, log_library_n**2)
    loc_b = total / n.clamp(min=1)
    return n, loc_b, (squares / n.clamp(min=1) - loc_b**2).clamp(min=MIN_VARIANCE).sqrt()
