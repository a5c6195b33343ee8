"""Rule cells: obs of the counts stores, the sheet's columns, clusters and layout -> one table of all cells."""

from cohortvi import log
from cohortvi.atlas.cells import cell_table
from cohortvi.files import read_table, write_table

log.start(snakemake.log[0])
clusters, layout = read_table(snakemake.input.clusters), read_table(snakemake.input.layout)
cells = cell_table(snakemake.input.counts, snakemake.params.sheet, clusters, layout)
write_table(cells, snakemake.output.cells)
log.logger.info("%d cells, %d columns", *cells.shape)
