"""Rule layout: graph of nearest neighbours -> UMAP."""

from pathlib import Path

import anndata as ad

from cohortvi import log
from cohortvi.atlas.embed import open_latent
from cohortvi.atlas.layout import umap_layout
from cohortvi.files import write_table

log.start(snakemake.log[0])
graph = ad.read_zarr(Path(snakemake.input.neighbors).with_suffix(".zarr"))
latent = open_latent(snakemake.input.latent)
write_table(
    umap_layout(graph, latent.mean_nk, seed=snakemake.params.seed, **snakemake.params.config), snakemake.output.layout
)
log.logger.info("%d cells", graph.n_obs)
