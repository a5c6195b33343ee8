"""Rule shard: the counts stores of all samples -> one shard of shuffled training or validation cells."""

from cohortvi import log
from cohortvi.config import Store, build
from cohortvi.files import write_json
from cohortvi.store.shards import write_shard

log.start(snakemake.log[0])
found, params, names = snakemake.input, snakemake.params, snakemake.wildcards
store = build(Store, params.config)
manifest = write_shard(
    found.counts, names.split, int(names.shard), snakemake.output.store, seed=params.seed, store=store
)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%s-%s: %d cells", names.split, names.shard, manifest["n_obs"])
