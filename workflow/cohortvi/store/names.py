"""The names of the shards, known from the config alone, so that the workflow knows its files before it runs."""

from cohortvi.config import Store


def shard_names(store: Store) -> list[str]:
    """Return train-0000 ... and validation-0000 ...: as many validation shards as their share of the cells asks for."""
    n_validation = max(1, round(store.shards * store.validation.fraction))
    return [f"train-{i:04d}" for i in range(store.shards)] + [f"validation-{i:04d}" for i in range(n_validation)]
