"""Rule extract: raw counts of a sample's kept cells -> its counts store and manifest."""

import numpy as np

from cohortvi import log
from cohortvi.cohort.readers import iter_counts, open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.files import read_table, write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.extract import cell_table

log.start(snakemake.log[0])
params = snakemake.params
raw = open_raw(from_source(params.source), symbols=params.symbols, keep_obs=(), **params.cohort)
cells = read_table(snakemake.input.cells)
blocks = (block for _, block in iter_counts(raw, np.flatnonzero(cells["reason"] == "")))
obs = cell_table(cells, raw.sample.name, params.columns)
manifest = write_counts(blocks, obs, raw.var, snakemake.output.store, sample=raw.sample.name)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%s: %d cells x %d genes", raw.sample.name, manifest["n_obs"], manifest["n_vars"])
