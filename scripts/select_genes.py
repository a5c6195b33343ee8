"""Rule select_genes: moments, trends and standardized variances of all samples -> the cohort's genes and the choice."""

from pathlib import Path

from cohortvi import log
from cohortvi.cohort.selection import select_genes
from cohortvi.config import Genes, build
from cohortvi.files import read_table, write_table


def tables(paths):
    """Read tables by the name of their file, which is the sample's or the batch's."""
    return {Path(path).stem: read_table(path) for path in paths}


log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
config = build(Genes, params.config)
parts = tables(found.moments), tables(found.variances), tables(found.fits)
genes = select_genes(*parts, batches=params.batches, genes=config, join=params.join)
write_table(genes, snakemake.output.genes)
log.logger.info("%d of %d genes selected", genes["highly_variable"].sum(), len(genes))
