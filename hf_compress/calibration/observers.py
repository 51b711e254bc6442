"""Observers of a layer's inputs: what range a static grid should cover.

They look at one tensor after the other and keep no values, so their memory does not grow with the data. Except for the
moving average, a range depends on the values alone, not on their order or on how they are split into batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from enum import StrEnum

import torch
from torch import Tensor

from ..core.errors import CalibrationError

BINS = 8192
"""Bins of a histogram on each side of zero. More than half of them are in use on the wider side."""

ENTROPY_BINS = 4096
"""Bins that the entropy search coarsens a histogram to; more than 2,048 of them, TensorRT's number, are in use."""

LEVELS = 128
"""Magnitudes of a signed 8-bit code."""

MOMENTUM = 0.1
"""Weight of the newest batch in a moving average."""

_LEAST_EXPONENT = -100
_CHUNK = 1 << 16
_CLIPS = 100
_ROUNDS = 2


class ObserverKind(StrEnum):
    """How a range is chosen."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


class Observer(ABC):
    """Looks at values and chooses a range.

    Attributes:
        count: Values seen.
        low: Smallest value seen.
        high: Largest value seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.low = math.inf
        self.high = -math.inf

    def update(self, values: Tensor) -> None:
        """Look at some values.

        Args:
            values: Floating point, of any shape; nothing happens where there are none.

        Raises:
            CalibrationError: One of them is NaN or infinite.
        """
        if values.numel() == 0:
            return
        least, most = (float(value) for value in torch.aminmax(values))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise CalibrationError(
                "It holds NaN or infinite values.",
                "look for the row of the calibration data that causes them, or load the model in float32",
            )
        self._look(values, least, most)
        self.count += values.numel()
        self.low, self.high = min(self.low, least), max(self.high, most)

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value that the grid should reach; zero is always between them.

        Raises:
            CalibrationError: No values were seen.
        """
        if self.count == 0:
            raise CalibrationError("No values were seen.", "give data that reaches it")
        low, high = self._choose()
        return min(low, 0.0), max(high, 0.0)

    @abstractmethod
    def _look(self, values: Tensor, least: float, most: float) -> None:
        """Take some values in, of which these are the extremes; `low` and `high` are still those before."""

    @abstractmethod
    def _choose(self) -> tuple[float, float]:
        """The range."""


class MinMax(Observer):
    """The extremes."""

    def _look(self, values: Tensor, least: float, most: float) -> None:
        """The base keeps them."""

    def _choose(self) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage(Observer):
    """An exponential moving average of the extremes of each batch; depends on the order and size of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self._mean = (0.0, 0.0)

    def _look(self, values: Tensor, least: float, most: float) -> None:
        weight = MOMENTUM if self.count else 1.0
        low, high = self._mean
        self._mean = (low + weight * (least - low), high + weight * (most - high))

    def _choose(self) -> tuple[float, float]:
        return self._mean


class Histogram:
    """Counts of values in bins of equal width, a power of two, so that it can grow without loss.

    Where a value lies outside, the width is doubled and neighbouring bins are merged. The bins are always those that
    counting everything at once would have given.

    Attributes:
        counts: int64, 2 · `BINS`. Bin i holds the values in [(i - BINS) · width, (i + 1 - BINS) · width).
        exponent: The width is 2 to this power.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * BINS, dtype=torch.int64)
        self.exponent = _LEAST_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def add(self, values: Tensor, largest: float) -> None:
        """Count some values.

        Args:
            values: Finite, of any shape.
            largest: The largest magnitude among them.
        """
        if largest > 0:
            self._grow(math.frexp(largest)[1] - BINS.bit_length() + 1)
        for part in values.reshape(-1).split(_CHUNK):
            bins = (part.float() * math.ldexp(1.0, -self.exponent)).floor_().long().add_(BINS)
            self.counts += torch.bincount(bins.to(self.counts.device), minlength=2 * BINS)

    def magnitudes(self, bins: int = BINS) -> Tensor:
        """Counts of |value|, int64, in this many bins that span the same range.

        Args:
            bins: A divisor of `BINS`.
        """
        folded = self.counts[BINS:] + self.counts[:BINS].flip(0)
        return folded.view(bins, -1).sum(1)

    def _grow(self, exponent: int) -> None:
        """Merge bins until they are 2^exponent wide; nothing where they are already."""
        if exponent <= self.exponent:
            return
        shift = min(exponent - self.exponent, 62)
        merged = (torch.arange(-BINS, BINS) >> shift) + BINS
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts)
        self.exponent = exponent


class _Binned(Observer):
    """An observer that keeps a histogram."""

    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.histogram = Histogram()

    def _look(self, values: Tensor, least: float, most: float) -> None:
        self.histogram.add(values, max(-least, most))

    @property
    def largest(self) -> float:
        """The largest magnitude seen."""
        return max(-self.low, self.high)

    def _within(self, limit: float) -> tuple[float, float]:
        """A range around zero, no wider than what was seen."""
        limit = min(limit, self.largest)
        return (-limit, limit) if self.symmetric else (max(self.low, -limit), min(self.high, limit))


class Percentile(_Binned):
    """The range that holds a percentage of all values: of magnitudes where symmetric, else at both ends.

    Right up to the width of a bin, less than 1/4096 of the largest magnitude.

    Args:
        symmetric: Whether the grid has zero in its middle.
        percentile: In percent, above 50; 100 gives the extremes.
    """

    def __init__(self, symmetric: bool, percentile: float) -> None:
        super().__init__(symmetric)
        self.percentile = percentile

    def _choose(self) -> tuple[float, float]:
        width = self.histogram.width
        if self.symmetric:
            return self._within(width * (1 + self._bin_of(self.histogram.magnitudes())))
        high = width * (1 + self._bin_of(self.histogram.counts) - BINS)
        low = -width * (1 + self._bin_of(self.histogram.counts.flip(0)) - BINS)
        return max(self.low, low), min(self.high, high)

    def _bin_of(self, counts: Tensor) -> int:
        """The first bin up to which there are enough values."""
        wanted = math.ceil(self.count * self.percentile / 100)
        return int(torch.searchsorted(counts.cumsum(0), wanted))


class MeanSquaredError(_Binned):
    """The range whose 8-bit grid has the smallest mean squared error over the histogram.

    Symmetric: the best of 100 limits, evenly spaced up to the largest magnitude. Asymmetric: the same for the upper
    end, then for the lower one, twice. Values count as the middle of their bin.
    """

    def _choose(self) -> tuple[float, float]:
        counts = self.histogram.counts
        used = counts.nonzero().squeeze(1)
        values = (used - BINS + 0.5).double() * self.histogram.width
        weights = counts[used].double()
        steps = torch.arange(1, _CLIPS + 1, dtype=torch.float64) / _CLIPS
        if self.symmetric:
            limits = steps * self.largest
            best = float(limits[_errors(values, weights, -limits, limits, symmetric=True).argmin()])
            return -best, best
        lowest, highest = min(self.low, 0.0), max(self.high, 0.0)
        low = torch.tensor(lowest, dtype=torch.float64)
        high = torch.tensor(highest, dtype=torch.float64)
        for _ in range(_ROUNDS):
            uppers, lowers = steps * highest, steps * lowest
            high = uppers[_errors(values, weights, low.expand(_CLIPS), uppers, symmetric=False).argmin()]
            low = lowers[_errors(values, weights, lowers, high.expand(_CLIPS), symmetric=False).argmin()]
        return float(low), float(high)


def _errors(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> Tensor:
    """Weighted squared error of the 8-bit grid of each range, on compressed-tensors' grid.

    Args:
        values: Values, float64 (n).
        weights: How often each occurs, float64 (n).
        low: Lower ends, float64 (ranges).
        high: Upper ends, float64 (ranges).
        symmetric: Whether zero is the middle of the grid.
    """
    found = []
    for lower, upper in zip(low.tolist(), high.tolist(), strict=True):
        step = (max(-lower, upper) * 2 if symmetric else upper - lower) / 255 or 1.0
        zero = 0 if symmetric else min(max(round(-128 - lower / step), -128), 127)
        rounded = (values / step + zero).round().clamp(-128, 127).sub(zero).mul(step)
        found.append(float((weights * (rounded - values) ** 2).sum()))
    return torch.tensor(found, dtype=torch.float64)


class Entropy(_Binned):
    """The limit whose 128 levels lose least information: TensorRT's calibration.

    S. Migacz, "8-bit Inference with TensorRT" (GTC 2017), the pseudocode of entropy calibration. Where asymmetric,
    the range is cut to what was seen on either side.
    """

    def _choose(self) -> tuple[float, float]:
        counts = self.histogram.magnitudes(ENTROPY_BINS)
        kept = best_cut(counts)
        if kept is None:
            return self._within(self.largest)
        return self._within((kept + 0.5) * self.histogram.width * (BINS // ENTROPY_BINS))


def best_cut(counts: Tensor, levels: int = LEVELS) -> int | None:
    """How many bins to keep so that the divergence is smallest; None where there are no more bins than levels.

    Args:
        counts: Counts of magnitudes, int64 (bins); empty ones at the end are left out.
        levels: Levels of the grid.
    """
    used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
    if used <= levels:
        return None
    return levels + int(divergences(counts[:used], levels).argmin())


def divergences(counts: Tensor, levels: int = LEVELS) -> Tensor:
    """Kullback-Leibler divergence of the clipped from the quantized distribution, for each number of kept bins.

    With n bins kept, P is the first n counts, all others added to the last of them. Q is the same without these,
    quantized: level j spans the bins from ⌊j·n/levels⌋ on, and its sum is spread evenly over those of its bins that
    are not empty in P. Both are normalised. The divergence is Σ P·ln(P/Q). A last level that holds nothing but what
    was clipped counts as one value, else a single far outlier could never be clipped; infinite where nothing is kept.

    Args:
        counts: Counts of magnitudes, int64 (bins).
        levels: Levels of the grid.

    Returns:
        float64 (bins - levels + 1), for `levels` kept bins up to all of them.
    """
    sizes = torch.arange(levels, len(counts) + 1)
    edges = torch.arange(levels + 1).unsqueeze(0) * sizes.unsqueeze(1) // levels
    values = counts.double()
    total = values.sum()
    below = _sums(values)
    last = values[sizes - 1]
    clipped = last + total - below[sizes]
    changed = (clipped > 0).double() - (last > 0).double()  # the last bin may be filled by what was clipped alone
    sums = below[edges].diff(dim=1)
    filled = _sums((values > 0).double())[edges].diff(dim=1)
    filled[:, -1] += changed
    mass = sums.clone()
    mass[:, -1] += total - below[sizes]
    own = _sums(torch.special.xlogy(values, values))[sizes] - torch.special.xlogy(last, last)
    entropy = own + torch.special.xlogy(clipped, clipped) - total * total.log()
    kept = below[sizes]
    sums[:, -1] += ((sums[:, -1] == 0) & (mass[:, -1] > 0)).double()
    spread = sums / filled.clamp(min=1) / sums.sum(1, keepdim=True)
    found = (entropy - torch.special.xlogy(mass, spread).sum(1)) / total
    return found.masked_fill(kept == 0, math.inf)


def _sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, …, n values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def make_observer(kind: ObserverKind, symmetric: bool, percentile: float = 99.99) -> Observer:
    """An observer by its name.

    Args:
        kind: Which one.
        symmetric: Whether the grid has zero in its middle.
        percentile: Of `ObserverKind.PERCENTILE`, in percent.
    """
    if kind is ObserverKind.MINMAX:
        return MinMax()
    if kind is ObserverKind.MOVING_AVERAGE:
        return MovingAverage()
    if kind is ObserverKind.PERCENTILE:
        return Percentile(symmetric, percentile)
    return MeanSquaredError(symmetric) if kind is ObserverKind.MSE else Entropy(symmetric)
