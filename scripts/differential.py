"""Rule differential: model, counts stores and cells -> genes that differ between groups of cells."""

from cohortvi import log
from cohortvi.atlas.differential import differential
from cohortvi.config import Differential
from cohortvi.files import read_table, write_table
from cohortvi.typed import build

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
changes = differential(
    found.model,
    found.counts,
    read_table(found.cells),
    build(Differential, params.config),
    sheet=params.covariates,
    seed=params.seed,
    threads=snakemake.threads,
    chunk_cells=params.chunk_cells,
)
write_table(changes, snakemake.output.changes)
log.logger.info("%d rows", len(changes))
