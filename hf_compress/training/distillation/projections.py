"""Projections from a student's width to a teacher's: trained beside the student, never saved with it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...core.errors import ResumeError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_BETAS = (0.9, 0.999)


class Projections:
    """Linear layers that are made when they are first asked for, with an optimizer of their own.

    The Trainer's optimizer can't take them: it is made before the widths are known, clips and clears only gradients of
    the model's parameters, and DDP averages no others. So `step` is to be called in `on_pre_optimizer_step`, with the
    learning rate of the Trainer's optimizer; `tensors` go into a checkpoint's state file, from which `load` resumes
    bit by bit. AdamW without weight decay (Loshchilov and Hutter, arXiv:1711.05101).

    Args:
        seed: Of the initial values, which depend on nothing else but their name.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._layers: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.AdamW | None = None

    def get(self, name: str, inputs: int, outputs: int, device: torch.device) -> nn.Linear:
        """A projection, float32.

        Args:
            name: Its name.
            inputs: The student's width.
            outputs: The teacher's width.
            device: Where it is needed.

        Raises:
            ResumeError: It was resumed with other widths.
        """
        if name not in self._layers:
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            bound = inputs**-0.5
            weight = (2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound
            self._add(name, weight, torch.zeros(outputs), device)
        found = self._layers[name]
        if (found.in_features, found.out_features) != (inputs, outputs):
            raise ResumeError(
                f"Projection {name} of the checkpoint goes from {found.in_features} features to {found.out_features}, "
                f"but the student has {inputs} and the teacher {outputs}.",
                "resume with the student and the teacher of the run",
            )
        if found.weight.device != device:
            self._move(device)
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights and biases, in order of their names."""
        for name in sorted(self._layers):
            yield from self._layers[name].parameters()

    def step(self, learning_rate: float, scale: float = 1.0) -> None:
        """Take an optimizer step with the gradients that were accumulated, averaged over all processes.

        Args:
            learning_rate: Of this step.
            scale: What mixed precision has multiplied the loss with; a step whose gradients overflowed then is left
                out, as the Trainer's own is.
        """
        own = list(self.parameters())
        if self._optimizer is None or all(parameter.grad is None for parameter in own):
            return
        average(own)
        for parameter in own:
            if parameter.grad is not None:
                parameter.grad.div_(scale)
        if scale == 1.0 or all(bool(torch.isfinite(one.grad).all()) for one in own if one.grad is not None):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Values and moments, for a checkpoint."""
        made: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            for kind, parameter in layer.named_parameters():
                made[f"{name}.{kind}"] = parameter.detach()
                state = self._optimizer.state[parameter] if self._optimizer else {}
                made |= {f"{name}.{kind}.{moment}": state[moment] for moment in _MOMENTS if moment in state}
        return made

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what a checkpoint holds; what is there already is dropped.

        Args:
            tensors: What `tensors` gave.
            device: Where the student is.

        Raises:
            ResumeError: A part is missing.
        """
        self._layers, self._optimizer = {}, None
        for name in sorted(key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
            if f"{name}.bias" not in tensors:
                raise ResumeError(f"The checkpoint lacks {name}.bias.", "resume from another checkpoint")
            self._add(name, tensors[f"{name}.weight"].clone(), tensors[f"{name}.bias"].clone(), device)
            for kind, parameter in self._layers[name].named_parameters():
                moments = {moment: tensors.get(f"{name}.{kind}.{moment}") for moment in _MOMENTS}
                state = {moment: value.clone() for moment, value in moments.items() if value is not None}
                if state and self._optimizer is not None:
                    self._optimizer.state[parameter] = state
        self._move(device)

    def _add(self, name: str, weight: Tensor, bias: Tensor, device: torch.device) -> None:
        """Add a projection of these values, and give it to the optimizer."""
        outputs, inputs = weight.shape
        layer = nn.Linear(inputs, outputs, device="meta")  # draws nothing
        layer.weight, layer.bias = nn.Parameter(weight.to(device)), nn.Parameter(bias.to(device))
        self._layers[name] = layer
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, betas=_BETAS, weight_decay=0.0)
        else:
            self._optimizer.add_param_group({"params": list(layer.parameters())})

    def _move(self, device: torch.device) -> None:
        """Put values and moments on a device; the parameters stay the same objects."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)
            state = self._optimizer.state[parameter] if self._optimizer else {}
            for moment in _MOMENTS[:2]:  # AdamW keeps its count of steps on the CPU
                if moment in state:
                    state[moment] = state[moment].to(device)


def average(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all processes, as DDP does for those of the model."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(torch.distributed.get_world_size())
