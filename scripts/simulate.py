"""Rule simulate: parameters -> raw counts of one demo sample, and its truth."""

from pathlib import Path

from cohortvi import log
from cohortvi.cohort.simulate import simulate_sample
from cohortvi.config import Simulate
from cohortvi.typed import build

log.start(snakemake.log[0])
config = build(Simulate, snakemake.params.config)
store, truth = Path(snakemake.output.store), Path(snakemake.output.truth)
simulate_sample(config, snakemake.params.seed, snakemake.wildcards.sample, store, truth)
log.logger.info("%s: %d cells x %d genes", store, config.cells, config.genes)
