"""The alternating solver of half-quadratic quantization (Badri & Shaji 2023), for any number of groups at once.

It looks for the grid of a group that minimises Σ |w - ŵ|^p with p < 1, so that a few weights outside the range may be
wrong by much if the others gain. The error is split in two: w = ŵ + e + rest. In turn, e is the error shrunk
towards zero, sign(x) · max(|x| - |x|^(p - 1) / β, 0), and the grid is the least-squares fit to w - e; β grows.

Errors are measured in steps of the grid: results don't depend on the weight's magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

POWER = 0.7

BETA = 1.5
KAPPA = 1.1
"""β is 1.5 at first, so that errors inside the range count in full, and grows by 1.1 each round."""

LOSS = 3.0
"""The grids that rounds come by are compared by Σ |w - ŵ|^3. Compared by the power 0.7 itself, too many of the largest
weights are clipped, and perplexity gets worse; between squares and cubes the differences are small."""

STARTS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8)
STARTS_OF_2_BITS = (0.9, 0.8, 0.7, 0.6)
"""Ranges to start from, as fractions of that of round to nearest: the problem is not convex, and several short
searches find more than one long one."""

ZERO_ROUNDS = 1
ROUNDS = 2


@dataclass(frozen=True)
class Grid:
    """Grids of some groups.

    Attributes:
        scale: float32, groups × 1, values that the stored data type has.
        zero_point: float32, groups × 1, or None when symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None


class Sums(NamedTuple):
    """Sums over the values of each group, groups × 1, in steps of the grid.

    Attributes:
        loss: Of |error|^LOSS.
        product: Of levels times fitted errors.
        square: Of squared levels.
    """

    loss: Tensor
    product: Tensor
    square: Tensor


def codes_of(block: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest codes, int8.

    Args:
        block: Groups × values, floating.
        grid: The groups' grids.
        bits: Bits per code.
    """
    limit = 2 ** (bits - 1)
    steps = block.float() / grid.scale
    if grid.zero_point is not None:
        steps += grid.zero_point
    return steps.round_().clamp_(-limit, limit - 1).to(torch.int8)


def fit(blocks: Sequence[Tensor], first: Grid, bits: int, stored: Sequence[torch.dtype]) -> Grid:
    """The best grids found for some groups, by `Sums.loss` never worse than the first ones.

    Args:
        blocks: Parts of the same groups, groups × values each, floating.
        first: Grids of round to nearest.
        bits: Bits per code.
        stored: Data types that scales are rounded to, in turn, when they are stored.
    """
    best, least = first, sums(blocks, first, bits).loss
    for start in STARTS_OF_2_BITS if bits == 2 else STARTS:
        grid, beta = _clipped(first, start, stored), BETA
        if grid.zero_point is not None:
            grid, beta = _moved(blocks, grid.scale, grid.zero_point, bits)
        for remaining in reversed(range(ROUNDS)):
            seen = sums(blocks, grid, bits, beta if remaining else None)
            loss = seen.loss * (grid.scale / first.scale).pow(LOSS)
            best, least = _chosen(loss < least, grid, best), torch.minimum(loss, least)
            if remaining:
                grid = _scaled(grid, 1 + seen.product / seen.square.clamp_min(1), stored)
                beta *= KAPPA
    return best


def sums(blocks: Sequence[Tensor], grid: Grid, bits: int, beta: float | None = None) -> Sums:
    """What a round needs to know of the errors on a grid.

    Args:
        blocks: Parts of the same groups, groups × values each, floating.
        grid: The groups' grids.
        bits: Bits per code.
        beta: Weight of the quadratic term; None for the loss alone.
    """
    loss, product, square = torch.zeros(3, *grid.scale.shape, device=grid.scale.device)
    for block in blocks:
        levels, error = _errors(block, grid, bits)
        size = error.abs()
        if beta is not None:
            product += _fitted(error, size, beta).mul_(levels).sum(-1, keepdim=True)
            square += levels.square_().sum(-1, keepdim=True)
        loss += _objective(size).sum(-1, keepdim=True)
    return Sums(loss, product, square)


def _objective(size: Tensor) -> Tensor:
    """|x|^LOSS, in place."""
    return size.mul_(size.square())


def _errors(block: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """Levels (codes minus zero point) and errors, both in steps."""
    limit = 2 ** (bits - 1)
    steps = block.float() / grid.scale
    zero = 0.0 if grid.zero_point is None else grid.zero_point
    levels = (steps + zero).round_().clamp_(-limit, limit - 1).sub_(zero)
    return levels, steps.sub_(levels)


def _fitted(error: Tensor, size: Tensor, beta: float) -> Tensor:
    """The error without what the shrinkage takes as e: sign(x) · min(|x|, |x|^(p - 1) / β)."""
    return torch.minimum(size, size.pow(POWER - 1).div_(beta)).copysign_(error)


def _moved(blocks: Sequence[Tensor], scale: Tensor, zero: Tensor, bits: int) -> tuple[Grid, float]:
    """The zero point fitted to the errors with the scale as it is, then made integer; and the next β."""
    beta, limit = BETA, 2 ** (bits - 1)
    count = sum(block.shape[-1] for block in blocks)
    for _ in range(ZERO_ROUNDS):
        drift = torch.zeros_like(zero)
        for block in blocks:
            _, error = _errors(block, Grid(scale, zero), bits)
            drift += _fitted(error, error.abs(), beta).sum(-1, keepdim=True)
        zero = zero - drift / count
        beta *= KAPPA
    return Grid(scale, zero.round().clamp_(-limit, limit - 1)), beta


def _clipped(first: Grid, fraction: float, stored: Sequence[torch.dtype]) -> Grid:
    """A grid of a fraction of the range; the zero point moves so that the range shrinks around its middle."""
    grid = _scaled(first, torch.full_like(first.scale, fraction), stored)
    if grid.zero_point is None:
        return grid
    return Grid(grid.scale, (grid.zero_point + 0.5) * (first.scale / grid.scale) - 0.5)


def _scaled(grid: Grid, factor: Tensor, stored: Sequence[torch.dtype]) -> Grid:
    """The grid with its scale multiplied and rounded as it will be stored, unless that would not be a scale."""
    scale = grid.scale * factor
    for dtype in stored:
        scale = scale.to(dtype)
    scale = scale.float()
    return Grid(torch.where((scale > 0) & scale.isfinite(), scale, grid.scale), grid.zero_point)


def _chosen(condition: Tensor, grid: Grid, other: Grid) -> Grid:
    """One grid where a condition holds, else the other."""
    scale = torch.where(condition, grid.scale, other.scale)
    if grid.zero_point is None or other.zero_point is None:
        return Grid(scale, None)
    return Grid(scale, torch.where(condition, grid.zero_point, other.zero_point))
