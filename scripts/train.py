"""Rule train: shards -> model, its facts and the history of its training."""

from cohortvi import log
from cohortvi.config import Model, build
from cohortvi.files import read_json, write_table
from cohortvi.inference.checkpoint import forget_other_runs, run_folder, save_model
from cohortvi.inference.train import fit

log.start(snakemake.log[0])
found, made, params = snakemake.input, snakemake.output, snakemake.params
shards = [read_json(path)["content"] for path in (*found.train, *found.validation)]
folder = run_folder(params.checkpoints, params.config, params.covariates, params.seed, params.code, shards)
settings = {"sheet": params.covariates, "seed": params.seed, "checkpoints": folder, "threads": snakemake.threads}
vae, history, facts = fit(found.train, found.validation, build(Model, params.config), **settings)
write_table(history, made.history)
save_model(vae, facts, made.model, made.facts)
forget_other_runs(folder, params.checkpoints)
