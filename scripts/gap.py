"""Rule gap: model and shards -> how far its posterior can be trusted, for each cell of a subset and in sum."""

from cohortvi import log
from cohortvi.config import Gap
from cohortvi.files import write_json, write_table
from cohortvi.inference.gap import gap
from cohortvi.typed import build

log.start(snakemake.log[0])
found, made, params = snakemake.input, snakemake.output, snakemake.params
cells, facts = gap(
    found.model,
    {"train": found.train, "validation": found.validation},
    found.counts,
    build(Gap, params.config),
    sheet=params.covariates,
    seed=params.seed,
    threads=snakemake.threads,
)
write_table(cells, made.cells)
write_json(facts, made.facts)
