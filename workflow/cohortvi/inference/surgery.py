"""A trained model with more batches and categories, of which the new ones' parameters alone may still be trained.

Architecture surgery (Lotfollahi et al. 2022, Nature Biotechnology 40:121). Every category has parameters of its own: a
row of weights in each layer that is told it (or an embedding), and, where dispersions go by batch, one for each gene.
Those of a new one begin at the mean of the known ones'; all that was there before is kept to the bit. So cells of known
batches and categories have the posteriors and likelihoods that they had.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cohortvi.inference.vae import VAE

Label = tuple[Any, ...]  # ("category", covariate, code) for what belongs to one category; others as they come


class Told(NamedTuple):
    """A tensor that depends on which categories there are: its name, and what lies along one of its dimensions."""

    name: str
    dim: int
    labels: list[Label]


def told_tensors(vae: VAE) -> dict[Label, Told]:
    """Return the tensors of a model that grow with its categories, by keys that do not depend on how many these are."""
    settings, found = vae.settings, {}
    sizes = (settings["n_batches"], *settings["n_categories"])
    kept = [(at, n) for at, n in enumerate(sizes) if n > 1]  # a covariate with one category tells nothing
    is_embedded = settings["coding"] == "embedding"

    def rows(*, is_first: bool) -> list[Label]:
        values = [("value", at) for at in range(settings["n_continuous"])] if is_first else []
        if is_embedded:
            return [*values, *(("embedded", at, k) for at, _ in kept for k in range(settings["n_embedding"]))]
        return [*values, *(("category", at, code) for at, n in kept for code in range(n))]

    networks = {"decoder": vae.decoder.hidden} | ({"encoder": vae.encoder.hidden} if vae.encode_covariates else {})
    for network, hidden in networks.items():
        for number in range(0 if hidden is None else len(hidden.layers)):
            name = f"{network}.hidden.layers.{number}.others.weight_oh"
            found["layer", network, number] = Told(name, 0, rows(is_first=number == 0))
        for number, (at, n) in enumerate(kept if is_embedded else []):
            labels = [("category", at, code) for code in range(n)]
            found["table", network, at] = Told(f"told_{network}.tables.{number}.weight", 0, labels)
    if vae.decoder.hidden is None:
        columns = [("latent", k) for k in range(vae.n_latent)] + rows(is_first=True)
        for head in ("px_scale", "zi_logits", "log_theta"):
            found["head", head] = Told(f"decoder.{head}.weight", 1, columns)
    batches = [("category", 0, code) for code in range(sizes[0])]
    if settings["dispersion"] == "gene-batch":
        found["log_theta",] = Told("log_theta", 0, batches)
    for name in ("library_loc_b", "library_scale_b"):
        found[name,] = Told(name, 0, batches)
    state = vae.state_dict()
    return {key: told for key, told in found.items() if told.name in state}


@torch.no_grad()
def extend(vae: VAE, known: VAE) -> dict[str, Tensor]:
    """Give `vae`, as it was drawn, the parameters of `known`, whose categories are the first of its own.

    Returns the parameters that belong to new categories, by name: which of their entries do, bool. A covariate of which
    `known` has one category, and so was not told it, adds 0 for that one, and begins so for others. Moments of a latent
    library, which are no parameters, begin as all else. Errors: ValueError if the two differ in more than categories.
    """
    old, new, told = known.state_dict(), vae.state_dict(), told_tensors(vae)
    before = told_tensors(known)
    sizes = (known.settings["n_batches"], *known.settings["n_categories"])
    grown = {place.name for place in told.values()}
    if {name for name in new if name not in grown} != old.keys() - {place.name for place in before.values()}:
        raise ValueError("the models differ in more than their categories; expected equal settings")
    for name in new.keys() - grown:
        new[name].copy_(old[name])
    trained, parameters = {}, dict(vae.named_parameters())
    for key, (name, dim, labels) in told.items():
        was = before.get(key, Told("", dim, []))
        places = {label: row for row, label in enumerate(was.labels)}
        values = new[name].transpose(0, dim)
        source = old[was.name].transpose(0, dim) if was.name else values[:0]
        for row, label in enumerate(labels):
            if label in places:
                values[row] = source[places[label]]
            elif label[0] == "category":
                mine = [place for other, place in places.items() if other[:2] == label[:2]]
                values[row] = source[mine].mean(0) if mine else 0.0
        is_new = torch.tensor([_is_new(label, places, sizes) for label in labels])
        if is_new.any() and name in parameters:
            shape = [-1 if at == dim else 1 for at in range(new[name].dim())]
            trained[name] = is_new.reshape(shape).expand(new[name].shape).clone()
    return trained


@torch.no_grad()
def level(vae: VAE, unseen: Collection[tuple[int, int]]) -> None:
    """Give categories that no training cell has, (covariate, code), the mean of the others' parameters and moments.

    So begin new ones in `extend`. They would else be judged by numbers that they were drawn with.
    """
    state = vae.state_dict()
    for name, dim, labels in told_tensors(vae).values():
        values = state[name].transpose(0, dim)
        for covariate in {covariate for covariate, _ in unseen}:
            rows = {label[2]: row for row, label in enumerate(labels) if label[:2] == ("category", covariate)}
            seen = [row for code, row in rows.items() if (covariate, code) not in unseen]
            for code, row in rows.items():
                if (covariate, code) in unseen:
                    values[row] = values[seen].mean(0)


def _is_new(label: Label, places: dict[Label, int], sizes: tuple[int, ...]) -> bool:
    """Whether what bears this label is of no category of the old model, whose covariates have so many."""
    if label[0] == "category":
        return label[2] >= sizes[label[1]]
    return label[0] == "embedded" and label not in places
