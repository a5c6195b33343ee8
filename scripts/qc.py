"""Rule qc: raw counts of one sample -> a row per cell with its metrics and the reason it was removed, or none."""

from cohortvi import log
from cohortvi.cohort.qc import run_qc
from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.config import Qc
from cohortvi.files import write_json, write_table
from cohortvi.typed import build

log.start(snakemake.log[0])
config = build(Qc, snakemake.params.config)
cohort = snakemake.params.cohort
# What a file may lack was looked at before any job, by the models that have a use for it: no model reruns this rule.
raw = open_raw(from_source(snakemake.params.source), symbols=config.symbols, **cohort, may_lack=cohort["keep_obs"])
cells, facts = run_qc(raw, config, snakemake.params.seed)
write_table(cells, snakemake.output.cells)
write_json(facts, snakemake.output.facts)
log.logger.info(
    "%(sample)s: %(n_kept)d of %(n_obs)d cells kept, removed %(removed)s, quarantined: %(quarantined)s", facts
)
