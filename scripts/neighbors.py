"""Rule neighbors: latent means -> graph of nearest neighbours."""

from cohortvi import log
from cohortvi.atlas.embed import open_latent
from cohortvi.atlas.neighbors import neighbor_graph, write_graph
from cohortvi.files import write_json

log.start(snakemake.log[0])
latent = open_latent(snakemake.input.latent)
graph = neighbor_graph(latent.mean_nk, latent.names, snakemake.params.config["n_neighbors"], snakemake.params.seed)
write_graph(graph, snakemake.output.store)
write_json({"n_obs": graph.n_obs, "n_edges": int(graph.obsp["distances"].nnz)}, snakemake.output.manifest)
log.logger.info("%d cells, %d edges", graph.n_obs, graph.obsp["distances"].nnz)
