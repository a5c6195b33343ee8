"""Rule shard: counts of all samples, selected genes -> one shard of shuffled training or validation cells."""

from cohortvi import log
from cohortvi.config import Store, build
from cohortvi.files import read_table, write_json
from cohortvi.store.shards import write_shard

log.start(snakemake.log[0])
found, params, names = snakemake.input, snakemake.params, snakemake.wildcards
genes = read_table(found.genes)
selected = genes.loc[genes["highly_variable"], ["symbol"]]
store, place = build(Store, params.config), (names.split, int(names.shard))
manifest = write_shard(found.counts, *place, snakemake.output.store, seed=params.seed, store=store, genes=selected)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%s-%s: %d cells", names.split, names.shard, manifest["n_obs"])
