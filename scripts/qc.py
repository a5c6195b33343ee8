"""Rule qc: raw counts of one sample -> a row per cell with its metrics and the reason it was removed, or none."""

from cohortvi import log
from cohortvi.cohort.qc import run_qc
from cohortvi.cohort.readers import open_raw
from cohortvi.cohort.sheet import from_source
from cohortvi.config import Qc, build
from cohortvi.files import write_json, write_table

log.start(snakemake.log[0])
config = build(Qc, snakemake.params.config)
raw = open_raw(from_source(snakemake.params.source), symbols=config.symbols, **snakemake.params.cohort)
cells, facts = run_qc(raw, config, snakemake.params.seed)
write_table(cells, snakemake.output.cells)
write_json(facts, snakemake.output.facts)
log.logger.info(
    "%(sample)s: %(n_kept)d of %(n_obs)d cells kept, removed %(removed)s, quarantined: %(quarantined)s", facts
)
