"""Folding batch normalisation into the convolution before it, without changing what the model computes.

BN(conv(x)) = γ·(conv(x) - μ)/√(σ² + ε) + β. The factor γ/√(σ² + ε) goes into the convolution's weight and bias, and
into μ; then γ is 1 and σ² is 1 - ε, so that the normalisation only adds β - μ. The model keeps its modules, and with
them its stock checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..core.plan import PlanRow
from ..core.weights import WeightKind
from ..modules.lazy import ABOUT_FORM
from .block import Block
from .shared import Sharing

_ABOUT_FORM = {*ABOUT_FORM, Tensor.stride, Tensor.is_contiguous}


@torch.no_grad()
def fold_batch_norms(block: Block) -> list[tuple[str, str]]:
    """Fold the batch normalisation behind each planned convolution into it.

    Convolutions are changed in the block's module, normalisations (and kept biases) by `block.change`. Only pairs are
    folded where, in a run of the block's first call, the normalisation reads the convolution's output, nothing else
    reads either, and both are called equally often.

    Args:
        block: The block; its calls are left as they are.

    Returns:
        Paths in the model of each convolution and its normalisation.
    """
    prefix = f"{block.path}." if block.path else ""
    named = {f"{prefix}{path}": module for path, module in block.module.named_modules()}
    inside = Sharing(block.module)

    def shared(path: str) -> bool:
        """Whether other modules have one of a module's parameters or buffers, which folding would change too."""
        elsewhere = any(name.rpartition(".")[0] == path for name in block.shared)
        return elsewhere or bool(inside.of_block(block.local(path)))

    norms = {path: module for path, module in named.items() if _foldable(module) and not shared(path)}
    convolutions = (row for row in block.rows if row.kind is WeightKind.CONV)
    rows = {row.module: row for row in convolutions if not shared(row.module)}
    if not rows or not norms or not block.calls:
        return []
    pairs = _pairs(block, rows, norms)
    for convolution, norm in pairs:
        _fold(block, rows[convolution], norm)
    return pairs


def _foldable(module: nn.Module) -> bool:
    """Whether a module normalises with fixed statistics and has everything that folding changes."""
    if not isinstance(module, _BatchNorm) or module.training:
        return False
    return all(value is not None for value in (module.weight, module.bias, module.running_mean, module.running_var))


def _fold(block: Block, row: PlanRow, norm: str) -> None:
    """Move the factors of one normalisation into one convolution, in float64."""
    convolution, module = block.owner(row), block.module.get_submodule(block.local(norm))
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        raise TypeError(f"{norm} is no batch normalisation with statistics")
    factor = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
    weight = convolution.get_parameter(row.parameter)
    block.rewrite(row, weight.double() * factor.view(-1, *(1 for _ in row.kernel)))
    bias = convolution._parameters.get("bias")
    if bias is not None:
        block.change(f"{row.module}.bias", bias.double() * factor)
    block.change(f"{norm}.running_mean", module.running_mean.double() * factor)
    block.change(f"{norm}.running_var", torch.full_like(module.running_var, 1 - module.eps))
    block.change(f"{norm}.weight", torch.ones_like(module.weight))


@dataclass
class _Trace:
    """Who reads what convolutions return, in one run.

    Attributes:
        made: Outputs of convolutions by identity, and the path of the convolution; none is kept alive.
        readers: Paths of the normalisations that read each convolution's output; empty for any other reader.
        reads: Paths of the convolutions whose output each normalisation reads; empty for anything else.
        calls: Calls of each convolution and normalisation.
        inside: Path of the normalisation that is running, or empty.
    """

    made: dict[int, tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    reads: dict[str, set[str]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inside: str = ""

    def origin(self, value: object) -> str:
        """The convolution that returned a tensor, or empty."""
        known = self.made.get(id(value))
        return known[1] if known is not None and known[0]() is value else ""

    def read(self, value: object) -> None:
        """Something reads a value."""
        path = self.origin(value)
        if path:
            self.readers.setdefault(path, set()).add(self.inside)


class _Reads(TorchFunctionMode):
    """Notes every tensor whose values a function may use, as a tensor or as numbers; its shape is none of them."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func not in _ABOUT_FORM:
            for value in tree_leaves((tuple(args), options)):
                self.trace.read(value)
        return func(*args, **options)


def _pairs(block: Block, rows: Mapping[str, PlanRow], norms: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Convolutions and the normalisations that alone read them."""
    trace = _Trace()
    handles = [block.module.register_forward_hook(_finished(trace))]
    for path, row in rows.items():
        handles.append(block.owner(row).register_forward_hook(_returned(trace, path)))
    for path, module in norms.items():
        handles.append(module.register_forward_pre_hook(_entered(trace, path)))
        handles.append(module.register_forward_hook(_left(trace)))
    try:
        with _Reads(trace):
            block.calls[0].run(block.module)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for path in rows:
        readers = trace.readers.get(path, set())
        norm = next(iter(readers), "")
        alone = len(readers) == 1 and norm != "" and trace.reads[norm] == {path}
        if alone and trace.calls[path] == trace.calls[norm]:
            found.append((path, norm))
    return found


def _finished(trace: _Trace) -> Callable[..., None]:
    """A hook that notes what leaves the block."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for value in tree_leaves(output):
            trace.read(value)

    return hook


def _returned(trace: _Trace, path: str) -> Callable[..., None]:
    """A hook that notes what a convolution returns."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        trace.made[id(output)] = (weakref.ref(output), path)
        trace.calls[path] = trace.calls.get(path, 0) + 1

    return hook


def _entered(trace: _Trace, path: str) -> Callable[..., None]:
    """A hook that notes what a normalisation reads."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        trace.inside = path
        trace.calls[path] = trace.calls.get(path, 0) + 1
        trace.reads.setdefault(path, set()).add(trace.origin(args[0]) if args else "")

    return hook


def _left(trace: _Trace) -> Callable[..., None]:
    """A hook that notes that a normalisation is done."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        trace.inside = ""

    return hook
