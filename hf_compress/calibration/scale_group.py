"""Channel scales that leave a block's function as it is: who is divided, who is multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .block import Block


@dataclass(frozen=True)
class Part:
    """Some rows or columns of a parameter that belong to the channels of a group.

    Attributes:
        name: The parameter's name in the block.
        transposed: Whether it has rows and columns swapped.
        index: Of a consumer, the channel of each column; of a producer, the row of each channel (int64). None where
            they are the same.
    """

    name: str
    transposed: bool = False
    index: Tensor | None = None

    def view(self, module: nn.Module) -> Tensor:
        """The parameter in canonical orientation, sharing its memory: … × rows × columns."""
        value = module.get_parameter(self.name).data
        return value.transpose(-1, -2) if self.transposed else value


@dataclass(frozen=True)
class ScaleGroup:
    """Channels between one producer and everything that reads them.

    Dividing the producer and multiplying the consumers by the same positive scales leaves the block's output as it
    is; that was measured, not assumed.

    Attributes:
        producer: A norm's weight, or rows of a linear layer or of fused experts.
        offset: Of a norm, what its forward adds to the weight (1 for norms that multiply by 1 + weight), else None.
        biases: Parameters that are divided with it, by the same channels.
        consumers: Weights whose columns are multiplied.
        shape: Shape of the scales: channels, or experts × channels.
    """

    producer: Part
    offset: float | None
    biases: tuple[str, ...]
    consumers: tuple[Part, ...]
    shape: tuple[int, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the block of all parameters that scales change."""
        return (self.producer.name, *self.biases, *(part.name for part in self.consumers))

    def columns(self, part: Part, scales: Tensor) -> Tensor:
        """The scale of each column of a consumer: columns, or experts × columns."""
        return scales if part.index is None else scales.index_select(-1, part.index.to(scales.device))

    def __str__(self) -> str:
        return f"{self.producer.name} -> {', '.join(part.name for part in self.consumers)}"


@dataclass(frozen=True)
class Rejected:
    """Channels that looked as if they could be scaled.

    Attributes:
        producer: Name of the producer's parameter in the block.
        consumers: Names of the weights that read it.
        reason: What was measured.
    """

    producer: str
    consumers: tuple[str, ...]
    reason: str


@dataclass
class Survey:
    """What was found in a block.

    Attributes:
        groups: Groups that leave its output as it is.
        rejected: Candidates that don't.
    """

    groups: list[ScaleGroup] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@torch.no_grad()
def scale(module: nn.Module, group: ScaleGroup, scales: Tensor) -> Tensor:
    """Divide a group's producer by positive scales and multiply its consumers, in place.

    A norm's weight is rounded to its data type first and the consumers take the ratio that was really stored, so
    that rounding of norms that multiply by 1 + weight does not change the function.

    Args:
        module: The block.
        group: The group.
        scales: Floating, the group's shape.

    Returns:
        The scales as they were applied.
    """
    producer, applied = group.producer.view(module), scales.float()
    if group.offset is not None:
        gain = producer.float() + group.offset
        producer.copy_(gain / applied - group.offset)
        stored = producer.float() + group.offset
        ratio = gain / stored
        applied = torch.where((stored != 0) & (ratio > 0) & ratio.isfinite(), ratio, applied)
    else:
        _divide_rows(producer, group.producer.index, applied.unsqueeze(-1))
    for name in group.biases:
        _divide_rows(module.get_parameter(name).data, group.producer.index, applied, dim=-1)
    for part in group.consumers:
        view = part.view(module)
        factors = group.columns(part, applied).unsqueeze(-2)
        view.copy_(view.float() * factors if view.dtype != torch.float64 else view * factors)
    return applied


def _divide_rows(value: Tensor, index: Tensor | None, scales: Tensor, dim: int = -2) -> None:
    """Divide rows (or entries of a vector) in place."""
    if index is None:
        value.copy_(value / scales)
    else:
        value.index_copy_(dim, index, (value.index_select(dim, index) / scales).to(value.dtype))


def apply(block: Block, group: ScaleGroup, scales: Tensor) -> Tensor:
    """Fold scales into a block for good. Kept parameters become part of the block's result.

    Args:
        block: The block.
        group: One of its groups.
        scales: Positive, floating, the group's shape.

    Returns:
        The scales as they were applied: a norm's weight is rounded to its data type.
    """
    planned = {block.local(row.key) for row in block.rows}
    kept = {name: block.module.get_parameter(name).data for name in group.parameters if name not in planned}
    before = {name: value.clone() for name, value in kept.items()}
    applied = scale(block.module, group, scales)
    for name, value in kept.items():
        after = value.clone()
        value.copy_(before[name])  # a block notes what was there before a change
        block.change(f"{block.path}.{name}" if block.path else name, after)
    return applied


@contextmanager
def trial(module: nn.Module, scaled: Sequence[tuple[ScaleGroup, Tensor]]) -> Iterator[None]:
    """A block with scales applied to some groups, and exactly as before afterwards."""
    names = {name for group, _ in scaled for name in group.parameters}
    before = {name: module.get_parameter(name).data.clone() for name in names}
    try:
        for group, scales in scaled:
            scale(module, group, scales)
        yield
    finally:
        for name, value in before.items():
            module.get_parameter(name).data.copy_(value)
