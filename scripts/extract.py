"""Rule extract: raw counts of a sample's kept cells and the selected genes -> its counts store and manifest."""

import numpy as np

from cohortvi import log
from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.files import read_table, write_json
from cohortvi.store.counts import write_counts
from cohortvi.store.extract import cell_table, selected_counts

log.start(snakemake.log[0])
found, params = snakemake.input, snakemake.params
raw = open_raw(from_source(params.source), symbols=None, keep_obs=(), **params.cohort)
cells, genes = read_table(found.cells), read_table(found.genes)
var = genes.loc[genes["highly_variable"], ["symbol"]]
blocks = selected_counts(raw, np.flatnonzero(cells["reason"] == ""), var.index)
obs = cell_table(cells, raw.sample.name, params.columns)
manifest = write_counts(blocks, obs, var, snakemake.output.store, sample=raw.sample.name)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%s: %d cells x %d genes", raw.sample.name, manifest["n_obs"], manifest["n_vars"])
