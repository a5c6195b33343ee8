"""Rule gene_variance: counts of a sample's kept cells, its batch's trend -> parts of standardized variances."""

from cohortvi import log
from cohortvi.cohort.genes import standardized
from cohortvi.files import read_table, write_table
from cohortvi.store.opening import open_counts

log.start(snakemake.log[0])
params = snakemake.params
counts = open_counts(snakemake.input.counts)
blocks = (block for _, block in counts.chunks(params.chunk_cells))
fit = read_table(snakemake.input.fit).reindex(counts.var_names)
write_table(standardized(blocks, fit, params.config["flavor"], params.config["theta"]), snakemake.output.variances)
log.logger.info("%s: %d cells, %d genes", snakemake.wildcards.sample, counts.n_obs, counts.n_vars)
