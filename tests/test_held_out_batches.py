"""Batches and categories that are held out as a whole: they are judged at the mean of those that were trained."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_cohort
import torch
from tiny_cohort import MODEL, manifests
from torch import Tensor

from cohortvi.config import Store, Validation
from cohortvi.inference.train import fit
from cohortvi.inference.vae import VAE
from cohortvi.store.sharded import ShardedCounts

DONORS = {"donor": {f"s{i}": f"donor{i}" for i in range(4)}}
BY_SAMPLE = Store(shards=2, validation=Validation(fraction=0.25, by="sample"), reshuffle=0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, list[bool]]:
    """Four samples, each a batch and a donor of its own, and which of them are held out."""
    folder = tmp_path_factory.mktemp("cohort")
    samples = {f"s{i}": tiny_cohort.simulate(120, seed=i) for i in range(4)}
    tiny_cohort.write_samples(folder, samples, store=BY_SAMPLE)
    store = ShardedCounts(manifests(folder, "train"))
    codes = np.concatenate([shard.column("sample", 0, shard.n_obs) for shard in store.stores])
    held_out = [code not in codes for code in range(4)]
    assert 0 < sum(held_out) < 4
    return folder, held_out


def train(folder: Path, checkpoints: Path, **changes) -> tuple[VAE, float]:
    model = dataclasses.replace(MODEL, **{"max_epochs": 10, "categorical_covariates": ("donor",)} | changes)
    splits = manifests(folder, "train"), manifests(folder, "validation")
    vae, _, facts = fit(*splits, model, sheet=DONORS, seed=0, checkpoints=checkpoints, threads=1)
    return vae, facts["best_validation_elbo"]


def by_batch(vae: VAE, kind: str) -> list[Tensor]:
    """Return what a model holds of each batch, (b, ...), and of each donor."""
    if kind == "one-hot":
        rows = [network.hidden.layers[0].others.weight_oh[1:] for network in (vae.encoder, vae.decoder)]  # after age
        return [part for weight in rows for part in (weight[:4], weight[4:])]
    if kind == "embedding":
        return [table.weight for told in (vae.told_encoder, vae.told_decoder) for table in told.tables]
    if kind == "linear":
        return list(vae.decoder.px_scale.weight.T[MODEL.n_latent + 1 :].split(4))
    return [vae.log_theta] if kind == "gene-batch" else [vae.library_loc_b[:, None], vae.library_scale_b[:, None]]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("one-hot", {"encode_covariates": True}),
        ("embedding", {"coding": "embedding", "encode_covariates": True}),
        ("linear", {"decoder": "linear"}),
        ("gene-batch", {"dispersion": "gene-batch"}),
        ("latent", {"library": "latent"}),
    ],
)
def test_what_was_held_out_as_a_whole_stands_at_the_mean_of_the_others(cohort, tmp_path, kind, changes):
    folder, held_out = cohort
    vae, _ = train(folder, tmp_path, **changes)
    found = by_batch(vae, kind)
    assert found
    is_held_out = torch.tensor(held_out)
    for values in found:
        assert len(values) == 4
        assert len(values[~is_held_out].unique(dim=0)) == int((~is_held_out).sum())
        mean = values[~is_held_out].mean(0)
        torch.testing.assert_close(values[is_held_out], mean.expand_as(values[is_held_out]))


def test_a_latent_library_does_not_take_held_out_cells_for_empty_ones(cohort, tmp_path):
    elbo = [train(cohort[0], tmp_path / kind, library=kind)[1] for kind in ("observed", "latent")]
    assert abs(elbo[1] - elbo[0]) < 15  # nats: a library in doubt costs a few; one of a single UMI some 250
