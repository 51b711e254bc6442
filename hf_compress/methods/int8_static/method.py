"""The scheme of static INT8, and the ranges of inputs. Weights are rounded to nearest, per output channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.block import Block, Call
from ...calibration.fold import fold_batch_norms
from ...calibration.gram import input_of
from ...calibration.observers import Observer, ObserverKind, make_observer
from ...core import scheme as schemes
from ...core.config import QuantFields
from ...core.errors import CalibrationError, ConfigError
from ...core.plan import PlanRow
from ...core.registry import Quantized
from ...core.weights import Weight, WeightKind
from ...modules.results import check_values
from ..rtn.method import quantize_scheme, uniform_grid
from ..smoothquant import smooth_block
from .config import Int8StaticFields

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def scheme(fields: QuantFields, weight: Weight) -> schemes.Scheme | str:
    """W8A8 for linear layers and convolutions; INT8 weights alone where one input scale can't serve.

    Fused experts and recurrent layers multiply with inputs that no hook sees; of depthwise convolutions, inputs differ
    from channel to channel.
    """
    weights = schemes.weight_args(8, "channel", symmetric=True)
    linear = weight.kind in (WeightKind.LINEAR, WeightKind.CONV1D) and weight.token_inputs
    if linear or (weight.kind is WeightKind.CONV and weight.kernel[0] > 1):
        return schemes.scheme(weights, schemes.static_args(_static(fields).symmetric_inputs))
    return schemes.scheme(weights)


def make(fields: QuantFields) -> StaticCompressor:
    """The compressor of these fields."""
    return StaticCompressor(_static(fields))


def _static(fields: QuantFields) -> Int8StaticFields:
    """The fields as this method's own."""
    if not isinstance(fields, Int8StaticFields):
        raise ConfigError(f"{type(fields).__name__} has no observer.", "use Int8StaticQuantConfig")
    return fields


@dataclass(frozen=True)
class StaticCompressor:
    """Looks at the inputs of all layers while the float model runs, then rounds the weights.

    Attributes:
        fields: The method's fields.
    """

    fields: Int8StaticFields
    reference = False
    call_tokens = 1024

    @property
    def sequential(self) -> bool:
        """Ranges are those of the float model, so no block waits for another; only smoothing looks block by block."""
        return self.fields.smoothing is not None

    def compress(self, block: Block) -> None:
        """Fold, smooth, look, round.

        Raises:
            CalibrationError: An input holds NaN or infinite values.
            WeightValueError: A weight does, or the scale of an input is beyond its data type.
        """
        fold_batch_norms(block)
        if self.fields.smoothing is not None:
            smooth_block(block, self.fields.smoothing)
        observers = self._observe(block)
        for row in block.rows:
            observer = observers.get(row.name)
            if observer is not None and observer.count == 0:
                continue  # the pass names all weights that were not reached
            block.install(row, _quantized(block, row, observer))

    def _observe(self, block: Block) -> dict[str, Observer]:
        """Run all calls, and take note of what reaches each layer whose input is to be quantized.

        The calls are advanced by it: what later blocks see is the float model's.
        """
        rows = [row for row in block.rows if row.quantization is not None and row.quantization.input_activations]
        found = {row.name: self._observer() for row in rows}
        watch = _Watch()
        handles = [
            block.owner(row).register_forward_pre_hook(watch.hook(row, found[row.name]), with_kwargs=True)
            for row in rows
        ]
        try:
            for call in block.calls:
                watch.call = call
                output = call.run(block.module)
                if call.hidden is not None:
                    call.hidden = output
        finally:
            for handle in handles:
                handle.remove()
        block.advanced = True
        return found

    def _observer(self) -> Observer:
        """A new observer."""
        return make_observer(ObserverKind(self.fields.observer), self.fields.symmetric_inputs, self.fields.percentile)


@dataclass
class _Watch:
    """The call that is running.

    Attributes:
        call: Which one.
    """

    call: Call | None = None

    def hook(self, row: PlanRow, observer: Observer) -> Callable[..., None]:
        """A pre-hook that shows an observer a layer's input, padding left out."""

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = input_of(args, kwargs)
            if self.call is not None and not isinstance(module, _CONVOLUTIONS) and value.ndim > 1:
                value = self.call.tokens(value)
            try:
                observer.update(value.detach())
            except CalibrationError as error:
                raise CalibrationError(f"The input of {row.name}: {error.message}", error.fix) from None

        return look


def _quantized(block: Block, row: PlanRow, observer: Observer | None) -> Quantized:
    """A weight's codes and scales, with the scale of its input."""
    if row.quantization is None:
        raise ValueError(f"{row.name} is not quantized")
    weight = block.weight(row)
    check_values(row.name, weight)
    made = quantize_scheme(weight, row.quantization)
    if observer is None:
        return made
    scale, zero_point = input_grid(observer, row.quantization, weight.dtype)
    return replace(made, input_scale=scale, input_zero_point=zero_point)


def input_grid(observer: Observer, given: schemes.Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of an input, as compressed-tensors stores them.

    Args:
        observer: Has seen the input.
        given: The weight's scheme.
        dtype: The weight's data type.

    Returns:
        The scale in `dtype` (1), and the zero point, int8 (1), or None when symmetric.
    """
    args = given.input_activations
    if args is None:
        raise ValueError("the input is not quantized")
    low, high = (torch.tensor([value], dtype=torch.float32) for value in observer.range())
    return uniform_grid(low, high, args, dtype)
