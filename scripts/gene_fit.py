"""Rule gene_fit: moments of a batch's samples -> moments of the batch and the trend of variance over mean."""

from cohortvi import log
from cohortvi.cohort.genes import fit_trend, merge_moments
from cohortvi.config import Genes
from cohortvi.files import read_table, write_table
from cohortvi.typed import build

log.start(snakemake.log[0])
moments = merge_moments(read_table(path) for path in snakemake.input.moments)
write_table(fit_trend(moments, snakemake.wildcards.batch, build(Genes, snakemake.params.config)), snakemake.output.fit)
log.logger.info("batch %s: %d genes", snakemake.wildcards.batch, len(moments))
