"""Rule gene_moments: counts of a sample's kept cells -> sum and sum of squares of each gene."""

from cohortvi import log
from cohortvi.cohort.genes import gene_moments
from cohortvi.files import write_table
from cohortvi.store.opening import open_counts

log.start(snakemake.log[0])
counts = open_counts(snakemake.input.counts)
blocks = (block for _, block in counts.chunks(snakemake.params.chunk_cells))
write_table(gene_moments(blocks, counts.var), snakemake.output.moments)
log.logger.info("%s: %d cells, %d genes", snakemake.wildcards.sample, counts.n_obs, counts.n_vars)
