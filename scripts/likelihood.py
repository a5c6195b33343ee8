"""Rule likelihood: model and counts stores -> log p(x) of every cell, and its mean by sample."""

from cohortvi import log
from cohortvi.config import Likelihood
from cohortvi.files import write_json
from cohortvi.inference.marginal import marginal_log_likelihood, write_likelihood
from cohortvi.inference.reading import Source
from cohortvi.typed import build

log.start(snakemake.log[0])
found, made, params = snakemake.input, snakemake.output, snakemake.params
source = Source(found.model, found.counts, sheet=params.covariates, threads=snakemake.threads)
settings = build(Likelihood, params.config)
tables = marginal_log_likelihood(source, settings.draws, seed=params.seed, chunk_cells=params.chunk_cells)
facts = write_likelihood(tables, made.cells)
write_json(facts, made.facts)
log.logger.info("log p(x): %(mean).3f nats per cell, %(cells)d cells, effective sample size %(ess).1f", facts["all"])
