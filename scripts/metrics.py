"""Rule metrics: clusters, latent space and what is known of the cells -> figures on the quality of the atlas."""

from cohortvi import log
from cohortvi.atlas.measure import Sources, measure
from cohortvi.files import write_json

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
sources = Sources(
    latent=found.latent,
    neighbors=found.neighbors,
    clusters=found.clusters,
    cells=found.cells,
    model=found.model,
    genes=found.genes,
    qc=tuple(found.qc),
    truth=tuple(found.truth),
    effects=tuple(found.effects),
)
write_json(measure(sources, params.labels, params.shown, params.seed), snakemake.output.metrics)
