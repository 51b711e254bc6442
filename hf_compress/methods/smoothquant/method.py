"""SmoothQuant on the groups of channels that can be scaled (Xiao et al. 2022, arXiv:2211.10438, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...calibration.block import Block, Call
from ...calibration.capture import find_stacks, first_row, run_on
from ...calibration.gram import input_of
from ...calibration.runner import split
from ...calibration.scaling import ScaleGroup, apply, find_groups
from ...calibration.shared import Sharing
from ...calibration.whole import WholeCall
from ...core.errors import CalibrationError
from ...core.plan import PlanRow
from ...core.weights import WeightKind

KINDS = (WeightKind.LINEAR, WeightKind.CONV1D)
"""Weights whose inputs are quantized."""

_CALL_TOKENS = 1024
"""Most tokens of one call of a model, as far as rows allow."""


@torch.no_grad()
def smooth_block(block: Block, strength: float) -> list[ScaleGroup]:
    """Fold SmoothQuant's scales into a block. Its calls are run once; its function stays as it is.

    Args:
        block: The block; weights are changed in its module, norms and biases also in its result.
        strength: α, 0 to 1: how much of the range of the inputs goes into the weights.

    Returns:
        The groups that were scaled.

    Raises:
        CalibrationError: An input is NaN or infinite; names the layer.
    """
    groups = _smoothable(block, find_groups(block))
    with _largest_inputs(block.module, _readers(groups)) as largest:
        for call in block.calls:
            largest.call = call
            call.run(block.module)
    for group in groups:
        _fold(block, group, largest.values, strength)
    return groups


@torch.no_grad()
def smooth_model(
    model: nn.Module, rows: Sequence[PlanRow], batches: Sequence[Mapping[str, Tensor]], strength: float
) -> list[ScaleGroup]:
    """Fold SmoothQuant's scales into a live model, in place. The model runs once over the data.

    Args:
        model: The model, dense and in evaluation mode.
        rows: Weights whose inputs are to be quantized later.
        batches: Forward arguments.
        strength: α, 0 to 1.

    Returns:
        The groups that were scaled, with names as in their blocks.

    Raises:
        CalibrationError: An input is NaN or infinite; names the layer. Or the model can't read a batch.
    """
    blocks = list(_blocks(model, rows, batches[0]))
    found = [(block, _smoothable(block, find_groups(block))) for block in blocks]
    names = {f"{block.path}.{name}" if block.path else name for block, groups in found for name in _readers(groups)}
    with _largest_inputs(model, names) as largest:
        for number, batch in enumerate(split(batches, _CALL_TOKENS)):
            largest.call = WholeCall(model, batch, number, ())
            largest.call.run(model)
    for block, groups in found:
        inside = {block.local(name): value for name, value in largest.values.items() if _within(block, name)}
        for group in groups:
            _fold(block, group, inside, strength)
    return [group for _, groups in found for group in groups]


def scales_of(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """s = max|X|^α / max|W|^(1 - α), eq. 4; 1 for channels that are zero on either side.

    Args:
        inputs: Largest absolute input of each channel, float32, channels.
        weights: Largest absolute weight of each channel, float32, channels.
        strength: α, 0 to 1.
    """
    made = inputs.pow(strength) / weights.pow(1 - strength)
    return torch.where((inputs > 0) & (weights > 0) & made.isfinite() & (made > 0), made, torch.ones_like(made))


def _fold(block: Block, group: ScaleGroup, largest: Mapping[str, Tensor], strength: float) -> None:
    """Fold the scales of one group into its block."""
    inputs, weights = torch.zeros(group.shape), torch.zeros(group.shape)
    for part in group.consumers:
        size = part.view(block.module).float().abs().amax(-2)
        if size.ndim > 1:  # fused experts: their inputs are not quantized
            continue
        index = torch.arange(group.shape[0]) if part.index is None else part.index
        weights.scatter_reduce_(0, index, size, "amax")
        seen = largest.get(part.name.rpartition(".")[0])
        if seen is not None:
            inputs.scatter_reduce_(0, index, seen, "amax")
    apply(block, group, scales_of(inputs, weights, strength))


def _smoothable(block: Block, groups: Iterable[ScaleGroup]) -> list[ScaleGroup]:
    """Groups that reach a planned linear layer."""
    planned = {block.local(row.key) for row in block.rows if row.kind in KINDS}
    return [group for group in groups if planned & {part.name for part in group.consumers}]


def _readers(groups: Iterable[ScaleGroup]) -> set[str]:
    """Names of the modules that read the channels of some groups."""
    return {part.name.rpartition(".")[0] for group in groups for part in group.consumers}


class _Largest:
    """Largest absolute inputs.

    Attributes:
        call: The call that runs, which tells padding from tokens.
        values: float32, columns, by the module's name.
    """

    def __init__(self) -> None:
        self.call = Call(None)
        self.values: dict[str, Tensor] = {}

    def see(self, name: str, value: Tensor) -> None:
        """Take an input in."""
        tokens = self.call.tokens(value)
        if not len(tokens):
            return
        size = tokens.abs().amax(0).float()
        if not bool(size.isfinite().all()):
            raise CalibrationError(
                f"The inputs of {name} hold NaN or infinite values.",
                'load the model with dtype="float32", or look for the row of the calibration data that causes it',
            )
        before = self.values.get(name)
        self.values[name] = size if before is None else torch.maximum(before, size)


@contextmanager
def _largest_inputs(module: nn.Module, names: Iterable[str]) -> Iterator[_Largest]:
    """Look at what some submodules read."""
    largest = _Largest()

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: largest.see(name, input_of(args, kwargs))

    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in sorted(names)
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module, rows: Sequence[PlanRow], batch: Mapping[str, Tensor]) -> Iterator[Block]:
    """The model's blocks, each with what it is called with for one row; the model itself where it has none."""
    stacks = find_stacks(model, [row.module for row in rows])
    paths = [path for stack in stacks for path in stack.paths]
    first, _ = first_row(batch)
    if not paths:
        run_on(model, first, 0)
        yield Block(0, "", model, tuple(rows), [Call(None, kwargs=first)])
        return
    seen: dict[str, Call] = {}

    def hook(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Calls are repeated, so they go without a cache, which would grow.
            others = tuple(None if isinstance(value, Cache) else value for value in args)
            named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
            seen.setdefault(path, Call(None, args=others, kwargs=named))

        return note

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        run_on(model, first, 0)
    finally:
        for handle in handles:
            handle.remove()
    sharing = Sharing(model)
    for number, path in enumerate(path for path in paths if path in seen):
        inside = tuple(row for row in rows if row.module.startswith(f"{path}."))
        shared = sharing.of_block(path)
        yield Block(number, path, model.get_submodule(path), inside, [seen[path]], shared=shared)


def _within(block: Block, name: str) -> bool:
    """Whether a module is in a block."""
    return not block.path or name.startswith(f"{block.path}.")
