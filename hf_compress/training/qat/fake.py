"""Fake quantization: the values that a packed model would compute with, in floating point, with gradients.

Values equal those of packing and dequantizing. A grid that follows the range of its weights clips none by more than
the half step that rounding may take anyway: symmetric grids have one code less above zero than below, so that a
largest weight above zero, at code 2^(bits-1) - 1/2, becomes the last one. Clipping and rounding get the gradient of
the identity (straight-through estimator, arXiv:1308.3432, section 4), and nothing is kept for the backward pass.
With a scale that is learned, or a fixed range of an input, what lies outside of the grid gets none.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...methods.rtn.method import stored_scale, uniform_grid

_INT8 = 128
"""Codes of inputs are -128 … 127."""


def fake_weight(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """A weight rounded to nearest on the grid of its own range, as `RTNQuantConfig` would.

    Args:
        weight: Canonical: … × rows × columns, floating point, finite.
        args: The grid: bits, strategy, group size, symmetry.

    Returns:
        The weight's shape and data type. The gradient is passed on as it is.
    """
    scale, zero_point = weight_grid(weight, args)
    limit = 2 ** (args.num_bits - 1)
    grid = _spread(scale, zero_point)
    made: Tensor = _Rounded.apply(_grouped(weight, args), *grid, limit)  # type: ignore[no-untyped-call]
    return made.view(weight.shape)


def fake_learned(weight: Tensor, args: QuantizationArgs, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """A weight rounded to nearest on a grid whose scale is learned (LSQ, arXiv:1902.08153, equations 1 to 3 and 5).

    Args:
        weight: Canonical: … × rows × columns, floating point, finite.
        args: The grid: bits, strategy, group size, symmetry.
        scale: float32, positive, of the shape of `core.scheme.groups`; used as it will be stored. Its gradient is
            scaled by 1/√(n · q_max), n values per scale (section 2.2).
        zero_point: int8 of the same shape, or None when symmetric.

    Returns:
        The weight's shape and data type. The gradient is passed on where a value lies inside of the grid, else zero.
    """
    limit = 2 ** (args.num_bits - 1)
    narrow = args.scale_dtype or weight.dtype
    grid = _spread(scale, zero_point)
    made: Tensor = _Learned.apply(_grouped(weight, args), *grid, limit, narrow)  # type: ignore[no-untyped-call]
    return made.view(weight.shape)


def beside(weight: Tensor, bias: Tensor) -> Tensor:
    """A weight as it is, with a parameter in its graph that gets a gradient of zero.

    Args:
        weight: Of any shape and data type.
        bias: The other parameter, likewise.

    Returns:
        A view of the weight.
    """
    made: Tensor = _Beside.apply(weight, bias)  # type: ignore[no-untyped-call]
    return made


def fake_input(value: Tensor, scale: Tensor, zero_point: Tensor | None, clipped: bool) -> Tensor:
    """An INT8 input in floating point, with compressed-tensors' arithmetic, as packed modules have it.

    Args:
        value: Floating point, of any shape.
        scale: Floating point, of a shape that can be expanded to the value's.
        zero_point: Integers of the scale's shape, or None when symmetric.
        clipped: Whether values can lie outside of the grid, because it was fixed beforehand; they get no gradient.

    Returns:
        The value's shape, in the scale's data type.
    """
    made: Tensor = _RoundedInput.apply(value, scale, zero_point, clipped)  # type: ignore[no-untyped-call]
    return made


@torch.no_grad()
def weight_grid(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a weight's own range, as round to nearest has them.

    Args:
        weight: Canonical: … × rows × columns.
        args: The grid.

    Returns:
        The scale in the weight's data type and the zero point, int8 or None, of the shape of `core.scheme.groups`.
    """
    if args.strategy == "tensor":
        low, high = (limit.reshape(1) for limit in torch.aminmax(weight))
    else:
        grouped = _grouped(weight, args)
        low, high = grouped.amin(-1), grouped.amax(-1)
    return uniform_grid(low, high, args, weight.dtype)


@torch.no_grad()
def codes_of(weight: Tensor, args: QuantizationArgs, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """int8 codes of a weight on a given grid; arguments as those of `fake_learned`, the scale as it is stored."""
    limit = 2 ** (args.num_bits - 1)
    codes = _codes(_grouped(weight, args), *_spread(scale, zero_point), limit)
    return codes.to(torch.int8).view(weight.shape)


def _grouped(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """… × rows × groups × size; one group where the scale is the row's or the tensor's."""
    return weight.unflatten(-1, (schemes.groups(tuple(weight.shape), args)[-1], -1))


def _spread(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A grid with a last dimension for the values of a group."""
    return scale.unsqueeze(-1), None if zero_point is None else zero_point.unsqueeze(-1)


def _steps(values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Positions on a grid in float32, before rounding; new memory."""
    steps = values.float() / scale.float()
    return steps if zero_point is None else steps.add_(zero_point.float())


def _codes(values: Tensor, scale: Tensor, zero_point: Tensor | None, limit: int) -> Tensor:
    """Codes in float32; new memory. Rounded half to even, as round to nearest does."""
    return _steps(values, scale, zero_point).round_().clamp_(-limit, limit - 1)


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """What codes stand for, in the scale's data type: `modules.packed.dequantize`. Overwrites the codes."""
    made = codes.to(scale.dtype)
    if zero_point is not None:
        made -= zero_point.to(scale.dtype)
    return made.mul_(scale)


class _Rounded(torch.autograd.Function):
    """Rounding to a grid that no value lies outside of by more than half a step."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None, limit: int) -> Tensor:
        return _values(_codes(values, scale, zero_point, limit), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class _Learned(torch.autograd.Function):
    """Rounding to a grid whose scale has a gradient. Kept are the values, a view of the parameter, and the scale."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None, limit: int, narrow: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(values, scale, *([] if zero_point is None else [zero_point]))
        ctx.limit, ctx.narrow = limit, narrow
        stored = stored_scale(scale, narrow, values.dtype)
        return _values(_codes(values, stored, zero_point, limit), stored, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        values, scale, *rest = ctx.saved_tensors
        (grad,), limit, zero_point = grads, ctx.limit, rest[0] if rest else None
        steps = _steps(values, stored_scale(scale, ctx.narrow, values.dtype), zero_point)
        inside = (steps > -limit) & (steps < limit - 1)
        codes = steps.round().clamp_(-limit, limit - 1)
        # Inside of the grid code · scale moves by code - value / scale, outside with the code itself; both less the
        # zero point, which the steps have in them.
        origin = steps.new_zeros(1) if zero_point is None else zero_point.to(steps.dtype)
        slope = codes.sub_(torch.where(inside, steps, origin))
        pace = (scale.numel() / (values.numel() * (limit - 1))) ** 0.5
        towards_scale = slope.mul_(grad).sum_to_size(scale.shape).mul_(pace)
        return grad * inside, towards_scale, None, None, None


class _Beside(torch.autograd.Function):
    """The identity of its first argument."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(bias)


class _RoundedInput(torch.autograd.Function):
    """Rounding of an input. Kept is, where values may be clipped, which of them were not."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor | None, clipped: bool) -> Tensor:
        steps = values / scale
        if zero_point is not None:
            steps += zero_point.to(values.dtype)
        rounded = steps.round_()
        ctx.clipped = clipped and ctx.needs_input_grad[0]
        if not ctx.clipped:
            return _values(rounded.clamp_(-_INT8, _INT8 - 1), scale, zero_point)
        codes = rounded.clamp(-_INT8, _INT8 - 1)
        ctx.save_for_backward(rounded.eq(codes))
        return _values(codes, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if not ctx.clipped:
            return grads[0], None, None, None
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None
