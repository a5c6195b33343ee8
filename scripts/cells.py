"""Rule cells: obs of the counts stores, the sheet, clusters, layout, predicted labels -> one table of all cells."""

from cohortvi import log
from cohortvi.atlas.cells import cell_table
from cohortvi.atlas.embed import predicted_labels
from cohortvi.files import read_table, write_table

log.start(snakemake.log[0])
found = snakemake.input
tables = {name: read_table(found[name]) for name in ("clusters", "layout")}
cells = cell_table(found.counts, snakemake.params.sheet, tables | {"labels": predicted_labels(found.latent)})
write_table(cells, snakemake.output.cells)
log.logger.info("%d cells, %d columns", *cells.shape)
