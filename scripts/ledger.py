"""Rule ledger: facts and manifests of all stages -> the account of every cell, per sample."""

from cohortvi import log
from cohortvi.cohort.ledger import account
from cohortvi.files import read_json, replacing

log.start(snakemake.log[0])
stages = ("qc", "counts", "shards", "latents", "atlases")
qc, counts, shards, latents, atlases = ([read_json(path) for path in snakemake.input[stage]] for stage in stages)
models = dict(zip(snakemake.params.models, zip(latents, atlases, strict=True), strict=True))
ledger = account(qc, counts, shards, models)
with replacing(snakemake.output.ledger) as partial:
    ledger.to_csv(partial, sep="\t", index=False)
log.logger.info("%d cells in, %d kept, none unaccounted for", ledger["cells_in"].sum(), ledger["kept"].sum())
