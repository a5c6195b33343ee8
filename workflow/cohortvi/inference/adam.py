"""The optimiser: Adam (Kingma, Ba 2015, algorithm 1) with L2 weight decay, in one call of torch's fused kernel.

The same numbers as torch.optim.Adam(fused=True), whose bookkeeping takes as long as a small step itself.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

BETAS = 0.9, 0.999  # decay of the moments


class Adam:
    """Moments of named parameters, and the step that takes their gradients. All on one device, of one type."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float,
        eps: float,
        only: Mapping[str, Tensor] | None = None,
    ):
        """`only`: of the parameters of these names, the entries that move, bool; all others keep their values."""
        given = dict(named)
        self.names, self.parameters = tuple(given), tuple(given.values())
        still = {name: ~moves.to(given[name].device) for name, moves in (only or {}).items()}
        self.still = [(given[name], fixed, given[name].detach().clone()) for name, fixed in still.items()]
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.count = torch.zeros((), device=self.first[0].device if self.first else None)
        self.weight_decay, self.eps = weight_decay, eps

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, clip: float | None = None) -> None:
        """Move the parameters down their gradients. Errors: TypeError if one has none.

        `learning_rate`: a scalar, as a tensor where a graph of the step is to be replayed at other rates.
        `clip`: the most that the norm of all gradients may be; longer ones are shortened to it (Pascanu, Mikolov,
        Bengio 2013, algorithm 1).
        """
        for parameter, fixed, _ in self.still:
            parameter.grad.masked_fill_(fixed, 0.0)
        self.count += 1
        grads = [parameter.grad for parameter in self.parameters]
        excess = None
        if clip is not None:
            norms = torch.stack(torch._foreach_norm(grads))  # get_total_norm sorts them by type first
            excess = (torch.linalg.vector_norm(norms) / clip).clamp(min=1.0)
        torch._fused_adam_(
            *([_as_it_lies(tensor) for tensor in part] for part in (self.parameters, grads, self.first, self.second)),
            [],
            [self.count] * len(grads),
            lr=learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=excess,
        )
        for parameter, fixed, values in self.still:
            parameter.copy_(torch.where(fixed, values, parameter))  # weight decay has moved them

    def tensors(self) -> dict[str, Tensor]:
        """Return all of its state, by parameter: NAME.exp_avg, NAME.exp_avg_sq; and `step`."""
        found = {"step": self.count}
        for name, first, second in zip(self.names, self.first, self.second, strict=True):
            found |= {f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what `tensors` was taken of. Errors: KeyError if it was of other parameters."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def _as_it_lies(tensor: Tensor) -> Tensor:
    """Return a matrix whose columns lie together as its transpose, of which the kernel makes no copy."""
    return tensor if tensor.is_contiguous() else tensor.T
