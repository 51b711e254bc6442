"""Activation-aware scales and clipped ranges, by the error that they leave in a layer's output.

Both searches measure a weight's error by tr(ΔW G ΔWᵀ) with the Gram matrix G = Σ x xᵀ of the weight's input: the
squared error of the layer's output over all calibration tokens, without running it again for each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...core.registry import Quantized
from ..rtn.method import uniform_grid

CHUNK = 1 << 18
"""Values of a weight worked on at a time. Bounds temporary memory, which is largest in the clip search of whole
channels: 25 times as many values, about 100 MiB in all."""

FRACTIONS = tuple(1.1 - 0.025 * step for step in range(25))
"""Of a group's range, that the clip search tries. Symmetric grids have one level less above zero than below, so a grid
slightly wider than that of round to nearest can be the best."""

SWEEPS = 3
"""Times that the clip search goes through the groups of a row."""

COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SAMPLE = 64
"""Fractions, and number of rows of a weight, that judge scales where ranges are clipped afterwards. Judged without
clipping, scales mostly make up for the few largest weights of a group, which clipping does better."""

_ROUND = 1.5 * 2**23
"""Added and subtracted, rounds a float32 below 2^22 to the nearest integer, half to even."""


@dataclass(frozen=True)
class Consumer:
    """A weight whose columns are scaled.

    Attributes:
        weight: Canonical, rows × columns, floating.
        gram: Σ x xᵀ of its input, float32, columns × columns.
        args: Its grid.
        index: Channel of each column (int64), or None where they are the same.
    """

    weight: Tensor
    gram: Tensor
    args: QuantizationArgs
    index: Tensor | None = None

    def columns(self, scales: Tensor) -> Tensor:
        """The scale of each column."""
        return scales if self.index is None else scales[self.index]


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(ΔW G ΔWᵀ).

    Args:
        error: ΔW, rows × columns, float32.
        gram: G, columns × columns, float32.
    """
    return float(torch.sum((error @ gram).mul_(error), dtype=torch.float64))


def ranges(rows: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, rows × groups; 1 × 1 where the whole tensor shares a grid.

    Args:
        rows: Rows × columns, floating.
        args: The grid.
    """
    if args.strategy == "tensor":
        low, high = torch.aminmax(rows)
        return low.view(1, 1), high.view(1, 1)
    count = schemes.groups(tuple(rows.shape), args)[-1]
    low, high = torch.aminmax(rows.unflatten(-1, (count, -1)), dim=-1)
    return low, high


def round_trip(rows: Tensor, low: Tensor, high: Tensor, args: QuantizationArgs, dtype: torch.dtype) -> Tensor:
    """Rows quantized to given ranges and back, float32.

    Args:
        rows: … × rows × columns, float32.
        low: Smallest value of each group, … × rows × groups.
        high: Largest value of each group.
        args: The grid.
        dtype: The data type that scales are stored in.
    """
    scale, zeros = uniform_grid(low, high, args, dtype)
    wide = scale.float().unsqueeze(-1)
    steps = _steps(rows, wide, None if zeros is None else zeros.float().unsqueeze(-1), args.num_bits)
    if zeros is not None:
        steps -= zeros.float().unsqueeze(-1)
    return steps.mul_(wide).flatten(-2)


def quantize_ranges(weight: Tensor, low: Tensor, high: Tensor, args: QuantizationArgs) -> Quantized:
    """Quantize a weight to the nearest points of grids with given ranges.

    Args:
        weight: Rows × columns, floating.
        low: Smallest value of each group, rows × groups.
        high: Largest value of each group.
        args: The grid, of groups or channels.
    """
    scale, zeros = uniform_grid(low, high, args, weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        wide = None if zeros is None else zeros[rows].float().unsqueeze(-1)
        steps = _steps(weight[rows].float(), scale[rows].float().unsqueeze(-1), wide, args.num_bits)
        codes[rows] = steps.flatten(-2).to(torch.int8)
    return Quantized(codes, scale, zeros)


def _steps(rows: Tensor, scale: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Nearest codes of rows, as float32 groups."""
    limit = 2 ** (bits - 1)
    steps = rows.unflatten(-1, (scale.shape[-2], -1)) / scale
    if zeros is not None:
        steps += zeros
    return steps.add_(_ROUND).sub_(_ROUND).clamp_(-limit, limit - 1)


def scaled_error(consumer: Consumer, scales: Tensor) -> float:
    """The output error of a weight that is rounded under channel scales, Q(W·s)/s - W (arXiv:2306.00978, eq. 4).

    Args:
        consumer: The weight.
        scales: Positive, float32, channels.
    """
    weight, columns, args, total = consumer.weight, consumer.columns(scales), consumer.args, 0.0
    whole = ranges(weight.float() * columns, args) if args.strategy == "tensor" else None
    for part in weight.split(max(1, CHUNK // weight.shape[1])):
        rows = part.float()
        scaled = rows * columns
        made = round_trip(scaled, *(whole or ranges(scaled, args)), args, weight.dtype)
        total += output_error(made.div_(columns).sub_(rows), consumer.gram)
    return total


def clipped_error(consumer: Consumer, scales: Tensor) -> float:
    """The output error of evenly spaced rows of a weight that are scaled, clipped coarsely and rounded.

    Args:
        consumer: The weight.
        scales: Positive, float32, channels.
    """
    if consumer.args.strategy == "tensor":
        return scaled_error(consumer, scales)
    columns, weight = consumer.columns(scales), consumer.weight
    rows = weight[:: -(-len(weight) // SAMPLE)].float() * columns
    search = Clipping(rows, consumer.gram, consumer.args, weight.dtype, columns)
    search.run(COARSE, 1)
    return output_error(search.error, consumer.gram)


def candidates(activation: Tensor, weight: Tensor, grid: int) -> list[Tensor]:
    """Scales to try: activation^a, and activation^a / weight^(1 - a), for `grid` values of a each.

    Args:
        activation: Magnitude of each channel's activations, float32, channels.
        weight: Magnitude of each channel's weights in their groups, 0 to 1, float32, channels.
        grid: Number of values of a, in steps of 1 / grid.

    Returns:
        All ones first; the others divided by the geometric mean of their smallest and largest value, as the authors'
        code does.
    """
    size = activation.clamp_min(1e-6 * float(activation.max())).clamp_min(1e-30)
    share = weight.clamp_min(1e-4)
    made = [torch.ones_like(size)]
    made += [_normalised(size.pow(step / grid)) for step in range(1, grid + 1)]
    made += [_normalised(size.pow(step / grid) / share.pow(1 - step / grid)) for step in range(grid)]
    return made


def best_scales(consumers: Sequence[Consumer], activation: Tensor, grid: int, clip: bool) -> tuple[Tensor, float]:
    """The candidate with the least output error, summed over the weights that share the scales.

    Args:
        consumers: The weights.
        activation: Magnitude of each channel's activations, float32, channels.
        grid: See `candidates`.
        clip: Whether the error is that of clipped ranges, on a sample of rows.

    Returns:
        Scales (float32, channels), and their error relative to no scales (at most 1).
    """
    tried = candidates(activation, channel_share(consumers, len(activation)), grid)
    measure = clipped_error if clip else scaled_error
    errors = [sum(measure(one, scales) for one in consumers) for scales in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return tried[best], errors[best] / errors[0] if errors[0] > 0 else 1.0


def channel_share(consumers: Sequence[Consumer], channels: int) -> Tensor:
    """Mean over rows of |w| relative to the largest of its group, by channel: how much of its grid a channel uses."""
    total, count = torch.zeros(channels), torch.zeros(channels)
    for one in consumers:
        size = one.weight.float().abs()
        groups = 1 if one.args.strategy == "tensor" else schemes.groups(tuple(size.shape), one.args)[-1]
        wide = size.unflatten(-1, (groups, -1))
        largest = wide.amax() if one.args.strategy == "tensor" else wide.amax(-1, keepdim=True)
        share = (wide / largest.clamp_min(1e-30)).flatten(-2).sum(0)
        index = torch.arange(channels) if one.index is None else one.index
        total.index_add_(0, index, share)
        count.index_add_(0, index, torch.full_like(share, float(len(size))))
    return total / count.clamp_min(1)


def _normalised(scales: Tensor) -> Tensor:
    """Scales divided by the geometric mean of the smallest and the largest."""
    return scales / (scales.amin() * scales.amax()).sqrt()


def clipped_ranges(
    weight: Tensor, gram: Tensor, args: QuantizationArgs, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each group of each row the fraction of its range that leaves the least output error.

    Args:
        weight: Rows × columns, floating.
        gram: Columns × columns, float32; of the input before it was divided by `columns`.
        args: The grid, of groups or channels.
        columns: What the weight's columns were multiplied by, or None.

    Returns:
        Smallest and largest value of each group, rows × groups, float32.
    """
    found = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        search = Clipping(rows.float(), gram, args, weight.dtype, columns)
        search.run(FRACTIONS, SWEEPS)
        found.append((search.low, search.high))
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


class Clipping:
    """The clip search of some rows.

    Groups are decided in turn with the errors of the other groups as they are, so what is minimised is tr(ΔW G ΔWᵀ)
    with all of G and not only its diagonal blocks: a row's error never grows on the way.

    Args:
        rows: Rows × columns, float32.
        gram: Columns × columns, float32; of the input before it was divided by `columns`.
        args: The grid, of groups or channels.
        dtype: The data type that scales are stored in.
        columns: What the rows' columns were multiplied by, or None.

    Attributes:
        low: Smallest value of each group as it is clipped now, rows × groups.
        high: Largest value of each group, likewise.
        error: ΔW as it is now, divided by `columns`, rows × columns, float32.
    """

    def __init__(
        self, rows: Tensor, gram: Tensor, args: QuantizationArgs, dtype: torch.dtype, columns: Tensor | None = None
    ) -> None:
        self.rows, self.gram, self.args, self.dtype = rows, gram, args, dtype
        self.columns = torch.ones(rows.shape[1], device=rows.device) if columns is None else columns
        self.full = ranges(rows, args)
        self.low, self.high = self.full
        self.error = round_trip(rows, *self.full, args, dtype).sub_(rows).div_(self.columns)

    def run(self, fractions: Sequence[float], sweeps: int) -> None:
        """Go through the groups.

        Args:
            fractions: Of each group's range, to try.
            sweeps: Number of times.
        """
        tried = torch.tensor(fractions).view(-1, 1, 1)
        low, high = self.full[0] * tried, self.full[1] * tried
        scale, zeros = uniform_grid(low, high, self.args, self.dtype)
        grids = scale.float(), None if zeros is None else zeros.float()
        chosen = torch.full(self.low.shape, -1)
        for _ in range(sweeps):
            for group in range(chosen.shape[1]):
                self._improve(group, *grids, chosen)
        pick = chosen.clamp_min(0).unsqueeze(0)
        self.low = torch.where(chosen < 0, self.low, low.gather(0, pick)[0])
        self.high = torch.where(chosen < 0, self.high, high.gather(0, pick)[0])

    def _improve(self, group: int, scale: Tensor, zeros: Tensor | None, chosen: Tensor) -> None:
        """Choose the range of one group for all rows at once; as it is where no fraction is better.

        Args:
            group: Its number.
            scale: Of all candidates, fractions × rows × groups.
            zeros: Likewise, or None.
            chosen: Number of the fraction chosen so far, rows × groups, or -1; changed.
        """
        width = self.rows.shape[1] // chosen.shape[1]
        at = slice(group * width, (group + 1) * width)
        block, own, now = self.rows[:, at], self.gram[at, at], self.error[:, at]
        others = (self.error @ self.gram[:, at]).sub_(now @ own).mul_(2)
        least = (now @ own).add_(others).mul_(now).sum(-1)
        wide = scale[:, :, group, None, None]
        zero = None if zeros is None else zeros[:, :, group, None, None]
        steps = _steps(block, wide, zero, self.args.num_bits)
        if zero is not None:
            steps -= zero
        made = steps.mul_(wide).squeeze(-2).sub_(block).div_(self.columns[at])
        loss, best = (made @ own).add_(others).mul_(made).sum(-1).min(0)
        better = loss < least
        picked = made.gather(0, best.view(1, -1, 1).expand(1, -1, width))[0]
        self.error[:, at] = torch.where(better.unsqueeze(-1), picked, now)
        chosen[:, group] = torch.where(better, best, chosen[:, group])
