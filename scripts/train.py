"""Rule train: shards -> model, its facts and the history of its training."""

from pathlib import Path

from cohortvi import log
from cohortvi.config import Model, build
from cohortvi.files import digest, read_json, remove, write_table
from cohortvi.inference.checkpoint import save_model
from cohortvi.inference.train import fit

log.start(snakemake.log[0])
found, made, params = snakemake.input, snakemake.output, snakemake.params
shards = [read_json(path)["content"] for path in (*found.train, *found.validation)]
key = digest(params.config, params.covariates, params.seed, params.code, shards)
folder = Path(f"{params.checkpoints}-{key}")
vae, history, facts = fit(
    found.train,
    found.validation,
    build(Model, params.config),
    sheet=params.covariates,
    seed=params.seed,
    checkpoints=folder,
    threads=snakemake.threads,
)
write_table(history, made.history)
save_model(vae, facts, made.model, made.facts)
for old in folder.parent.glob(f"{Path(params.checkpoints).name}-*"):
    if old != folder:
        remove(old)
