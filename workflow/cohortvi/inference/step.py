"""A step of training, as a function of what lies on the device: a GPU can replay it (graph.py)."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cohortvi.inference import ranks
from cohortvi.inference.device import counts_of
from cohortvi.inference.networks import Covariates
from cohortvi.inference.objective import Elbo, elbo, iwelbo
from cohortvi.inference.prepare import Setup
from cohortvi.inference.run import Run
from cohortvi.store.batches import Counts, Csr
from cohortvi.store.loader import Loader, Minibatch


class Inputs(NamedTuple):
    """What a step is made of: counts as loaders give them and covariates, on the device; what changes with the step."""

    x: Counts
    covariates: Covariates
    kl_weight: float | Tensor
    learning_rate: float | Tensor = 0.0

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the same with counts and covariates changed."""
        x = Csr(*map(change, self.x[:3]), self.x.n_vars) if isinstance(self.x, Csr) else change(self.x)
        return self._replace(x=x, covariates=self.covariates.each(change))

    def tensors(self) -> list[Tensor]:
        """Return the tensors that `each` changes, in a fixed order."""
        found: list[Tensor] = []
        self.each(lambda values: found.append(values) or values)
        return found


def part_of(loader: Loader) -> ranks.Part:
    """Return which rows of the minibatch of all ranks the loader's last one has."""
    return ranks.Part(*loader.part())


def inputs_of(setup: Setup, minibatch: Minibatch, kl_weight: float, learning_rate: float = 0.0) -> Inputs:
    """Return a minibatch on the device. On a GPU its own memory may be written anew at once: copies have ended.

    They wait for no kernel, being on a stream of their own, so that the GPU goes on with the step before.
    """
    given, device = Inputs(minibatch.x_ng, setup.covariates(minibatch.obs), kl_weight, learning_rate), setup.device
    if device.type == "cpu":
        return given
    with torch.cuda.stream(_copies(device)):
        inputs = given.each(lambda values: values.to(device, non_blocking=True))
    _copies(device).synchronize()
    for values in inputs.tensors():
        values.record_stream(torch.cuda.current_stream(device))  # or the next copy might get memory that is still read
    return inputs


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def evaluate(setup: Setup, run: Run, inputs: Inputs, part: ranks.Part, *, is_training: bool) -> tuple[Elbo, Tensor]:
    """Return the ELBO of a minibatch, and the sums of its terms, (3,), in float64. Noise is torch's generators'.

    In training the loss is that of the labels too, and of a prior far from N(0, I). In validation it is the bound on
    log p(x): what labels the cells have is not looked at.
    """
    covariates, draws, options = inputs.covariates, setup.model.draws, {"kl_weight": inputs.kl_weight}
    if not is_training:
        draws, covariates = 1, covariates._replace(label_n=None)
    elif setup.model.labels:
        options["label_weight"] = setup.model.labels.weight
    x = counts_of(inputs.x, setup.model.precision)
    with ranks.within(part):
        whole_snk = torch.randn(draws, part.n, run.vae.n_dimensions, device=setup.device)
        noise_snk = ranks.own(whole_snk, dim=1)
        if is_training and run.fused:
            terms = run.fused(x, covariates, noise_snk[0], kl_weight=inputs.kl_weight)
        elif draws == 1:
            terms = elbo(run.vae, x, covariates, noise_snk[0], **options)
        else:
            terms = iwelbo(run.vae, x, covariates, noise_snk, **options)
        if is_training and setup.model.prior_shrinkage and setup.model.prior != "standard_normal":
            shrinkage = setup.model.prior_shrinkage * run.vae.prior_divergence(whole_snk[0])
            terms = terms._replace(loss_n=terms.loss_n + shrinkage)
    # In float64, because an epoch's sum over float32 would depend on its length.
    return terms, torch.stack(terms).detach().double().sum(1)


def descend(setup: Setup, run: Run, terms: Elbo, part: ranks.Part, learning_rate: float | Tensor) -> None:
    """Move the weights down the gradient of a minibatch's mean loss."""
    if not run.fused:
        run.optimizer.zero_grad()
        (terms.loss_n.sum() / part.n).backward()
        ranks.sum_gradients(run.optimizer.parameters)
    run.optimizer.step(learning_rate, clip=setup.model.clip)


def take(setup: Setup, run: Run, part: ranks.Part, inputs: Inputs) -> Tensor:
    """Take a step; return the sums of its terms, (3,). Nothing looks at the device."""
    terms, sums = evaluate(setup, run, inputs, part, is_training=True)
    descend(setup, run, terms, part, inputs.learning_rate)
    return sums
