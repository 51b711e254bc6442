"""One layer that makes queries, keys and values: how its outputs are divided, found out by a trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from ...calibration.block import first_tensor
from ...calibration.modes import evaluating
from ...core.errors import UnsupportedModelError


@dataclass(frozen=True)
class Split:
    """How the outputs of one layer are divided into queries, keys and values.

    Attributes:
        queries: Features of the queries, of all heads.
        others: Features of the keys, and of the values.
        groups: 0 where they come one after the other; else so many groups of heads, each with its queries, then its
            keys, then its values.
    """

    queries: int
    others: int
    groups: int

    def cut(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, … × features each, of the layer's outputs, … × features."""
        if not self.groups:
            queries, keys, values = value.split([self.queries, self.others, self.others], dim=-1)
            return queries, keys, values
        width = self.others // self.groups
        parts = value.unflatten(-1, (self.groups, -1)).split([self.queries // self.groups, width, width], dim=-1)
        queries, keys, values = (part.flatten(-2) for part in parts)
        return queries, keys, values

    def with_values_doubled(self, value: Tensor) -> Tensor:
        """The layer's outputs with the values twice as large."""
        made = value.clone()
        width = self.others // self.groups if self.groups else self.others
        (made.unflatten(-1, (self.groups, -1)) if self.groups else made)[..., -width:] *= 2
        return made


def find_split(attention: nn.Module, path: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Split:
    """How the layer that makes queries, keys and values divides its outputs.

    Attention is linear in the values: with these doubled, its output layer reads twice of what it read before. No
    other outputs of the layer have this property, so each way to divide them is tried.

    Args:
        attention: The module that holds the layer.
        path: Its path in the model, for messages.
        name: Name of the layer.
        args: Positional arguments of one of its calls.
        kwargs: The others.

    Raises:
        UnsupportedModelError: None of the known ways is right.
    """
    others = tuple(None if isinstance(value, Cache) else value for value in args)
    named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}

    def attended(change: Callable[[Tensor], Tensor]) -> tuple[int, Tensor]:
        with torch.no_grad(), evaluating(attention):
            # forward, past hooks: those of the step in progress have seen this call
            return _attended(attention, name, change, lambda: attention.forward(*others, **named))

    width, before = attended(lambda value: value)
    tried = _splits(width, before.shape[-1])
    for split in tried:
        if torch.allclose(attended(split.with_values_doubled)[1], 2 * before, rtol=1e-3, atol=0.0):
            return split
    raise UnsupportedModelError(
        f"{path}.{name} ({type(attention).__name__}) makes {width} features, read as "
        f"{before.shape[-1]} by its output layer; none of {len(tried)} ways to divide them into queries, keys and "
        "values is the model's.",
        "distil without relations: relations=None",
    )


def _splits(width: int, queries: int) -> list[Split]:
    """The ways to divide features, the likeliest first."""
    others = (width - queries) // 2
    if others < 1 or queries + 2 * others != width or queries % others:
        return []
    groups = [count for count in range(2, others + 1) if others % count == 0]
    return [Split(queries, others, 0), *(Split(queries, others, count) for count in groups)]


def _attended(
    attention: nn.Module, name: str, change: Callable[[Tensor], Tensor], call: Callable[[], Any]
) -> tuple[int, Tensor]:
    """Features of the layer that makes all three, and what the output layer reads when these are changed.

    Raises:
        UnsupportedModelError: No layer runs after it.
    """
    widths: list[int] = []
    reads: list[Tensor] = []

    def alter(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        widths.append(output.shape[-1])
        return change(output)

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        if widths and not reads:
            reads.append(first_tensor(args).float())

    inside = set(attention.get_submodule(name).modules())
    linears = [one for one in attention.modules() if isinstance(one, nn.Linear | Conv1D) and one not in inside]
    handles = [attention.get_submodule(name).register_forward_hook(alter)]
    handles += [one.register_forward_pre_hook(read) for one in linears]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if not reads:
        raise UnsupportedModelError(
            f"No output layer runs after {name} in {type(attention).__name__}.",
            "distil without relations: relations=None",
        )
    return widths[0], reads[0]
