"""All figures on one atlas, gathered from the files of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from cohortvi.atlas.embed import Latent, open_latent
from cohortvi.atlas.metrics import agreement, batch_mixing, silhouette
from cohortvi.atlas.truth import batch_effects, doublets_found, dying_removed, quarantined, read_truth, true_types
from cohortvi.config import cluster_column
from cohortvi.files import read_table
from cohortvi.inference.checkpoint import load_model


@dataclass(frozen=True)
class Sources:
    """Where the parts of an atlas lie; `qc`, `truth` and `effects` are empty unless the cohort is simulated."""

    latent: Path
    neighbors: Path
    clusters: Path
    cells: Path
    model: Path
    genes: Path
    qc: tuple[Path, ...]
    truth: tuple[Path, ...]
    effects: tuple[Path, ...]


def measure(sources: Sources, labels: Sequence[str], shown: float, seed: int) -> dict:
    """Return all figures: per column of clusters, mixing of batches, and what was found of a simulated truth."""
    clusters, cells = read_table(sources.clusters), read_table(sources.cells)
    latent = open_latent(sources.latent)
    graph = ad.read_zarr(Path(sources.neighbors).with_suffix(".zarr"))
    agreements = {label: agreement(clusters, cells[label]) for label in labels}
    return {
        "clusters": {
            name: {
                "n_clusters": int(clusters[name].nunique()),
                "silhouette": silhouette(latent.mean_nk, clusters[name], seed),
                "labels": {label: found[name] for label, found in agreements.items()},
            }
            for name in clusters
        },
        "shown": cluster_column(shown),
        "batch_mixing": batch_mixing(graph, cells["batch"]),
        "truth": recovered(sources, clusters, latent) if sources.truth else None,
    }


def recovered(sources: Sources, clusters: pd.DataFrame, latent: Latent) -> dict:
    """Return what was found of a simulated cohort's truth: types, doublets, dying cells, batch effects, bad samples."""
    truth = read_truth(sources.truth)
    tables = {Path(path).stem: read_table(path) for path in sources.qc}
    cells = pd.concat([table.set_axis([f"{name}_{cell}" for cell in table.index]) for name, table in tables.items()])
    return {
        "types": agreement(clusters, true_types(truth, clusters.index)),
        "doublets": doublets_found(truth, cells),
        "dying": dying_removed(truth, cells["reason"]),
        "effects": effects_found(sources, latent),
        **quarantined(truth, cells),
    }


def effects_found(sources: Sources, latent: Latent) -> dict | None:
    """Return the effects of the batches as the decoder has them beside the simulated ones (`batch_effects`)."""
    cells = read_table(sources.cells)
    vae, facts = load_model(sources.model)
    effects = {Path(path).name.removesuffix(".genes.parquet"): read_table(path) for path in sources.effects}
    batch_of = cells.groupby("sample", observed=True)["batch"].first().astype(str)
    means = {
        batch: np.mean([effects[name].loc[facts["genes"], "log_effect"] for name in names.index], axis=0)
        for batch, names in batch_of.groupby(batch_of)
    }
    return batch_effects(vae, latent.mean_nk, facts["batches"], means)
