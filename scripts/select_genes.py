"""Rule select_genes: moments, trends and standardized variances of all samples -> the cohort's genes and the choice."""

from cohortvi import log
from cohortvi.cohort.selection import select_genes
from cohortvi.config import Genes
from cohortvi.files import Tables, write_table
from cohortvi.typed import build

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
config = build(Genes, params.config)
parts = Tables(found.moments), Tables(found.variances), Tables(found.fits)
genes = select_genes(*parts, batches=params.batches, genes=config, join=params.join)
write_table(genes, snakemake.output.genes)
log.logger.info("%d of %d genes selected", genes["highly_variable"].sum(), len(genes))
