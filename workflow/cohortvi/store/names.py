"""The shards of a cohort, known from config and sheet alone, so that the workflow knows its files before it runs.

Samples that came later may be shuffled among themselves, into shards of their own, a generation, while the shards that
were there stay as they are.
"""

from collections.abc import Mapping
from typing import NamedTuple

from cohortvi.config import Store

SPLITS = ("train", "validation")


class Generation(NamedTuple):
    """Samples that are shuffled together, and the names of the shards that hold them, by split."""

    samples: tuple[str, ...]
    shards: dict[str, tuple[str, ...]]


def n_shards(split: str, store: Store) -> int:
    """Return the number of shards of a split: as many for validation as their share of the cells asks for."""
    return store.shards if split == "train" else max(1, round(store.shards * store.validation.fraction))


def generations(store: Store, came: Mapping[str, int]) -> list[Generation]:
    """Return the generations of a cohort, the first one first, given when each sample came.

    They are one if the later ones have more samples than `store.reshuffle` times those of the first. Later ones have as
    many shards as their share of samples asks for; numbers go on from generation to generation.
    """
    numbers = sorted(set(came.values()))
    members = [tuple(name for name in came if came[name] == number) for number in numbers]
    if sum(map(len, members[1:])) > store.reshuffle * len(members[0]):
        members = [tuple(came)]
    made, ends = [], dict.fromkeys(SPLITS, 0)
    for samples in members:
        own = of_generation(store, len(samples) / len(members[0]))
        shards = {
            split: tuple(f"{split}-{ends[split] + i:04d}" for i in range(n_shards(split, own))) for split in SPLITS
        }
        made.append(Generation(samples, shards))
        ends = {split: ends[split] + len(shards[split]) for split in SPLITS}
    return made


def up_to(made: list[Generation], split: str, shard: str) -> list[Generation]:
    """Return the generations up to the one that a shard belongs to."""
    holds = [f"{split}-{shard}" in generation.shards[split] for generation in made]
    return made[: holds.index(True) + 1]


def of_generation(store: Store, share: float) -> Store:
    """Return the settings of a generation that has this share of the first one's samples."""
    return Store(max(1, round(store.shards * share)), store.validation, store.reshuffle)


def shard_names(store: Store) -> list[str]:
    """Return the names of the shards of a cohort of one generation: train-0000 ... and validation-0000 ..."""
    return [f"{split}-{i:04d}" for split in SPLITS for i in range(n_shards(split, store))]
