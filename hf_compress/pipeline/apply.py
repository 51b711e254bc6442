"""Carrying out a plan, one weight at a time: check, quantize, pack, measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import IncompleteLoadError, WeightValueError
from ..core.plan import Plan, PlanRow
from ..core.registry import METHODS
from ..formats.base import layout_of
from ..modules.packed import Layout, PackedTensor, allocate, dequantize, pack

Progress = Callable[[int, int], None]
"""Called with the number of weights done and the number planned."""

CHUNK = 1 << 15


def pack_weight(row: PlanRow, parameter: Tensor, method: str) -> tuple[PackedTensor, float | None]:
    """Quantize and pack one weight.

    Args:
        row: Its row of the plan.
        parameter: The dense parameter, in the module's own orientation.
        method: Name of the method.

    Returns:
        The packed weight, and its signal-to-quantization-noise ratio in dB (None when exact).

    Raises:
        WeightValueError: It holds NaN or infinite values, or nothing, or values that the method can't quantize.
        IncompleteLoadError: It has another shape than the model's parameter.
    """
    layout = layout_of(row)
    if tuple(parameter.shape) != layout.parameter_shape:
        raise IncompleteLoadError(
            f"{row.name} has shape {tuple(parameter.shape)} in the checkpoint, {layout.parameter_shape} in the model.",
            "check that the config belongs to the weights",
        )
    weight = _canonical(parameter.detach(), layout)
    check_values(row.name, weight)
    run = METHODS.get(method).quantize
    if run is None:
        raise ValueError(f"the method {method!r} packs nothing")
    packed = allocate(layout, weight.dtype, weight.device)
    try:
        quantized = run(weight, layout.scheme)
    except WeightValueError as error:
        raise WeightValueError(f"{row.name}: {error.message}", f'{error.fix}, or skip=["{row.name}"]') from None
    if not bool(torch.isfinite(quantized.scale).all()):
        raise _too_wide(row, quantized.scale.dtype, "a scale")
    flat = replace(layout, kernel=())
    unpacked = PackedTensor(flat, quantized.codes, quantized.scale, quantized.zero_point, quantized.codebook)
    noise = sqnr_db(weight, unpacked)
    if noise is not None and math.isnan(noise):
        raise _too_wide(row, quantized.scale.dtype, "a code times its scale")
    return pack(quantized, layout, packed), noise


def _too_wide(row: PlanRow, dtype: torch.dtype, what: str) -> WeightValueError:
    """The error for a weight whose packed form would not be finite."""
    return WeightValueError(
        f"The range of {row.name} is too wide for {dtype}: {what} overflows.",
        f'repair the checkpoint, or skip=["{row.name}"] to keep the weight as it is',
    )


def _canonical(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter as rows × columns, experts first."""
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


def with_results(plan: Plan, sqnr: Mapping[str, float | None]) -> Plan:
    """The plan with measured noise per weight."""
    rows = tuple(row.model_copy(update={"sqnr_db": sqnr.get(row.name)}) for row in plan.rows)
    return plan.model_copy(update={"rows": rows})
