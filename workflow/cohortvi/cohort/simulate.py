"""The demo cohort: counts drawn from a stated generative model, with the truth written apart.

A cell of type t, donor d, run r has expected shares rho_g ~ exp(b_g + type_tg + donor_dg + run_rg) of its depth l, and
counts x_g ~ NegativeBinomial(mean l * rho_g, inverse dispersion theta_g), drawn as Poisson(Gamma). A doublet's mean is
the sum of two cells' means; a dying cell has 0.3 of its depth, and 30 to 80 % of it mitochondrial. Effects and theta
depend on the seed alone, cells on (seed, sample), so that samples can be drawn in any order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from cohortvi.config import Simulate
from cohortvi.files import replacing, write_table

CHUNK_ROWS = 1024
RIBO_GENES = 40
MT_SHARE = 0.04
FAILED_DEPTH = 0.03


class Effects(NamedTuple):
    """Log effects on the genes: base (g,), types (t, g), donors (d, g), runs (r, g); depth_r (r,); theta (g,)."""

    names: np.ndarray
    base: np.ndarray
    types: np.ndarray
    donors: np.ndarray
    runs: np.ndarray
    depth: np.ndarray
    theta: np.ndarray
    is_mt: np.ndarray


def sample_names(config: Simulate) -> list[str]:
    """Return the names of the simulated samples: sample01, sample02 ..."""
    return [f"sample{i + 1:02d}" for i in range(config.samples)]


def sample_columns(config: Simulate, sample: str) -> dict[str, int]:
    """Return the number of the sample's donor and run: two samples a donor, donors in turn over the runs."""
    i = sample_names(config).index(sample)
    return {"donor": i % config.donors, "run": i // max(config.samples // config.runs, 1) % config.runs}


def draw_effects(config: Simulate, seed: int) -> Effects:
    """Return the effects of types, donors and runs."""
    rng, g = np.random.default_rng([seed, 0]), config.genes
    is_mt = np.arange(g) >= g - config.mt_genes
    names = np.array([f"GENE{i + 1:05d}" for i in range(g)], dtype=object)
    names[:RIBO_GENES] = [f"{'RPS' if i % 2 else 'RPL'}{i // 2 + 1}" for i in range(RIBO_GENES)]
    names[is_mt] = [f"MT-{i + 1}" for i in range(config.mt_genes)]
    base = rng.normal(0, 1.4, g)
    base[:RIBO_GENES] = rng.normal(2.5, 0.4, RIBO_GENES)
    share = np.exp(base)
    base[is_mt] += np.log(MT_SHARE / (1 - MT_SHARE) * share[~is_mt].sum() / max(share[is_mt].sum(), 1e-12))
    differs = (rng.random((config.types, g)) < 0.1) & ~is_mt
    types = np.where(differs, rng.normal(0, config.type_effect, (config.types, g)), 0)
    donors = rng.normal(0, config.donor_effect, (config.donors, g))
    runs = np.where(rng.random((config.runs, g)) < 0.5, rng.normal(0, config.run_effect, (config.runs, g)), 0)
    depth = np.exp(rng.normal(0, 0.15, config.runs))
    theta = config.dispersion * np.exp(rng.normal(0, 0.5, g))
    return Effects(names, base, types, donors, runs, depth, theta, is_mt)


def draw_cells(config: Simulate, seed: int, sample: str) -> pd.DataFrame:
    """Return the truth of a sample's cells: cell_type, second_type, doublet, dying, failed, depth (expected UMI)."""
    i, n = sample_names(config).index(sample), config.cells
    rng = np.random.default_rng([seed, 1, i])
    weights = rng.dirichlet(60 * 0.75 ** np.arange(config.types) / (0.75 ** np.arange(config.types)).sum())
    depth = config.median_counts * np.exp(rng.normal(0, 0.35, n))
    depth *= draw_effects(config, seed).depth[sample_columns(config, sample)["run"]]
    failed = i >= config.samples - config.failed_samples
    depth *= FAILED_DEPTH if failed else 1
    doublet = rng.random(n) < config.doublet_rate
    dying = (rng.random(n) < config.dying_rate) & ~doublet
    return pd.DataFrame(
        {
            "cell_type": rng.choice(config.types, n, p=weights),
            "second_type": np.where(doublet, rng.choice(config.types, n, p=weights), -1),
            "doublet": doublet,
            "dying": dying,
            "failed": failed,
            "mt_share": np.where(dying, rng.uniform(0.3, 0.8, n), np.nan),
            "depth": np.where(dying, 0.3 * depth, depth),
        },
        index=[f"{sample}_{barcode}" for barcode in barcodes(n)],
    )


def barcodes(n: int) -> list[str]:
    """Return n different barcodes of 8 letters."""
    codes = np.arange(n)[:, None] // 4 ** np.arange(8)[::-1] % 4
    return ["".join(row) + "-1" for row in np.array(list("ACGT"))[codes]]


def shares(effects: Effects, cells: pd.DataFrame, donor: int, run: int) -> np.ndarray:
    """Return the expected share (n, g) of each gene in each cell's counts; rows sum to 1 (a doublet's to 2)."""
    common = effects.base + effects.donors[donor] + effects.runs[run]
    profile = np.exp(common + effects.types)
    profile /= profile.sum(1, keepdims=True)
    rho = profile[cells["cell_type"]]
    second = (cells["second_type"] >= 0).to_numpy()
    rho[second] += profile[cells["second_type"][second]]
    dying = cells["dying"].to_numpy()
    target = cells["mt_share"].to_numpy()[dying, None]
    mt, rest = rho[dying] * effects.is_mt, rho[dying] * ~effects.is_mt
    mt /= np.maximum(mt.sum(1, keepdims=True), 1e-12)
    rho[dying] = mt * target + rest / rest.sum(1, keepdims=True) * (1 - target)
    return rho


def draw_counts(config: Simulate, seed: int, sample: str, cells: pd.DataFrame) -> Iterator[sp.csr_matrix]:
    """Yield the counts (n, g) of a sample, uint32, in chunks of rows."""
    effects, columns = draw_effects(config, seed), sample_columns(config, sample)
    rng = np.random.default_rng([seed, 2, sample_names(config).index(sample)])
    for start in range(0, len(cells), CHUNK_ROWS):
        chunk = cells.iloc[start : start + CHUNK_ROWS]
        mean = shares(effects, chunk, **columns) * chunk["depth"].to_numpy()[:, None]
        yield sp.csr_matrix(rng.poisson(rng.gamma(effects.theta, mean / effects.theta)).astype(np.uint32))


def simulate_sample(config: Simulate, seed: int, sample: str, store: Path, truth: Path) -> None:
    """Write the sample's raw counts as an AnnData zarr store, and its truth as `truth` (cells) and *.genes.parquet."""
    effects, cells = draw_effects(config, seed), draw_cells(config, seed, sample)
    obs = pd.DataFrame(index=[name.removeprefix(f"{sample}_") for name in cells.index])
    var = pd.DataFrame(index=pd.Index(effects.names, dtype=object))
    with replacing(store) as partial:
        write_raw(draw_counts(config, seed, sample, cells), obs, var, partial)
    columns = sample_columns(config, sample)
    log_effect = effects.donors[columns["donor"]] + effects.runs[columns["run"]]
    write_table(pd.DataFrame({"log_effect": log_effect}, index=var.index), truth.with_suffix(".genes.parquet"))
    write_table(cells, truth)


def write_raw(blocks: Iterator[sp.csr_matrix], obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> None:
    """Write blocks of rows as one AnnData zarr store, a block in memory at a time."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    first = next(blocks)
    ad.io.write_elem(group, "/", ad.AnnData(first, obs=obs.iloc[: first.shape[0]], var=var))
    ad.io.write_elem(group, "obs", obs)
    matrix = ad.io.sparse_dataset(group["X"])
    for block in blocks:
        matrix.append(block)
    zarr.consolidate_metadata(path)  # readers then look for no member that is not there
