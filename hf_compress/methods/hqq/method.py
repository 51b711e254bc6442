"""Half-quadratic quantization: the scale, and the zero point, of each group fitted to its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...core.registry import Quantized
from ..rtn.method import CHUNK, uniform_grid
from .solver import Grid, codes_of, fit


def quantize_scheme(weight: Tensor, given: schemes.Scheme) -> Quantized:
    """Quantize a weight to the uniform grid of a scheme.

    Args:
        weight: … × rows × columns, floating point, finite.
        given: The scheme.
    """
    if given.weights is None or given.codebook is not None:
        raise ValueError("half-quadratic quantization needs a uniform grid")
    return quantize(weight, given.weights)


@torch.no_grad()
def quantize(weight: Tensor, args: QuantizationArgs) -> Quantized:
    """Quantize a weight to a grid fitted to each group.

    Args:
        weight: … × rows × columns, floating point, finite.
        args: The grid: bits, strategy, group size, symmetry.

    Returns:
        Codes (int8, the weight's shape), scales in the weight's data type, zero points (int8) unless symmetric.
        No group has a larger loss than with round to nearest.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    shape = schemes.groups(tuple(weight.shape), args)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    pieces, targets = rows.split(_step(rows)), codes.split(_step(rows))
    if args.strategy == "tensor":
        grids = [_fitted([piece.reshape(1, -1) for piece in pieces], args)]
    else:
        grids = [_fitted([piece.reshape(-1, rows.shape[1] // shape[-1])], args) for piece in pieces]
    for piece, target, grid in zip(pieces, targets, grids if len(grids) > 1 else grids * len(pieces), strict=True):
        target.copy_(codes_of(piece.reshape(len(grid.scale), -1), grid, args.num_bits).view(target.shape))
    zeros = [grid.zero_point for grid in grids if grid.zero_point is not None]
    return Quantized(
        codes.view(weight.shape),
        torch.cat([grid.scale for grid in grids]).to(weight.dtype).view(shape),
        torch.cat(zeros).to(torch.int8).view(shape) if zeros else None,
    )


def _fitted(blocks: Sequence[Tensor], args: QuantizationArgs) -> Grid:
    """The grids of some groups; blocks are parts of the same groups, groups × values each."""
    dtype = blocks[0].dtype
    low = torch.stack([block.amin(-1) for block in blocks]).amin(0)
    high = torch.stack([block.amax(-1) for block in blocks]).amax(0)
    scale, zeros = uniform_grid(low, high, args, dtype)
    first = Grid(scale.float().unsqueeze(-1), None if zeros is None else zeros.float().unsqueeze(-1))
    return fit(blocks, first, args.num_bits, (args.scale_dtype or dtype, dtype))


def _step(rows: Tensor) -> int:
    """Rows in a block of about `CHUNK` values."""
    return max(1, CHUNK // max(1, rows.shape[1]))
