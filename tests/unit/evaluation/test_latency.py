"""The interleaved timer, driven by a clock that only the timed calls advance."""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.core.errors import MeasurementError
from hf_compress.evaluation.latency import (
    LatencyComparison,
    compare_many,
    measure_latency,
    median_interval,
    synchronizer,
)


class Clock:
    """Whole seconds, so that differences are exact; stands still unless work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, durations: Iterable[float]) -> Callable[[], object]:
        remaining = iter(durations)

        def call() -> object:
            self.log.append(name)
            self.now += next(remaining)
            return None

        return call


def compare(candidate: list[int], baseline: list[int]) -> LatencyComparison:
    clock = Clock()
    return measure_latency(
        clock.work("c", candidate), clock.work("b", baseline), pairs=len(baseline), warmup=0, clock=clock
    )


def test_numbers_against_hand_calculation() -> None:
    result = compare([10, 11, 12, 13, 14, 15, 16, 17, 18], [20] * 9)
    assert result.speedup == pytest.approx(20 / 14)
    assert (result.speedup_low, result.speedup_high) == pytest.approx((20 / 18, 20 / 10))
    assert result.confidence == 1 - 2 / 2**9
    assert result.candidate.p50_ms == pytest.approx(14e3)
    assert result.candidate.p95_ms == pytest.approx(17.6e3)
    assert result.candidate.min_ms == pytest.approx(10e3)
    assert result.candidate.iqr_ms == pytest.approx(4e3)
    assert result.baseline.iqr_ms == 0
    assert result.verdict == "faster"


def test_order_is_swapped_every_pair_after_warmup() -> None:
    clock = Clock()
    forever = itertools.repeat(1.0)
    measure_latency(clock.work("c", forever), clock.work("b", forever), pairs=8, warmup=2, clock=clock)
    assert "".join(clock.log) == "bcbc" + "bccb" * 4


def test_warmup_is_not_in_the_numbers() -> None:
    clock = Clock()
    slow_start = itertools.chain([1000.0, 1000.0], itertools.repeat(2.0))
    result = measure_latency(
        clock.work("c", slow_start), clock.work("b", itertools.repeat(2.0)), pairs=8, warmup=2, clock=clock
    )
    assert result.candidate.p95_ms == 2000
    assert result.warmup == 2


def test_drift_hits_both_sides_alike() -> None:
    clock = Clock()

    def drifting() -> object:
        clock.now += 100 + clock.now / 100
        return None

    result = measure_latency(drifting, drifting, pairs=30, warmup=0, clock=clock)
    assert result.verdict == "same"
    assert result.speedup == pytest.approx(1, abs=1e-6)
    assert result.baseline.p95_ms > 1.5 * result.baseline.min_ms


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [(1040, "same"), (1060, "slower"), (960, "same"), (940, "faster"), (1000, "same")],
)
def test_five_percent_margin(candidate: int, verdict: str) -> None:
    assert compare([candidate] * 10, [1000] * 10).verdict == verdict


def test_a_big_ratio_without_evidence_is_no_verdict() -> None:
    noisy = compare([20, 20, 20, 20, 20, 20, 20, 5], [10] * 8)
    assert noisy.speedup == pytest.approx(0.5)
    assert noisy.speedup_high > 1
    assert noisy.verdict == "same"


def test_headline_says_slower_first_and_by_how_much() -> None:
    slow = compare([25] * 8, [10] * 8).headline()
    assert slow.startswith("SLOWER THAN THE ORIGINAL: takes 2.50 times as long")
    for other in (compare([10] * 8, [25] * 8), compare([10] * 8, [10] * 8)):
        assert "SLOWER" not in other.headline()


def test_many_candidates_share_each_rounds_baseline() -> None:
    clock = Clock()
    candidates = {
        name: clock.work(name, itertools.repeat(duration)) for name, duration in (("x", 5), ("y", 10), ("z", 20))
    }
    results = compare_many(candidates, clock.work("b", itertools.repeat(10)), pairs=12, warmup=0, clock=clock)
    assert [results[name].verdict for name in "xyz"] == ["faster", "same", "slower"]
    rounds = ["".join(clock.log[start : start + 4]) for start in range(0, 48, 4)]
    assert rounds == ["bxyz", "zyxb", "byzx", "xzyb", "bzxy", "yxzb"] * 2
    assert len({result.baseline for result in results.values()}) == 1


def test_synchronize_runs_before_each_reading() -> None:
    clock = Clock()
    pending = [0.0]

    def launch() -> object:
        pending[0] += 3
        return None

    def wait() -> None:
        clock.now += pending[0]
        pending[0] = 0

    result = measure_latency(launch, launch, pairs=8, warmup=1, clock=clock, synchronize=wait)
    assert result.candidate.min_ms == 3000


def test_garbage_collector_is_off_and_restored() -> None:
    clock = Clock()
    seen: set[bool] = set()

    def call() -> object:
        seen.add(gc.isenabled())
        clock.now += 1
        return None

    measure_latency(call, call, pairs=8, clock=clock)
    assert seen == {False}
    assert gc.isenabled()

    def fail() -> object:
        raise ValueError("broken model")

    with pytest.raises(ValueError, match="broken model"):
        measure_latency(fail, call, pairs=8, clock=clock)
    assert gc.isenabled()
    gc.disable()
    try:
        measure_latency(call, call, pairs=8, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("readings", "message"),
    [
        (itertools.repeat(1.0), "no time at all"),
        (itertools.count(10.0, -1.0), "not monotone"),
        (itertools.repeat(math.nan), "not monotone"),
        (itertools.chain([1.0, 2.0, 1.5, 3.0]), "not monotone"),
    ],
)
def test_bad_clocks(readings: Iterable[float], message: str) -> None:
    ticks = iter(readings)
    with pytest.raises(MeasurementError, match=message) as caught:
        measure_latency(int, int, pairs=8, warmup=0, clock=lambda: next(ticks))
    assert caught.value.code == "HFC601"


def test_impossible_requests() -> None:
    with pytest.raises(MeasurementError, match="pairs=7"):
        measure_latency(int, int, pairs=7)
    with pytest.raises(MeasurementError, match="warmup=-1"):
        measure_latency(int, int, warmup=-1)
    for arguments, message in (
        ({"pairs": "many"}, "pairs='many' is a str"),
        ({"pairs": 8.5}, "pairs=8.5 is a float"),
        ({"pairs": True}, "pairs=True is a bool"),
        ({"warmup": None}, "warmup=None is a NoneType"),
        ({"clock": 1.0}, "clock is a float"),
    ):
        with pytest.raises(MeasurementError, match=message) as caught:
            measure_latency(int, int, **arguments)  # type: ignore[arg-type]
        assert caught.value.fix
    with pytest.raises(MeasurementError, match="no candidate"):
        compare_many({}, int)


def test_result_is_frozen_json() -> None:
    result = compare([25] * 8, [10] * 8)
    assert LatencyComparison.model_validate_json(result.model_dump_json()) == result
    assert json.loads(result.model_dump_json())["verdict"] == "slower"
    with pytest.raises(ValueError, match="frozen"):
        result.speedup = 2.0  # type: ignore[misc]


def test_synchronizer() -> None:
    assert synchronizer(torch.device("cpu")) is None
    assert synchronizer(torch.device("cuda", 0)) is not None


# Tables of the sign test, two-sided 1 %: the rank counted from either end.
@pytest.mark.parametrize(("count", "rank"), [(8, 1), (10, 1), (12, 2), (20, 4), (30, 8), (50, 16), (100, 37)])
def test_median_interval_ranks(count: int, rank: int) -> None:
    low, high, coverage = median_interval(list(range(1, count + 1)))
    assert (low, high) == (rank, count + 1 - rank)
    outside = 2 * sum(math.comb(count, k) for k in range(rank)) / 2**count
    assert coverage == pytest.approx(1 - outside, abs=1e-15)
    assert coverage >= 0.99


def test_median_interval_of_very_many_values() -> None:
    low, high, coverage = median_interval([float(value) for value in range(5000)])
    assert 0.99 <= coverage < 0.991
    assert (high - low) / 2 == pytest.approx(2.5758 * math.sqrt(5000) / 2, rel=0.02)


def test_median_interval_needs_enough_values() -> None:
    with pytest.raises(MeasurementError, match="7 values are too few"):
        median_interval([1.0] * 7)


durations = st.lists(st.tuples(st.integers(1, 2**30), st.integers(1, 2**30)), min_size=8, max_size=40)
close = st.lists(st.tuples(st.integers(900, 1100), st.integers(900, 1100)), min_size=8, max_size=40)


@given(st.one_of(durations, close))
def test_swapping_the_sides_mirrors_everything(pairs: list[tuple[int, int]]) -> None:
    baseline, candidate = [b for b, _ in pairs], [c for _, c in pairs]
    result, mirrored = compare(candidate, baseline), compare(baseline, candidate)
    opposite = {"slower": "faster", "faster": "slower", "same": "same"}
    assert mirrored.verdict == opposite[result.verdict]
    assert mirrored.speedup == pytest.approx(1 / result.speedup, rel=1e-12)
    assert mirrored.speedup_low == pytest.approx(1 / result.speedup_high, rel=1e-12)
    assert mirrored.baseline == result.candidate


@given(st.one_of(durations, close))
def test_interval_holds_the_median_and_the_verdict_follows(pairs: list[tuple[int, int]]) -> None:
    result = compare([c for _, c in pairs], [b for b, _ in pairs])
    assert result.speedup_low <= result.speedup <= result.speedup_high
    ratios = sorted(b / c for b, c in pairs)
    assert ratios[0] * (1 - 1e-12) <= result.speedup_low
    assert result.speedup_high <= ratios[-1] * (1 + 1e-12)
    if result.verdict == "slower":
        assert result.speedup_high < 1
        assert 1 / result.speedup > 1.05 * (1 - 1e-12)
    if result.verdict == "faster":
        assert result.speedup_low > 1
        assert result.speedup > 1.05 * (1 - 1e-12)
