"""Rule atlas: counts, latent space, graph, cells and provenance -> one AnnData store to open in scanpy."""

from cohortvi import log
from cohortvi.atlas.store import Parts, write_atlas
from cohortvi.files import write_json

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
parts = Parts(
    counts=tuple(found.counts),
    genes=found.genes,
    latent=found.latent,
    neighbors=found.neighbors,
    cells=found.cells,
    facts=found.facts,
    metrics=found.metrics,
)
manifest = write_atlas(parts, params.config, params.chunk_cells, snakemake.output.store)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%d cells x %d genes", manifest["n_obs"], manifest["n_vars"])
