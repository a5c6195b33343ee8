"""The atlas: one AnnData store with counts, cells, genes, latent space, graph and provenance, to open in scanpy."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import yaml

from cohortvi.atlas.cells import count_blocks
from cohortvi.atlas.embed import open_latent
from cohortvi.files import digest, read_json, read_table, replacing
from cohortvi.store.counts import write_stream

PACKAGES = ("cohortvi", "anndata", "numpy", "scanpy", "scipy", "snakemake", "torch", "zarr")


@dataclass(frozen=True)
class Parts:
    """Where the parts of an atlas lie."""

    counts: tuple[Path, ...]
    genes: Path
    latent: Path
    neighbors: Path
    cells: Path
    facts: Path
    metrics: Path


def write_atlas(parts: Parts, config: dict, chunk_cells: int, path: Path) -> dict:
    """Write the atlas as `path`, counts streamed as int32 CSR; return its manifest.

    obs: all columns of the table of cells but umap; var: all genes of the cohort or the selected ones, as
    config["atlas"]["genes"] says; obsm: X_latent, X_latent_std, X_umap; obsp: connectivities, distances;
    uns["cohortvi"]: config, versions, seed, digests of every store behind it.
    """
    cells, genes = read_table(parts.cells), read_table(parts.genes)
    if config["atlas"]["genes"] == "selected":
        genes = genes[genes["highly_variable"]]
    latent = open_latent(parts.latent)
    graph = ad.read_zarr(Path(parts.neighbors).with_suffix(".zarr"))
    manifests = {Path(path).stem: read_json(path) for path in parts.counts}
    umap = ["umap_1", "umap_2"]
    frame = ad.AnnData(
        obs=cells.drop(columns=umap),
        var=genes,
        obsm={
            "X_latent": latent.mean_nk,
            "X_latent_std": latent.std_nk,
            "X_umap": cells[umap].to_numpy(np.float32),
        },
        obsp=dict(graph.obsp),
        uns={"cohortvi": provenance(parts, config, manifests), "neighbors": dict(graph.uns["neighbors"])},
    )
    with replacing(path) as partial:
        blocks = (block for block, _ in count_blocks(parts.counts, genes.index, chunk_cells))
        write_stream(blocks, frame, partial, dtype=np.int32)
    return {
        "n_obs": frame.n_obs,
        "n_vars": frame.n_vars,
        "samples": {name: int(n) for name, n in cells["sample"].value_counts().sort_index().items() if n},
        "content": digest([manifests[name]["content"] for name in sorted(manifests)], latent.manifest["content"]),
    }


def provenance(parts: Parts, config: dict, manifests: dict[str, dict]) -> dict[str, str]:
    """Return what made the atlas, as texts: config (YAML), versions, digests, model facts and metrics (JSON)."""
    return {
        "config": yaml.safe_dump(config, sort_keys=True),
        "versions": "\n".join(f"{name} {version(name)}" for name in PACKAGES),
        "counts": "\n".join(f"{name} {manifest['content']}" for name, manifest in sorted(manifests.items())),
        "latent": read_json(parts.latent)["content"],
        "model": Path(parts.facts).read_text(),
        "metrics": Path(parts.metrics).read_text(),
    }
