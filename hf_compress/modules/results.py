"""From a method's result to a packed weight: checked, packed, and its noise measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import WeightValueError
from ..core.plan import PlanRow
from ..core.registry import Quantized
from .packed import Layout, PackedTensor, dequantize, layout_of, pack

CHUNK = 1 << 15
"""Values compared at a time."""


def pack_result(
    row: PlanRow, weight: Tensor, quantized: Quantized, into: PackedTensor | None = None
) -> tuple[PackedTensor, float | None]:
    """Pack what a method made of a weight.

    Args:
        row: Its row of the plan.
        weight: The dense weight in canonical orientation, … × rows × columns, that the noise is measured against.
        quantized: The method's result.
        into: Where to write codes and scales; allocated by default.

    Returns:
        The packed weight, and its signal-to-quantization-noise ratio in dB (None when exact).

    Raises:
        WeightValueError: Its scales, or codes times scales, are not finite.
    """
    layout = layout_of(row)
    if not bool(torch.isfinite(quantized.scale).all()):
        raise _too_wide(row, quantized.scale.dtype, "a scale")
    parts = (quantized.codes, quantized.scale, quantized.zero_point, quantized.codebook, quantized.g_idx)
    noise = sqnr_db(weight, PackedTensor(replace(layout, kernel=()), *parts))
    if noise is not None and math.isnan(noise):
        raise _too_wide(row, quantized.scale.dtype, "a code times its scale")
    return pack(quantized, layout, into), noise


def combined(parts: Iterable[Quantized], join: Callable[[list[Tensor]], Tensor] = torch.cat) -> Quantized:
    """One result of several: of rows that are below each other, or of experts.

    Args:
        parts: Codes, scales and zero points of each. Scales of one dimension are those of a grid that all share.
        join: `torch.cat` for rows, `torch.stack` for experts.
    """
    made = list(parts)
    codes, first = join([part.codes for part in made]), made[0]
    if first.scale.ndim == 1:
        return Quantized(codes, first.scale, first.zero_point)
    zeros = [part.zero_point for part in made if part.zero_point is not None]
    return Quantized(codes, join([part.scale for part in made]), join(zeros) if zeros else None)


def canonical(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter as rows × columns, experts first: as methods see it."""
    if layout.kernel:
        return parameter.reshape(layout.shape)
    return parameter.transpose(-1, -2).contiguous() if layout.transposed else parameter


def check_values(name: str, weight: Tensor) -> None:
    """Refuse weights that can't be quantized.

    Raises:
        WeightValueError: NaN, infinite or no values; names the weight and how many.
    """
    if weight.numel() == 0:
        raise WeightValueError(f"{name} has no values (shape {tuple(weight.shape)}).", f'skip=["{name}"]')
    low, high = weight.amin(), weight.amax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
    raise WeightValueError(
        f"{name} holds {nan} NaN and {infinite} infinite values of {weight.numel()}. Nothing was changed.",
        f'repair the checkpoint, or skip=["{name}"] to keep the weight as it is',
    )


def sqnr_db(weight: Tensor, packed: PackedTensor) -> float | None:
    """Signal-to-quantization-noise ratio, 10·log10(Σw² / Σ(w - ŵ)²); None when exact, NaN when a ŵ is not finite.

    Differences are taken in float32, norms in float64.

    Args:
        weight: Canonical dense weight.
        packed: Its packed form; codes may still be int8.
    """
    signal = noise = 0.0
    for block, part in _blocks(weight, packed):
        dense = block.float()
        signal += float(torch.linalg.vector_norm(dense, dtype=torch.float64)) ** 2
        noise += float(torch.linalg.vector_norm(dequantize(part).float().sub_(dense), dtype=torch.float64)) ** 2
    if noise == 0.0:
        return None
    if not math.isfinite(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _blocks(weight: Tensor, packed: PackedTensor) -> list[tuple[Tensor, PackedTensor]]:
    """Views of matching rows (or experts) of a weight and its packed form, about `CHUNK` values each."""
    step = max(1, CHUNK // max(1, weight[0].numel()))
    if packed.layout.weights.strategy == "tensor":
        zero_point = packed.zero_point
        parts = packed.codes.split(step)
        shapes = (replace(packed.layout, shape=(len(part), *packed.layout.shape[1:])) for part in parts)
        made = [
            PackedTensor(layout, part, packed.scale, zero_point, packed.codebook)
            for layout, part in zip(shapes, parts, strict=True)
        ]
    else:
        made = [packed.part(slice(start, start + step)) for start in range(0, len(packed.codes), step)]
    return list(zip(weight.split(step), made, strict=True))


def _too_wide(row: PlanRow, dtype: torch.dtype, what: str) -> WeightValueError:
    """The error for a weight whose packed form would not be finite."""
    return WeightValueError(
        f"The range of {row.name} is too wide for {dtype}: {what} overflows.",
        f'repair the checkpoint, or skip=["{row.name}"] to keep the weight as it is',
    )
