"""Rule embed: model and counts stores -> latent mean and standard deviation of every cell, in order."""

from cohortvi import log
from cohortvi.atlas.embed import embed
from cohortvi.files import write_json

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
manifest = embed(
    found.model,
    found.counts,
    snakemake.output.store,
    sheet=params.covariates,
    chunk_cells=params.chunk_cells,
    threads=snakemake.threads,
)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%d cells, %d latent dimensions", manifest["n_obs"], manifest["n_latent"])
