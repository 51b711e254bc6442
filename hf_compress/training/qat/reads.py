"""Weights whose values another module reads, such as a parent that hands them to a fused function.

Fake quantization happens in a layer's own forward, so such weights would be trained without rounding and yet be
packed. The first forward of a model in each mode is watched, and ends in an error where there was such a read; one
that only evaluation mode has is thus found by the first evaluation. Code that torch.compile traces isn't watched:
there, other modules read rounded values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ...checkpoint.handover import training_plan_of
from ...core.errors import UnsupportedModelError, listed
from ...modules.lazy import ABOUT_FORM

_WATCH = "hfc_watch"
READS = "hfc_reads"
"""Attribute of a module with fake quantization: its reads are noted there, or None."""


@dataclass
class Reads:
    """What is noted of a module's parameters.

    Attributes:
        values: Names of those whose values were read.
    """

    values: set[str] = field(default_factory=set)


class WatchedWeight(Tensor):
    """A parameter that notes when its values are used; questions about its form, such as `dtype`, are none."""

    hfc_name: str
    hfc_reads: Reads

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take note, and compute as with a plain tensor."""
        options = dict(kwargs or {})
        if func not in ABOUT_FORM:
            for value in tree_leaves((tuple(args), options)):
                if isinstance(value, WatchedWeight):
                    value.hfc_reads.values.add(value.hfc_name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **options)


def watched(parameter: Tensor, name: str, reads: Reads) -> Tensor:
    """A view of a parameter, with its gradient, that notes its use.

    Args:
        parameter: Of any shape and data type.
        name: What to note.
        reads: Where.
    """
    made = parameter.as_subclass(WatchedWeight)
    made.hfc_name, made.hfc_reads = name, reads
    return made


@dataclass
class _Watch:
    """Modes (training or not) that are still to be watched, and the hooks that do so."""

    modes: set[bool]
    handles: list[RemovableHandle]


def watch(model: nn.Module) -> None:
    """Watch the model's first forward in each mode; it raises UnsupportedModelError where weights are read so.

    Args:
        model: A model with fake quantization.
    """
    handles = [
        model.register_forward_pre_hook(_begin),
        model.register_forward_hook(_end, always_call=True),
    ]
    vars(model)[_WATCH] = _Watch({True, False}, handles)


def unwatch(model: nn.Module) -> None:
    """Watch no longer, whatever has been seen."""
    found = vars(model).pop(_WATCH, None)
    for handle in found.handles if found is not None else ():
        handle.remove()


def _begin(model: nn.Module, args: object) -> None:
    """Start to note."""
    if torch.compiler.is_compiling() or model.training not in vars(model)[_WATCH].modes:
        return
    for module in _modules(model):
        vars(module)[READS] = Reads()


def _end(model: nn.Module, args: object, output: object) -> None:
    """Stop to note, and refuse what was found. After an error in the forward, which has no output, watch again.

    Raises:
        UnsupportedModelError: A module has read the values of a weight that is not its own.
    """
    if torch.compiler.is_compiling() or model.training not in vars(model)[_WATCH].modes:
        return
    reads = {id(module): vars(module)[READS] for module in _modules(model)}
    for module in _modules(model):
        vars(module)[READS] = None
    plan = training_plan_of(model)
    if output is None or plan is None:
        return
    found = [
        row.name
        for row in plan.quantized
        if row.module and row.parameter in reads[id(model.get_submodule(row.module))].values
    ]
    if found:
        skip = ", ".join(f'"{pattern}"' for pattern in dict.fromkeys(map(_every_layer, found)))
        reads_them = (
            f"{type(model).__name__} reads the values of {listed(found)} ({len(found)} weights) without calling their "
            "layers, which is where they are rounded"
        )
        raise UnsupportedModelError(
            f"{reads_them}: they would be trained in floating point, and packed at the end."
            if model.training
            else f"In evaluation mode {reads_them}: evaluation and the packed model would no longer agree.",
            f"QATConfig(..., skip=[{skip}])",
        )
    vars(model)[_WATCH].modes.discard(model.training)
    if not vars(model)[_WATCH].modes:
        unwatch(model)


def _modules(model: nn.Module) -> list[nn.Module]:
    """Modules with fake quantization, the model itself left out: who calls it may read what is its own."""
    plan = training_plan_of(model)
    names = {row.module for row in plan.quantized if row.module} if plan is not None else set()
    return [model.get_submodule(name) for name in sorted(names)]


def _every_layer(name: str) -> str:
    """A pattern for a weight in all layers alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
