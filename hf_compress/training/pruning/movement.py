"""Movement pruning: scores that rise while training moves a weight away from zero (Sanh et al., arXiv:2005.07683).

The forward pass uses W ⊙ M(S). A score's gradient is that of its mask, straight through the top-k: ∂L/∂S = ∂L/∂(W ⊙ M)
⊙ W (section 3). A weight's gradient is ∂L/∂(W ⊙ M) ⊙ M. The parameter itself is W ⊙ M here, so its gradient is
∂L/∂(W ⊙ M) with nothing in the forward pass changed, for layers of any kind and compiled ones; the values of pruned
weights are held aside, and come back when their score does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from ...core.errors import ResumeError
from .config import PruningConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""


class Scores:
    """The scores of all weights, their optimizer, and the values of weights that are pruned for now.

    Args:
        parameters: Weights by name, before anything is pruned.
        config: The configuration.

    Attributes:
        values: float32 scores by name, of the weights' shapes.
        held: Values of pruned weights by name, of the weights' shapes and types; 0 where a weight is not pruned.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: PruningConfig) -> None:
        start = _relative if config.initial_scores == "magnitude" else _zero
        self.values = {name: nn.Parameter(start(value.detach())) for name, value in parameters.items()}
        self.held = {name: torch.zeros_like(value.detach()) for name, value in parameters.items()}
        self._room = {name: torch.empty_like(value) for name, value in self.values.items()}  # spares page faults
        self._optimizer = torch.optim.Adam(self.values.values(), lr=config.score_learning_rate, fused=True)

    @torch.no_grad()
    def take(self, name: str, parameter: Tensor, keep: Tensor | None) -> None:
        """Take the gradient of a weight's scores from that of W ⊙ M, before it is masked or clipped.

        A layer that is used several times under reentrant gradient checkpointing gets its gradient in parts. After
        each the gradient is masked: where a weight is pruned it then holds the next part alone, elsewhere the sum.

        Args:
            name: The weight.
            parameter: It, with its gradient of the whole step, or up to one of these parts.
            keep: Its mask, 0 where it is pruned; None where nothing is.
        """
        if parameter.grad is None:
            return
        earlier = self.values[name].grad
        parts = None if earlier is None or keep is None else earlier * (keep == 0)
        dense = torch.add(parameter.detach(), self.held[name], out=self._room[name])  # exact: one of them is zero
        taken = dense.mul_(parameter.grad)
        self.values[name].grad = taken if parts is None else taken.add_(parts)

    def is_taken(self, name: str) -> bool:
        """Whether a weight's scores have their gradient for this step."""
        return self.values[name].grad is not None

    def step(self) -> None:
        """Move the scores: the mean of the gradients of all processes, then Adam."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            for value in self.values.values():
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                distributed.all_reduce(value.grad)
                value.grad.div_(distributed.get_world_size())
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def exchange(self, name: str, parameter: Tensor, keep: Tensor) -> None:
        """Prune and bring back, as a new mask says.

        Args:
            name: The weight.
            parameter: It, masked by the mask before.
            keep: The new mask, boolean, of its shape.
        """
        dense = parameter.detach() + self.held[name]  # one of them is zero
        parameter.copy_(torch.where(keep, dense, 0))
        self.held[name] = torch.where(keep, 0, dense)

    @torch.no_grad()
    def give_back(self, name: str, parameter: Tensor) -> None:
        """Put the values that are held aside back where a weight still is zero."""
        parameter.copy_(torch.where(parameter == 0, self.held[name], parameter))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must keep, as `NAME.score`, `NAME.held` and `NAME.` with Adam's names.

        What has had no gradient yet has moments of 0, from which Adam starts as it does from none.
        """
        made = {f"{name}.score": value.detach() for name, value in self.values.items()}
        made |= {f"{name}.held": value for name, value in self.held.items()}
        for name, value in self.values.items():
            kept = self._optimizer.state.get(value, {})
            fresh = {key: torch.zeros_like(_like(key, value)) for key in _STATE if key not in kept}
            made |= {f"{name}.{key}": ({**kept, **fresh})[key].detach() for key in _STATE}
        return made

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint holds.

        Args:
            tensors: What `tensors` has given.

        Raises:
            ResumeError: Something is missing or has another shape or type.
        """
        states = {}
        for index, (name, value) in enumerate(self.values.items()):
            value.copy_(_fitting(tensors, f"{name}.score", value))
            self.held[name].copy_(_fitting(tensors, f"{name}.held", self.held[name]))
            states[index] = {key: _fitting(tensors, f"{name}.{key}", _like(key, value)) for key in _STATE}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})


def _like(key: str, value: Tensor) -> Tensor:
    """A tensor of the form of what Adam keeps: a scalar that counts steps, or a moment of each score."""
    return value.detach().new_zeros(()) if key == "step" else value.detach()


def _fitting(tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A tensor of a checkpoint, of the shape and type of another.

    Raises:
        ResumeError: It is missing or of another form.
    """
    found = tensors.get(key)
    if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
        seen = "is missing" if found is None else f"has the form {tuple(found.shape)} {found.dtype}"
        raise ResumeError(
            f"The checkpoint's {key} of movement pruning {seen}, expected {tuple(like.shape)} {like.dtype}.",
            "resume from a checkpoint of the same run",
        )
    return found


def _relative(value: Tensor) -> Tensor:
    """Magnitudes over their root mean square, in float32."""
    wide = value.float().abs()
    mean = torch.linalg.vector_norm(wide) / wide.numel() ** 0.5
    return wide / mean.clamp_min(torch.finfo(torch.float32).tiny)


def _zero(value: Tensor) -> Tensor:
    """Zeros, in float32."""
    return torch.zeros_like(value, dtype=torch.float32)
