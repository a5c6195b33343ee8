"""Rule expression: model and counts stores -> denoised expression of every cell, in order, and means by group."""

from cohortvi import log
from cohortvi.atlas.expression import expression
from cohortvi.config import Expression
from cohortvi.files import write_json, write_table
from cohortvi.inference.reading import Source
from cohortvi.typed import build

log.start(snakemake.log[0])
found, made, params = snakemake.input, snakemake.output, snakemake.params
manifest, groups = expression(
    Source(found.model, found.counts, sheet=params.covariates, threads=snakemake.threads),
    build(Expression, params.config),
    found.cells or None,
    made.store,
    seed=params.seed,
    chunk_cells=params.chunk_cells,
)
write_table(groups, made.groups)
write_json(manifest, made.manifest)
log.logger.info("%d cells, %d genes, %d rows by group", manifest["n_obs"], manifest["n_vars"], len(groups))
