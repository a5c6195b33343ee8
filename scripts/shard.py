"""Rule shard: counts of a generation's samples, selected genes -> a shard of them, shuffled."""

from cohortvi import log
from cohortvi.config import Store
from cohortvi.files import read_table, write_json
from cohortvi.store.shards import write_shard
from cohortvi.typed import build

log.start(snakemake.log[0])
found, params, names = snakemake.input, snakemake.params, snakemake.wildcards
genes = read_table(found.genes)
selected = genes.loc[genes["highly_variable"], ["symbol"]]
settings = {"seed": params.seed, "store": build(Store, params.config), "genes": selected, "earlier": found.earlier}
manifest = write_shard(found.counts, names.split, params.number, snakemake.output.store, **settings)
write_json(manifest, snakemake.output.manifest)
log.logger.info("%s-%s: %d cells", names.split, names.shard, manifest["n_obs"])
