"""The state of a training run: everything that a step or an epoch changes, and nothing else; a checkpoint is a Run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cohortvi.inference.adam import Adam
from cohortvi.inference.checkpoint import Tensors
from cohortvi.inference.fused_elbo import FusedElbo
from cohortvi.inference.terms import Terms
from cohortvi.inference.vae import VAE
from cohortvi.store.loader import Loader, Minibatch

PLAIN = ("step", "sums", "history", "best_elbo", "best_epoch", "anchor", "waited", "finished", "elbo_before")
SUMS = ("cells", "loss", "reconstruction", "kl", "seconds", "waiting_seconds")
HISTORY = (  # columns; ELBO terms in nats per cell; those of the last line alone differ between equal runs
    *("epoch", "step", "train_loss", "train_reconstruction", "train_kl", "kl_weight", "learning_rate"),
    *("validation_elbo", "validation_reconstruction", "validation_kl"),
    *("cells_per_second", "seconds", "waiting_seconds", "peak_memory_mb"),
)


@dataclass
class Run:
    """Where training stands. Between two steps it is consistent, and `tensors` with `facts` restore it exactly."""

    vae: VAE
    optimizer: Adam
    loader: Loader
    terms: Terms  # of steps that `sums` does not hold yet: none where a checkpoint is made
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))  # over the epoch under way
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each finished epoch
    best_elbo: float | None = None  # validation ELBO of best_weights, nats per cell
    best_epoch: int | None = None
    best_weights: Tensors = field(default_factory=dict)
    anchor: float | None = None  # the ELBO that early stopping wants bettered by min_delta
    waited: int = 0  # epochs since it was
    finished: bool = False
    elbo_before: float | None = None  # validation ELBO of a mapped model before its first step
    fused: FusedElbo | None = None  # the loss of a plain model, which makes its gradients itself
    graphed: Any = None  # the step as a CUDA graph (graph.py), if it is one

    def minibatches(self) -> Iterator[Minibatch]:
        """Yield what is left of the epoch under way (nothing if only its validation is); time it."""
        if self.loader.state_dict()["epoch"] > len(self.history):
            return
        began = time.monotonic()
        for minibatch in self.loader:
            self.sums["waiting_seconds"] += time.monotonic() - began
            yield minibatch
            now = time.monotonic()
            self.sums["seconds"] += now - began
            began = now
        self.terms.settle(self.sums)
        self.sums["seconds"] += time.monotonic() - began

    def judge(self, elbo: float, patience: int, min_delta: float) -> bool:
        """Keep the weights if no epoch was better; return whether `patience` epochs have not gained `min_delta`.

        `elbo` is the validation ELBO of the epoch just ended. Only for epochs that end with KL weight 1.
        """
        if self.best_elbo is None or elbo > self.best_elbo:
            self.best_elbo, self.best_epoch = elbo, len(self.history)
            self.best_weights = {name: value.clone() for name, value in self.vae.state_dict().items()}
        if self.anchor is None or elbo > self.anchor + min_delta:
            self.anchor, self.waited = elbo, 0
        else:
            self.waited += 1
        return self.waited >= patience

    def judge_reference(self, validation: dict[str, float], *, is_trained: bool) -> None:
        """Take the weights that a mapped model begins with as the best so far; if nothing is trained, as the last."""
        self.elbo_before = self.best_elbo = self.anchor = validation["elbo"]
        self.best_epoch, self.finished = 0, not is_trained
        self.best_weights = {name: value.clone() for name, value in self.vae.state_dict().items()}
        if not is_trained:
            terms = {f"validation_{name}": value for name, value in validation.items()}
            self.history = [dict.fromkeys(HISTORY) | {"epoch": 0, "step": 0, "kl_weight": 1.0} | terms]

    def tensors(self) -> Tensors:
        """Return the tensors of a checkpoint: model.*, best.* by their names, adam.* by those of the parameters."""
        found = {f"model.{name}": value for name, value in self.vae.state_dict().items()}
        found |= {f"best.{name}": value for name, value in self.best_weights.items()}
        return found | {f"adam.{name}": value for name, value in self.optimizer.tensors().items()}

    def facts(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, JSON-able."""
        return {name: getattr(self, name) for name in PLAIN} | {"loader": self.loader.state_dict()}

    def restore(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Become the run that `tensors` and `facts` were taken of."""
        for name in PLAIN:
            setattr(self, name, facts[name])
        self.loader.load_state_dict(facts["loader"])
        self.vae.load_state_dict(_under("model.", tensors))
        device = next(self.vae.parameters()).device
        self.best_weights = {name: value.to(device) for name, value in _under("best.", tensors).items()}
        self.optimizer.restore(_under("adam.", tensors))


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
