"""Rule embed: model and counts stores -> latent mean and standard deviation of every cell, in order."""

from cohortvi import log
from cohortvi.atlas.embed import embed
from cohortvi.config import Embed
from cohortvi.files import write_json
from cohortvi.typed import build

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
manifest = embed(
    found.model,
    found.counts,
    snakemake.output.store,
    build(Embed, params.config),
    sheet=params.covariates,
    seed=params.seed,
    chunk_cells=params.chunk_cells,
    threads=snakemake.threads,
)
write_json(manifest, snakemake.output.manifest)
log.logger.info(
    "%d cells, %d latent dimensions, refined: %s", *(manifest[key] for key in ("n_obs", "n_latent", "refined"))
)
