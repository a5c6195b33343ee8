"""Rule gene_moments: raw counts of a sample's kept cells -> sum, sum of squares and maximum of each gene."""

import numpy as np

from cohortvi import log
from cohortvi.cohort.genes import gene_moments
from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.files import read_table, write_table

log.start(snakemake.log[0])
params = snakemake.params
raw = open_raw(from_source(params.source), symbols=params.symbols, keep_obs=(), **params.cohort)
keep = np.flatnonzero(read_table(snakemake.input.cells)["reason"] == "")
write_table(gene_moments(raw, keep), snakemake.output.moments)
log.logger.info("%s: %d cells, %d genes", raw.sample.name, len(keep), len(raw.var))
