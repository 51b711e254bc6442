"""Round to nearest with the range of each group: scale = absmax / ((2^b - 1) / 2), as compressed-tensors has it."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from ...core import scheme as schemes
from ...core.config import QuantFields, UniformFields
from ...core.errors import ConfigError
from ...core.registry import Quantized
from ...core.weights import Weight

CHUNK = 1 << 15
"""Values quantized at a time: temporary memory does not grow with the weight, the values stay in the cache, and
PyTorch starts no threads, which on a busy machine cost far more than they save."""

_ROUND = 1.5 * 2**23
"""Added and subtracted, rounds a float32 below 2^22 to the nearest integer, half to even, like `torch.round`."""


def scheme(fields: QuantFields, weight: Weight) -> schemes.Scheme | str:
    """Weight-only on the grid that the fields ask for."""
    if not isinstance(fields, UniformFields):
        raise ConfigError(f"{type(fields).__name__} has no bits and group size.")
    return schemes.scheme(schemes.weight_args(fields.bits, fields.group_size, fields.symmetric))


def quantize_scheme(weight: Tensor, given: schemes.Scheme) -> Quantized:
    """Quantize a weight to the uniform grid of a scheme.

    Args:
        weight: … × rows × columns, floating point, finite.
        given: The scheme.
    """
    if given.weights is None or given.codebook is not None:
        raise ValueError("rounding to nearest needs a uniform grid")
    return quantize(weight, given.weights)


@torch.no_grad()
def quantize(weight: Tensor, args: QuantizationArgs) -> Quantized:
    """Quantize a weight to the nearest point of its grid.

    Args:
        weight: … × rows × columns, floating point, finite.
        args: The grid: bits, strategy, group size, symmetry.

    Returns:
        Codes (int8, the weight's shape) and scales in the weight's data type. Rounding is done in float32
        with the scale as it will be stored, so a code is never off by the scale's own rounding.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    grid = uniform_grid(*torch.aminmax(rows), args, weight.dtype) if args.strategy == "tensor" else None
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    parts = []
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = _quantize_rows(rows[start : start + step], args, grid)
        codes[start : start + step] = block.codes
        parts.append(Quantized(block.codes[:0], block.scale, block.zero_point))
    if grid is not None:
        return Quantized(codes.view(weight.shape), grid[0].reshape(1), None if grid[1] is None else grid[1].reshape(1))
    shape = schemes.groups(tuple(weight.shape), args)
    scale = torch.cat([part.scale for part in parts]).view(shape)
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return Quantized(codes.view(weight.shape), scale, torch.cat(zeros).view(shape) if zeros else None)


def _quantize_rows(rows: Tensor, args: QuantizationArgs, grid: tuple[Tensor, Tensor | None] | None) -> Quantized:
    """Quantize a block of rows, on the grid of the whole weight if one is given."""
    groups = 1 if grid is not None else schemes.groups(tuple(rows.shape), args)[-1]
    grouped = rows.float().unflatten(-1, (groups, -1))
    scale, zeros = grid or uniform_grid(grouped.amin(-1), grouped.amax(-1), args, rows.dtype)
    scaled = grouped / scale.float().unsqueeze(-1)
    if zeros is not None:
        scaled += zeros.float().unsqueeze(-1)
    limit = 2 ** (args.num_bits - 1)
    codes = scaled.add_(_ROUND).sub_(_ROUND).clamp_(-limit, limit - 1).flatten(-2).to(torch.int8)
    return Quantized(codes, scale, zeros)


def uniform_grid(
    low: Tensor, high: Tensor, args: QuantizationArgs, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale in the weight's data type and zero point (int8, or None) of each group.

    Args:
        low: Smallest value of each group.
        high: Largest value of each group.
        args: The grid.
        dtype: The weight's data type.
    """
    scale, zero_point = calculate_qparams(low.float(), high.float(), args)
    stored = stored_scale(scale, args.scale_dtype or dtype, dtype)
    return stored, None if args.symmetric else zero_point.to(torch.int8)


def stored_scale(scale: Tensor, narrow: torch.dtype, dtype: torch.dtype) -> Tensor:
    """A scale as it will be stored, never zero.

    Args:
        scale: float32, positive.
        narrow: The type whose values it is limited to, by the format.
        dtype: The weight's data type, that of the result.
    """
    stored = scale.to(narrow).to(dtype)
    return torch.where(stored == 0, max(torch.finfo(narrow).tiny, torch.finfo(dtype).tiny), stored)
