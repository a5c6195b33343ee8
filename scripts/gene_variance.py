"""Rule gene_variance: raw counts of a sample's kept cells, its batch's trend -> parts of standardized variances."""

import numpy as np

from cohortvi import log
from cohortvi.cohort.genes import standardized
from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.files import read_table, write_table

log.start(snakemake.log[0])
params = snakemake.params
raw = open_raw(from_source(params.source), symbols=None, keep_obs=(), **params.cohort)
keep = np.flatnonzero(read_table(snakemake.input.cells)["reason"] == "")
fit = read_table(snakemake.input.fit)
write_table(standardized(raw, keep, fit, params.config["flavor"], params.config["theta"]), snakemake.output.variances)
log.logger.info("%s: %d cells, %d genes", raw.sample.name, len(keep), len(raw.var))
