"""Observers against oracles that see all values at once, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.calibration.observers import (
    BINS,
    MOMENTUM,
    Entropy,
    Histogram,
    MeanSquaredError,
    Observer,
    ObserverKind,
    Percentile,
    best_cut,
    divergences,
    make_observer,
)
from hf_compress.core.errors import CalibrationError

KINDS = [kind for kind in ObserverKind if kind is not ObserverKind.MOVING_AVERAGE]
BIN = 2 / BINS
"""Largest width of a bin, as a fraction of the largest magnitude: more than half of the bins are in use."""


def values(seed: int, count: int = 5000, kind: str = "normal") -> Tensor:
    """Values as layers see them: normal, after a ReLU, with outliers, or shifted."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    if kind == "relu":
        return drawn.clamp(min=0)
    if kind == "outliers":
        drawn[::997] *= 60
    return drawn + 2.5 if kind == "shifted" else drawn


def seen(observer: Observer, data: Tensor, parts: int = 1) -> Observer:
    for part in data.chunk(parts):
        observer.update(part)
    return observer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", ["normal", "relu", "outliers", "shifted"])
def test_order_and_batches_do_not_matter(kind: ObserverKind, symmetric: bool, shape: str) -> None:
    data = values(3, kind=shape)
    mixed = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))]
    whole = seen(make_observer(kind, symmetric), data).range()
    assert seen(make_observer(kind, symmetric), data, parts=13).range() == whole
    assert seen(make_observer(kind, symmetric), mixed.sort().values, parts=5).range() == whole


@pytest.mark.parametrize("kind", list(ObserverKind))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", ["normal", "relu", "outliers", "shifted"])
def test_ranges_lie_within_what_was_seen_and_hold_zero(kind: ObserverKind, symmetric: bool, shape: str) -> None:
    data = values(5, kind=shape)
    low, high = seen(make_observer(kind, symmetric), data, parts=3).range()
    limit = float(data.abs().max())
    assert -limit <= low <= 0 <= high <= limit
    assert high > 0


def test_extremes_are_exact() -> None:
    data = values(0)
    assert seen(make_observer(ObserverKind.MINMAX, True), data, 7).range() == (float(data.min()), float(data.max()))


def test_moving_average_is_the_recursion() -> None:
    parts = values(2).chunk(6)
    low, high = float(parts[0].min()), float(parts[0].max())
    for part in parts[1:]:
        low = (1 - MOMENTUM) * low + MOMENTUM * float(part.min())
        high = (1 - MOMENTUM) * high + MOMENTUM * float(part.max())
    found = seen(make_observer(ObserverKind.MOVING_AVERAGE, True), values(2), 6).range()
    assert found == pytest.approx((low, high), rel=1e-12)  # the same sums in another order, float64


@settings(deadline=None, max_examples=60)
@given(
    scales=st.lists(st.floats(min_value=1e-12, max_value=1e12), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_grown_histogram_is_that_of_all_values_at_once(scales: list[float], seed: int) -> None:
    """Widths are powers of two and edges lie on multiples of them, so merging loses nothing."""
    parts = [values(seed + index, 200) * scale for index, scale in enumerate(scales)]
    grown, whole = Histogram(), Histogram()
    for part in parts:
        grown.add(part, float(part.abs().max()))
    data = torch.cat(parts)
    whole.add(data, float(data.abs().max()))
    assert grown.exponent == whole.exponent
    assert torch.equal(grown.counts, whole.counts)
    assert int(whole.counts.sum()) == len(data)


def test_bins_are_where_they_say() -> None:
    histogram, data = Histogram(), values(9, 2000)
    histogram.add(data, float(data.abs().max()))
    for index in (BINS - 40, BINS - 1, BINS, BINS + 700):
        low = (index - BINS) * histogram.width
        inside = (data >= low) & (data < low + histogram.width)
        assert int(histogram.counts[index]) == int(inside.sum())
    used = int(histogram.magnitudes().nonzero().max()) + 1
    assert BINS / 2 < used <= BINS


def test_zeros_leave_the_histogram_as_fine_as_it_can_be() -> None:
    histogram = Histogram()
    histogram.add(torch.zeros(5), 0.0)
    small = values(1) * 1e-9
    histogram.add(small, float(small.abs().max()))
    assert histogram.width < 2e-9 * float(small.abs().max() / 1e-9) * BIN


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("shape", ["normal", "relu", "outliers", "shifted"])
def test_percentile_is_the_order_statistic_up_to_a_bin(percentile: float, shape: str) -> None:
    data = values(8, 40_000, shape)
    rank = math.ceil(len(data) * percentile / 100) - 1
    tolerance = BIN * float(data.abs().max())
    low, high = seen(Percentile(True, percentile), data, 4).range()
    assert low == -high
    assert abs(high - float(data.abs().double().sort().values[rank])) <= tolerance
    low, high = seen(Percentile(False, percentile), data, 4).range()
    ordered = data.double().sort().values
    assert abs(high - max(float(ordered[rank]), 0)) <= tolerance
    assert abs(low - min(float(ordered[-1 - rank]), 0)) <= tolerance


def error_of(data: Tensor, low: float, high: float, symmetric: bool) -> float:
    """Mean squared error of an 8-bit grid, on the values themselves, in float64."""
    step = 2 * max(-low, high) / 255 if symmetric else (high - low) / 255
    zero = 0.0 if symmetric else min(max(round(-128 - low / step), -128), 127)
    codes = torch.clamp(torch.round(data.double() / step + zero), -128, 127)
    return float((((codes - zero) * step) - data.double()).square().mean())


@pytest.mark.parametrize("shape", ["normal", "relu", "outliers", "shifted"])
def test_mean_squared_error_is_that_of_the_best_of_all_limits(shape: str) -> None:
    """Brute force on the values. Bins shift a value by at most half a width, an 1/32 of a step of the full range."""
    data = values(4, 20_000, shape)
    limit = float(data.abs().max())
    best = min(error_of(data, -limit * k / 100, limit * k / 100, True) for k in range(1, 101))
    low, high = seen(MeanSquaredError(True), data, 3).range()
    assert error_of(data, low, high, True) <= best * 1.01


def test_mean_squared_error_of_two_ends_is_that_of_all_pairs() -> None:
    """Brute force over 20 × 20 ranges on the values, a fifth as fine as the search; 1 % for the bins, as above."""
    data = values(4, 60_000)
    data[0], data[1] = 8.0, -7.0
    pairs = ((-7.0 * i / 20, 8.0 * j / 20) for i in range(1, 21) for j in range(1, 21))
    best = min(error_of(data, low, high, False) for low, high in pairs)
    low, high = seen(MeanSquaredError(False), data).range()
    assert error_of(data, low, high, False) <= best * 1.01
    assert -7 < low < 0 < high < 8


def slow_divergence(counts: list[int], kept: int, levels: int) -> float:
    """KL(P ‖ Q) from the definition, bin by bin in float64."""
    total = sum(counts)
    clipped = [float(count) for count in counts[:kept]]
    clipped[-1] += sum(counts[kept:])
    spread = [0.0] * kept
    for level in range(levels):
        bins = range(level * kept // levels, (level + 1) * kept // levels)
        filled = [index for index in bins if clipped[index] > 0]
        for index in filled:
            last = level == levels - 1
            spread[index] = max(sum(counts[index] for index in bins), int(last)) / len(filled)
    if sum(counts[:kept]) == 0:
        return math.inf
    divergence, whole = 0.0, sum(spread)
    for mine, other in zip(clipped, spread, strict=True):
        if mine > 0:
            divergence += mine / total * math.log((mine / total) / (other / whole))
    return divergence


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 7, 50, 1000]), min_size=9, max_size=60),
    levels=st.integers(2, 8),
)
def test_divergence_is_that_of_the_definition(counts: list[int], levels: int) -> None:
    """Relative 1e-9: sums of at most 60 float64 terms, taken as differences of running sums."""
    if sum(counts) == 0:
        counts[0] = 1
    found = divergences(torch.tensor(counts), levels).tolist()
    wanted = [slow_divergence(counts, kept, levels) for kept in range(levels, len(counts) + 1)]
    for mine, slow in zip(found, wanted, strict=True):
        assert mine == slow or mine == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_entropy_takes_the_smallest_divergence() -> None:
    data = values(6, 200_000, "outliers").abs()
    counts = torch.histc(data, bins=512)
    slow = [slow_divergence(counts.int().tolist(), kept, 128) for kept in range(128, 513)]
    assert best_cut(counts.long()) == 128 + slow.index(min(slow))


def test_entropy_cuts_outliers_and_keeps_what_is_uniform() -> None:
    outliers = values(6, 200_000)
    outliers[0] = 200.0
    assert seen(Entropy(True), outliers, 4).range()[1] < 20
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert seen(Entropy(True), uniform, 4).range()[1] > 0.9
    low, high = seen(Entropy(False), values(6, 20_000, "relu")).range()
    assert low == 0
    assert high > 1


@pytest.mark.parametrize("kind", list(ObserverKind))
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_that_say_little(kind: ObserverKind, symmetric: bool) -> None:
    assert seen(make_observer(kind, symmetric), torch.zeros(10)).range() == (0.0, 0.0)
    low, high = seen(make_observer(kind, symmetric), torch.full((10,), 3.0)).range()
    assert high == pytest.approx(3.0, rel=0.02)  # the coarsest search has steps of 1 %
    assert low in (0.0, -high, 3.0)


@pytest.mark.parametrize("kind", list(ObserverKind))
def test_nothing_seen_and_not_finite(kind: ObserverKind) -> None:
    observer = make_observer(kind, True)
    observer.update(torch.zeros(0, 4))
    with pytest.raises(CalibrationError, match="No values"):
        observer.range()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            observer.update(torch.tensor([1.0, bad]))
    assert observer.count == 0


@pytest.mark.parametrize("kind", list(ObserverKind))
def test_memory_does_not_grow_with_the_data(kind: ObserverKind) -> None:
    observer = make_observer(kind, False)

    def held() -> int:
        histogram = vars(observer).get("histogram")
        parts = [*vars(observer).values(), *(vars(histogram).values() if histogram is not None else ())]
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    observer.update(values(0, 100))
    before = held()
    for seed in range(20):
        observer.update(values(seed, 10_000) * (seed + 1))
    assert held() == before <= 2 * BINS * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_data_types(dtype: torch.dtype) -> None:
    data = values(1).to(dtype)
    for kind in ObserverKind:
        low, high = seen(make_observer(kind, True), data).range()
        assert low < 0 < high <= float(data.abs().max())
