"""What the ids and the counts of a shard cost under several codecs, in bytes and in time: the table of docs/store.md.

Cells are drawn from a negative binomial, about 200 or 1,000 of 2,000 or 20,000 genes detected in each, or taken from an
h5ad, shuffled. Time is that of one core, the best of some runs, for chunks of as many values as the format has.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numcodecs import blosc

from cohortvi.store.codec import Codec, decode, encode

BLOSC = [
    ("zstd", 1, "shuffle"), ("zstd", 3, "shuffle"), ("zstd", 3, "bitshuffle"), ("lz4", 5, "shuffle"),
    ("lz4", 5, "bitshuffle"), ("lz4hc", 5, "shuffle"), ("lz4hc", 5, "bitshuffle"), ("lz4hc", 9, "shuffle"),
]  # fmt: skip
SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class Candidate(NamedTuple):
    """A way to write the values of a chunk, and to read what was written."""

    name: str
    write: Callable[[np.ndarray], bytes]
    read: Callable[[bytes], object]


def candidates(dtype: np.dtype) -> list[Candidate]:
    """Return what is compared: our own, Blosc's codecs, pcodec if it is installed, and no compression."""
    codec = Codec()
    ours = Candidate("ours", partial(encode, codec=codec), partial(decode, dtype=dtype, codec=codec))
    tried = [
        Candidate(
            f"Blosc {name}-{level}, {shuffle}",
            partial(blosc.compress, cname=name.encode(), clevel=level, shuffle=SHUFFLES[shuffle]),
            blosc.decompress,
        )
        for name, level, shuffle in BLOSC
    ]
    plain = Candidate("none", np.ndarray.tobytes, partial(np.frombuffer, dtype=dtype))
    return [ours, *tried, *pcodec(dtype), plain]


def pcodec(dtype: np.dtype) -> list[Candidate]:
    """Return pcodec, if it is there."""
    try:
        from pcodec import ChunkConfig, standalone
    except ImportError:
        return []
    config = ChunkConfig(enable_8_bit=True)
    return [Candidate("pcodec", partial(standalone.simple_compress, config=config), standalone.simple_decompress)]


def simulated(n_obs: int, n_vars: int) -> sp.csr_matrix:
    """Draw counts (n, g): 10 types, means over three orders of magnitude, depths that differ."""
    r = np.random.default_rng(0)
    share = np.exp(r.normal(0, 1.6, n_vars) + r.normal(0, 0.7, (10, n_vars)))
    theta = np.exp(r.normal(0, 0.5, n_vars))
    depth = 0.042 if n_vars < 5_000 else 0.015  # so that about 200, or 1,000, genes are detected
    blocks = []
    for start in range(0, n_obs, 512):
        n = min(512, n_obs - start)
        mu = depth * np.exp(r.normal(0, 0.4, (n, 1))) * share[r.integers(0, 10, n)]
        blocks.append(sp.csr_matrix(r.poisson(r.gamma(theta, mu / theta)).astype(np.uint16)))
    return sp.vstack(blocks, format="csr")


def best(run: Callable[[], object], times: int = 5) -> float:
    """Return the shortest processor time of some runs, in seconds."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        run()
        found.append(time.thread_time() - began)
    return min(found)


def measure(parts: list[np.ndarray], candidate: Candidate, n_obs: int) -> dict[str, float]:
    """Return bytes, and microseconds to write and to read, per cell."""
    written = [candidate.write(part) for part in parts]
    return {
        "B/cell": sum(map(len, written)) / n_obs,
        "write, us/cell": best(lambda: [candidate.write(part) for part in parts], 2) / n_obs * 1e6,
        "read, us/cell": best(lambda: [candidate.read(data) for data in written]) / n_obs * 1e6,
    }


def chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    """Return values as they are written together."""
    return np.split(values, range(size, len(values), size))


def bitmap(x: sp.csr_matrix) -> list[np.ndarray]:
    """Return one bit per gene, of 256 cells at a time."""
    ones = sp.csr_matrix((np.ones(x.nnz, bool), x.indices, x.indptr), x.shape)
    return [np.packbits(ones[i : i + 256].toarray(), axis=1).ravel() for i in range(0, x.shape[0], 256)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("h5ad", nargs="?", help="counts as CSR; simulated ones if none is given")
    parser.add_argument("--cells", type=int, default=16_384)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--chunk", type=int, default=Codec().chunk, help="values compressed together")
    arguments = parser.parse_args()
    if arguments.h5ad:
        x = ad.read_h5ad(arguments.h5ad).X
        x = sp.csr_matrix(x[np.random.default_rng(0).permutation(x.shape[0])[: arguments.cells]])
    else:
        x = simulated(arguments.cells, arguments.genes)
    x.sort_indices()
    n_obs, rows = x.shape[0], []
    print(
        f"{n_obs} cells x {x.shape[1]} genes, {x.nnz / n_obs:.0f} detected in a cell, largest count {x.data.max():.0f}"
    )
    ids, counts = x.indices.astype(np.uint16), x.data.astype(np.min_scalar_type(x.data.max()))
    cut = {
        "ids as differences": [np.diff(part, prepend=np.uint16(0)) for part in chunks(ids, arguments.chunk)],
        "ids": chunks(ids, arguments.chunk),
        "counts": chunks(counts, arguments.chunk),
        "bitmap": bitmap(x),
    }
    for name, parts in cut.items():
        for candidate in candidates(parts[0].dtype):
            if name not in ("ids", "bitmap") or candidate.name in ("ours", "Blosc lz4-5, shuffle", "none"):
                rows.append({"array": name, "codec": candidate.name, **measure(parts, candidate, n_obs)})
    print(pd.DataFrame(rows).round(2).to_markdown(index=False))


if __name__ == "__main__":
    main()
