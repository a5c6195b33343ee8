"""Standard normal noise of single cells: a function of (seed, use, sample, row in the raw store) and nothing else.

So draws from the posterior of a cell are the same whatever is computed together with it, on any device.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

BLOCK = 64  # rows whose noise is drawn together


def noise_of(rows: np.ndarray, shape: tuple[int, ...], stream: Sequence[int], sample: str) -> np.ndarray:
    """Return the noise of the cells at these rows of a sample's raw store, (n, *shape) float32.

    `stream`: seed and use. Rows of a block come out of one generator, keyed by stream, a hash of the name, and block.
    """
    key = int.from_bytes(hashlib.sha256(sample.encode()).digest()[:8], "little")
    noise, block = np.empty((len(rows), *shape), np.float32), rows // BLOCK
    for index in np.unique(block):
        drawn = np.random.default_rng([*stream, key, int(index)]).standard_normal((BLOCK, *shape), np.float32)
        here = block == index
        noise[here] = drawn[rows[here] % BLOCK]
    return noise
