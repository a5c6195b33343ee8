"""Several processes that train one model together: each takes its part of every minibatch.

What a step does is a function of the minibatch of all ranks: sums go over all of them (gradients, batch statistics,
terms), and random numbers are drawn for the whole minibatch, of which each rank uses its part. So a run may go on with
another number of ranks. Started by torchrun, which sets RANK, WORLD_SIZE and the address to meet at; alone otherwise.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Part(NamedTuple):
    """The rows of the minibatch of all ranks that this one has."""

    start: int
    stop: int
    n: int  # of all ranks


_part: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other ranks, if torchrun started this process, and part at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def within(part: Part) -> Iterator[None]:
    """Let `whole` and `own` speak of this part of a minibatch."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def whole(n: int) -> int:
    """Return how many rows the minibatch of all ranks has, of which n are here."""
    part = _part.get()
    return n if part is None else part.n


def own(values: Tensor, dim: int = 0) -> Tensor:
    """Return this rank's part of values that were drawn for the minibatch of all ranks."""
    part = _part.get()
    return values if part is None else values.narrow(dim, part.start, part.stop - part.start)


def total(values: Sequence[float]) -> list[float]:
    """Return the sums over ranks, in double precision."""
    if world() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(summed)
    return summed.tolist()


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in one go."""
    if world() == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def wait() -> None:
    """Go on when all ranks are here."""
    if world() > 1:
        total([0.0])


class Sum(Function):
    """The sum of a tensor over ranks, differentiable: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the sum."""
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        summed = upstream.contiguous().clone()
        dist.all_reduce(summed)
        return summed


class BatchNorm(torch.nn.BatchNorm1d):
    """Batch norm over the minibatch of all ranks (Ioffe, Szegedy 2015), on any device; alone it is torch's."""

    def forward(self, h_nh: Tensor) -> Tensor:
        """Return (n, h), normalised."""
        if world() == 1 or not self.training:
            return super().forward(h_nh)
        n = whole(len(h_nh))
        mean_h = Sum.apply(h_nh.sum(0)) / n
        away_nh = h_nh - mean_h
        variance_h = Sum.apply(away_nh.square().sum(0)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean_h, self.momentum)
            self.running_var.lerp_(variance_h * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        return away_nh * (variance_h + self.eps).rsqrt() * self.weight + self.bias


def _device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
