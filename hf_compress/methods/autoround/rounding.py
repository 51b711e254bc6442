"""One weight while its rounding is learned (SignRound, arXiv:2309.05516, eq. 3-5), in one pass over it per step.

A value is ŵ = (clamp(round(w / s + v) + z) - z) · s. Learned are the offset v of each weight, -0.5 … 0.5, and the
range of each group as a fraction 0.5 … 1 of that of its weights: one fraction where the grid is symmetric, one for
each end where it is not. Rounding has the gradient of the identity, clamping that of clamping.

A symmetric grid has one level more below zero than above. Its scale has the sign that puts the weight of the largest
magnitude below, so that no weight lies outside: scale = -w / 2^(bits - 1) of that weight.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...core.registry import Quantized
from ..rtn.method import uniform_grid

CHUNK = 1 << 18
"""Values worked on at a time, so that temporary memory does not grow with the weight."""

LEAST = 0.5
"""Smallest fraction of a group's range."""

_PACE = 0.4
"""Ranges move by less than offsets: at the same rate, SmolLM2's first blocks end with a tenth more error at 3 bits."""

_COARSE = 8
"""Levels on one side of a grid of 4 bits. Ranges of finer grids move in proportion to their steps: 2 % of the range
are a sixth of a step at 4 bits, but more than two at 8."""

_ROUND = 1.5 * 2**23
"""Added and subtracted, rounds a float32 below 2^22 to the nearest integer, half to even, like `torch.round`."""


class Grid(NamedTuple):
    """Grids of some groups.

    Attributes:
        scale: float32, groups × 1, values that the stored data type has.
        zero_point: float32, groups × 1, or None when symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None


class Levels(NamedTuple):
    """Weights on their grids, groups × values each.

    Attributes:
        steps: The weights divided by their scales.
        rounded: What they are rounded to, before clamping.
        codes: What they are rounded to.
    """

    steps: Tensor
    rounded: Tensor
    codes: Tensor


class Rounding:
    """A weight's offsets and ranges, and the leaf tensor that gradients are taken of.

    Args:
        weight: … × rows × columns, floating point, finite. Not changed.
        args: The grid: bits, strategy, group size, symmetry.
        dtype: Data type of the leaf; that of a float64 weight is float64.

    Attributes:
        leaf: The weight on its grid, in canonical orientation; its `grad` is what `step` reads.
    """

    def __init__(self, weight: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> None:
        self.args = args
        self.stored = weight.dtype
        self.shape = tuple(weight.shape)
        self.groups = schemes.groups(self.shape, args)
        self.weight = weight.reshape(prod(self.groups), -1).float()
        self.offset = torch.zeros_like(self.weight)
        low, high = self.weight.aminmax(dim=-1, keepdim=True)
        self.low, self.high = low.clamp_max(0), high.clamp_min(0)
        self.range_low, self.range_high = torch.ones_like(low), torch.ones_like(high)
        self.limit = 2 ** (args.num_bits - 1)
        kind = torch.float64 if weight.dtype == torch.float64 else dtype
        self.leaf = torch.empty(self.shape, dtype=kind, device=weight.device)
        rows = max(1, CHUNK // self.weight.shape[1])
        self.pace = _PACE * min(1.0, _COARSE / self.limit)
        self.parts = [slice(start, start + rows) for start in range(0, len(self.weight), rows)]
        for part in self.parts:
            self._write(part)
        self.leaf.requires_grad_()

    @torch.no_grad()
    def show(self, quantized: Quantized) -> None:
        """Put another result's values into the leaf."""
        codes = quantized.codes.reshape(self.weight.shape).float()
        if quantized.zero_point is not None:
            codes -= quantized.zero_point.reshape(-1, 1).float()
        self.leaf.copy_((codes * quantized.scale.reshape(-1, 1).float()).view(self.shape))

    @torch.no_grad()
    def step(self, rate: float) -> bool:
        """Move offsets and ranges by `rate` against the signs of their gradients; the leaf follows.

        Args:
            rate: Step, in steps of the grid for offsets, as a fraction of the range for ranges.

        Returns:
            Whether there were gradients.
        """
        if self.leaf.grad is None:
            return False
        grad = self.leaf.grad.view(self.weight.shape)
        for part in self.parts:
            self._descend(part, grad[part].float(), rate)
            self._write(part)
        self.leaf.grad = None
        return True

    def still(self) -> list[int]:
        """Numbers of the experts, of a weight experts × rows × columns, whose offsets never moved."""
        moved = (self.offset != 0).view(self.shape[0], -1).any(-1)
        return [int(expert) for expert in (~moved).nonzero()]

    @torch.no_grad()
    def result(self) -> Quantized:
        """Codes, scales and zero points as they are now; dequantized, they are the leaf's values."""
        codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        for part in self.parts:
            codes[part] = self._levels(part, self._grid(part)).codes.to(torch.int8)
        grid = self._grid(slice(None))
        zeros = None if grid.zero_point is None else grid.zero_point.to(torch.int8).view(self.groups)
        return Quantized(codes.view(self.shape), grid.scale.to(self.stored).view(self.groups), zeros)

    def gradients(self, part: slice, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of some groups' offsets and ranges; those of offsets divided by the scale's magnitude.

        With D = Σ g · ∂ŵ/∂s and Z = Σ g · ∂ŵ/∂z: ∂ŵ/∂s is the level, less w / s where it is not clamped; ∂ŵ/∂z is -s
        where it is clamped, else 0. With zero points, s = (high - low) / (2^b - 1) and z = -low / s - 2^(b - 1).

        Args:
            part: The groups.
            grad: Gradients of their values on the grid, float32, groups × values. Overwritten.

        Returns:
            For the offsets (groups × values), the lower end's fraction (groups × 1; None when symmetric) and the
            upper end's, or the whole range's.
        """
        grid = self._grid(part)
        levels = self._levels(part, grid)
        inside = levels.rounded.eq_(levels.codes)  # 1 where not clamped, else 0
        level = levels.codes if grid.zero_point is None else levels.codes.sub_(grid.zero_point)
        slope = level.addcmul_(levels.steps, inside, value=-1)
        by_scale = slope.mul_(grad).sum(-1, keepdim=True)
        total = None if grid.zero_point is None else grad.sum(-1, keepdim=True)
        by_offset = grad.mul_(inside)
        if total is None:
            return by_offset.mul_(grid.scale.sign()), None, by_scale * grid.scale / self.range_high[part]
        by_zero = (by_offset.sum(-1, keepdim=True) - total) * grid.scale
        low, high, count = self.low[part], self.high[part], 2 * self.limit - 1
        turn = by_zero * low * self.range_low[part] / (grid.scale * grid.scale * count)
        by_low = low * (-by_scale / count - by_zero / grid.scale - turn)
        return by_offset, by_low, high * (by_scale / count + turn)

    def _descend(self, part: slice, grad: Tensor, rate: float) -> None:
        """One step of some groups."""
        by_offset, by_low, by_high = self.gradients(part, grad)
        self.offset[part].add_(by_offset.sign_(), alpha=-rate).clamp_(-0.5, 0.5)
        self.range_high[part].add_(by_high.sign_(), alpha=-rate * self.pace).clamp_(LEAST, 1)
        if by_low is not None:
            self.range_low[part].add_(by_low.sign_(), alpha=-rate * self.pace).clamp_(LEAST, 1)

    def _write(self, part: slice) -> None:
        """Put some groups' values on the grid into the leaf."""
        grid = self._grid(part)
        values = self._levels(part, grid).codes
        if grid.zero_point is not None:
            values.sub_(grid.zero_point)
        self.leaf.detach().view(self.weight.shape)[part] = values.mul_(grid.scale)

    def _levels(self, part: slice, grid: Grid) -> Levels:
        """Some groups on their grids."""
        steps = self.weight[part] / grid.scale
        rounded = (steps + self.offset[part]).add_(_ROUND).sub_(_ROUND)
        if grid.zero_point is not None:
            rounded += grid.zero_point
        return Levels(steps, rounded, rounded.clamp(-self.limit, self.limit - 1))

    def _grid(self, part: slice) -> Grid:
        """Some groups' grids, their scales rounded as they will be stored."""
        low, high = self.low[part] * self.range_low[part], self.high[part] * self.range_high[part]
        if not self.args.symmetric:
            scale, zeros = uniform_grid(low, high, self.args, self.stored)
            return Grid(scale.float(), None if zeros is None else zeros.float())
        low = self.low[part] * self.range_high[part]
        narrow = self.args.scale_dtype or self.stored
        scale = torch.where(high > -low, high, low).div_(-self.limit).to(narrow).to(self.stored)
        least = max(torch.finfo(narrow).tiny, torch.finfo(self.stored).tiny)
        return Grid(torch.where(scale == 0, least, scale).float(), None)
