"""A step as a CUDA graph: captured once, with all its kernels, and replayed, which costs one launch.

What changes with the step lies in static memory that is written anew before each replay: counts, covariates, KL weight,
learning rate. Random numbers follow from the seed that torch's generator has at the replay, as without a graph.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cohortvi.config import Model
from cohortvi.inference import ranks
from cohortvi.inference.prepare import Setup
from cohortvi.inference.run import Run
from cohortvi.inference.step import Inputs, take
from cohortvi.store.batches import Csr

WARM_UP = 3  # steps taken without a graph first: kernels are compiled, libraries take their memory
ROOM = 1.125  # of entries, beyond those of the minibatch that it is made for


def can_capture(model: Model, device: torch.device) -> bool:
    """Whether a step of this model has nothing that looks at the device, or needs other processes."""
    is_fused = model.likelihood == "poisson" or model.dispersion in ("gene", "gene-batch")
    return model.graph and device.type == "cuda" and ranks.world() == 1 and is_fused and model.draws == 1


def graphed_step(setup: Setup, run: Run) -> "GraphedStep":
    """Return the step of a run, for minibatches that are whole."""
    n_obs = setup.model.batch_size
    return GraphedStep(partial(take, setup, run, ranks.Part(0, n_obs, n_obs)), n_obs, setup.device)


class GraphedStep:
    """Takes steps of minibatches of one size; on a CPU the same, of the same memory, without a graph."""

    def __init__(self, step: Callable[[Inputs], Tensor], n_obs: int, device: torch.device):
        """`step` returns the sums of its terms, on the device, and looks at nothing there."""
        self.step, self.n_obs = step, n_obs
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.static: Inputs | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.taken = 0  # steps since the static memory was made

    def takes(self, inputs: Inputs) -> bool:
        """Whether a minibatch has the right number of cells."""
        return len(inputs.covariates.batch_n) == self.n_obs

    def __call__(self, inputs: Inputs) -> Tensor:
        """Take a step; return the sums of its terms. Errors: RuntimeError if it can't be captured."""
        if self.static is None or len(self.static.x.data) < len(inputs.x.data):
            self.static, self.graph, self.taken = _static(inputs), None, 0
        _fill(self.static, inputs)
        self.taken += 1
        if self.stream is None:
            return self.step(self.static)
        if self.taken <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                sums = self.step(self.static)
            torch.cuda.current_stream().wait_stream(self.stream)
            return sums
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.sums.clone()

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Threads that read may go on meanwhile, and take pinned memory.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.sums = self.step(self.static)
        except RuntimeError as error:
            error.add_note("The step could not be captured as a CUDA graph: set models.*.graph: false.")
            raise


def _static(inputs: Inputs) -> Inputs:
    """Return memory for inputs of as many cells, and some more entries."""
    indptr, *entries, n_vars = inputs.x
    room = [values.new_empty(int(len(values) * ROOM)) for values in entries]
    # A GPU's Adam takes a rate in single precision, a CPU's one as exact as Python's.
    rate = torch.zeros((), device=indptr.device, dtype=torch.float32 if indptr.is_cuda else torch.float64)
    static = inputs.each(torch.empty_like)
    x = Csr(static.x.indptr, *room, n_vars)
    return static._replace(x=x, kl_weight=torch.zeros((), device=indptr.device), learning_rate=rate)


def _fill(static: Inputs, inputs: Inputs) -> None:
    for to, values in zip(static.tensors(), inputs.tensors(), strict=True):
        to[: len(values)].copy_(values)
    static.kl_weight.fill_(inputs.kl_weight)
    static.learning_rate.fill_(inputs.learning_rate)
