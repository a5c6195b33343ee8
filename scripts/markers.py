"""Rule markers: counts and clusters -> a table of every gene in every cluster."""

from cohortvi import log
from cohortvi.atlas.cells import count_blocks
from cohortvi.atlas.markers import markers
from cohortvi.config import cluster_column
from cohortvi.files import read_table, write_table

log.start(snakemake.log[0])
clusters = read_table(snakemake.input.clusters)[cluster_column(snakemake.params.shown)]
genes = read_table(snakemake.input.genes)
blocks = count_blocks(snakemake.input.counts, genes.index, snakemake.params.chunk_cells)
write_table(markers(blocks, clusters, genes), snakemake.output.markers)
log.logger.info("%d clusters, %d genes", clusters.nunique(), len(genes))
