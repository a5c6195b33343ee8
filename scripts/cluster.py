"""Rule cluster: graph of nearest neighbours -> Leiden clusters at every resolution."""

from pathlib import Path

import anndata as ad

from cohortvi import log
from cohortvi.atlas.clusters import leiden_clusters
from cohortvi.files import write_table

log.start(snakemake.log[0])
graph = ad.read_zarr(Path(snakemake.input.neighbors).with_suffix(".zarr"))
clusters = leiden_clusters(graph, snakemake.params.config, snakemake.params.seed)
write_table(clusters, snakemake.output.clusters)
log.logger.info("clusters: %s", {name: clusters[name].nunique() for name in clusters})
