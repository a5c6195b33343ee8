"""Rule train: shards -> model, its facts and the history of its training."""

from cohortvi import log
from cohortvi.inference.launch import Job, train

log.start(snakemake.log[0])
found, params, resources = snakemake.input, snakemake.params, snakemake.resources
job = Job(
    train=list(found.train),
    validation=list(found.validation),
    outputs=dict(snakemake.output),
    config=params.config,
    sheet=params.covariates,
    seed=params.seed,
    code=params.code,
    checkpoints=params.checkpoints,
    events=params.events,
    log=snakemake.log[0],
    threads=snakemake.threads,
)
train(job, ranks=resources.get("gpu", 0), nodes=resources.get("nodes", 1))
