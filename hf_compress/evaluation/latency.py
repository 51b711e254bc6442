"""The one timer of the project: baseline and candidates interleaved, with an exact interval.

Two timings taken one after the other differ by whatever the machine did in between. Here every round
times the baseline and each candidate once, the next round in the opposite order (ABBA), so that a drift
hits both sides alike, and only ratios within a round are compared.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from hf_compress.core.errors import MeasurementError

from .statistics import is_count

Verdict = Literal["slower", "same", "faster"]

CONFIDENCE = 0.99
MIN_PAIRS = 8  # the fewest with 2 * 0.5**n <= 1 - CONFIDENCE
MARGIN = 1.05  # a ratio within this factor of 1, either way, is called "same"


class SideTiming(BaseModel):
    """Timings of one side, in milliseconds.

    Args:
        p50_ms: Median.
        p95_ms: 95th percentile, linear interpolation (Hyndman & Fan 1996, type 7).
        min_ms: Fastest call.
        iqr_ms: Third minus first quartile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    p50_ms: float
    p95_ms: float
    min_ms: float
    iqr_ms: float


class LatencyComparison(BaseModel):
    """A candidate against its baseline, from paired and interleaved timings.

    Args:
        pairs: Number of timed pairs.
        warmup: Untimed calls of each side before the first pair.
        baseline: The baseline's own timings.
        candidate: The candidate's own timings.
        speedup: Median of the paired ratios baseline / candidate; above 1 the candidate is faster. With an
            even number of pairs, the geometric mean of the two in the middle, so that swapping the sides
            inverts it.
        speedup_low: Lower end of the interval of that median.
        speedup_high: Upper end.
        confidence: Exact coverage of the interval, at least 0.99.
        verdict: "slower" or "faster" if the interval excludes 1 and the median is off by more than 5 %
            (one side takes more than 1.05 times as long as the other), else "same".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pairs: int
    warmup: int
    baseline: SideTiming
    candidate: SideTiming
    speedup: float
    speedup_low: float
    speedup_high: float
    confidence: float
    verdict: Verdict

    def headline(self) -> str:
        """One line for the top of a report; begins with SLOWER THAN THE ORIGINAL when that is the verdict."""
        evidence = (
            f"p50 {self.candidate.p50_ms:.3g} ms against {self.baseline.p50_ms:.3g} ms, {self.pairs} pairs, "
            f"99 % interval of the speedup {self.speedup_low:.3g} to {self.speedup_high:.3g}"
        )
        if self.verdict == "slower":
            return f"SLOWER THAN THE ORIGINAL: takes {1 / self.speedup:.2f} times as long ({evidence})"
        if self.verdict == "faster":
            return f"Faster than the original: {self.speedup:.2f} times its speed ({evidence})"
        return f"No difference in speed beyond 5 % proven: {self.speedup:.2f} times the original's ({evidence})"


def measure_latency(
    candidate: Callable[[], object],
    baseline: Callable[[], object],
    *,
    pairs: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] | None = None,
) -> LatencyComparison:
    """Time a candidate against its baseline, interleaved.

    Args:
        candidate: Runs the compressed model once.
        baseline: Runs the original once, on the same input.
        pairs: Timed pairs, at least 8.
        warmup: Untimed calls of each side first.
        clock: Returns seconds, never going back.
        synchronize: Waits until the device is idle; needed on asynchronous devices, see `synchronizer`.

    Raises:
        MeasurementError: Too few pairs, or a clock that stands still or runs backwards.
    """
    return compare_many(
        {"candidate": candidate}, baseline, pairs=pairs, warmup=warmup, clock=clock, synchronize=synchronize
    )["candidate"]


def compare_many(
    candidates: Mapping[str, Callable[[], object]],
    baseline: Callable[[], object],
    *,
    pairs: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, LatencyComparison]:
    """Time several candidates against the one baseline, all interleaved in one loop.

    Every round calls each side once; each second round runs in reverse, and the candidates take turns in
    being next to the baseline. Each interval has its 99 % on its own, not jointly. The garbage collector is
    off while timing.

    Args:
        candidates: Runs a compressed model once, by name.
        baseline: Runs the original once.
        pairs: Rounds, at least 8.
        warmup: Untimed calls of each side first.
        clock: Returns seconds, never going back.
        synchronize: Waits until the device is idle.

    Returns:
        A comparison with the baseline for each name, in the order given.

    Raises:
        MeasurementError: No candidate, too few pairs, or a clock that stands still or runs backwards.
    """
    if not candidates:
        raise MeasurementError("There is no candidate to time.", fix="pass {'name': callable}")
    check_timing(pairs, warmup, clock)
    names = list(candidates)
    timed = _Stopwatch(clock, synchronize)
    baseline_times: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in names}
    sides = [(baseline, baseline_times)] + [(candidates[name], times[name]) for name in names]
    with _no_garbage_collection():
        for _ in range(warmup):
            for call, _ in sides:
                timed.run(call)
        for pair in range(pairs):
            for side in _order(pair, len(names)):
                call, record = sides[side]
                record.append(timed.time(call))
    return {name: _comparison(times[name], baseline_times, warmup) for name in names}


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Exact, distribution-free interval for the median, between two order statistics.

    The number of values below the median is Binomial(n, 1/2), so [X(k), X(n+1-k)] covers it with probability
    1 - 2 P(B <= k-1); k is the largest that keeps it at `confidence` (David & Nagaraja, Order Statistics,
    3rd ed. 2003, section 7.1; Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2).

    Args:
        values: Independent values, in any order and unit.
        confidence: Least coverage, in (0, 1).

    Returns:
        Lower end, upper end, and the exact coverage.

    Raises:
        MeasurementError: Too few values for this confidence.
    """
    count = len(values)
    rank, tail, total = 0, 0, 0  # in 2**count equally likely outcomes; integers, since those overflow floats
    for successes in range(count // 2):
        total += math.comb(count, successes)
        if 2 * total / 2**count > 1 - confidence:
            break
        rank, tail = successes + 1, total
    if rank == 0:
        raise MeasurementError(
            f"{count} values are too few for a {confidence:.0%} interval of their median.",
            fix=f"measure at least {math.ceil(math.log2(2 / (1 - confidence)))} pairs, better 30",
        )
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank], 1 - 2 * tail / 2**count


def synchronizer(device: torch.device) -> Callable[[], None] | None:
    """What `synchronize` should be for callables that run on `device`: None on the CPU."""
    if device.type in ("cpu", "meta"):
        return None
    return functools.partial(torch.accelerator.synchronize, device)


class _Stopwatch:
    """Times single calls with a clock that is not trusted."""

    def __init__(self, clock: Callable[[], float], synchronize: Callable[[], None] | None) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._last = -math.inf

    def run(self, call: Callable[[], object]) -> object:
        """One call, finished on the device too. Its result is returned so that freeing it isn't timed."""
        result = call()
        if self._synchronize is not None:
            self._synchronize()
        return result

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that one call took."""
        if self._synchronize is not None:
            self._synchronize()
        start = self._clock()
        result = self.run(call)
        stop = self._clock()
        del result
        if not (math.isfinite(start) and math.isfinite(stop)) or start < self._last or stop < start:
            raise MeasurementError(
                f"The clock is not monotone: it read {self._last!r}, then {start!r}, then {stop!r} seconds.",
                fix="use clock=time.perf_counter",
            )
        if stop == start:
            raise MeasurementError(
                f"A call took no time at all by the clock (it read {start!r} seconds before and after).",
                fix="use clock=time.perf_counter, or time several calls in one callable",
            )
        self._last = stop
        return stop - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_timing(pairs: int, warmup: int, clock: Callable[[], float]) -> None:
    """Refuse arguments that nothing can be timed with.

    Raises:
        MeasurementError: Too few pairs, or an argument of the wrong type.
    """
    for name, value, proposal in (("pairs", pairs, 30), ("warmup", warmup, 3)):
        if not is_count(value):
            raise MeasurementError(
                f"{name}={value!r} is a {type(value).__name__}, no integer.", fix=f"{name}={proposal}"
            )
    if not callable(clock):
        raise MeasurementError(
            f"clock is a {type(clock).__name__}, and can't be called.", fix="use clock=time.perf_counter"
        )
    if pairs < MIN_PAIRS:
        raise MeasurementError(
            f"pairs={pairs} is too few for a 99 % interval of the median.", fix="pairs=30, at least 8"
        )
    if warmup < 0:
        raise MeasurementError(f"warmup={warmup} is negative.", fix="warmup=3")


def _order(pair: int, candidates: int) -> list[int]:
    """Who runs when in this round: 0 is the baseline, 1.. the candidates."""
    shift = (pair // 2) % candidates
    turns = [1 + (index + shift) % candidates for index in range(candidates)]
    return [0, *turns] if pair % 2 == 0 else [*reversed(turns), 0]


def _comparison(candidate: list[float], baseline: list[float], warmup: int) -> LatencyComparison:
    # In log space swapping the sides only flips signs, so the verdict is exactly symmetric.
    logs = [math.log(b) - math.log(c) for b, c in zip(baseline, candidate, strict=True)]
    median = _percentile(sorted(logs), 0.5)
    low, high, coverage = median_interval(logs)
    verdict: Verdict = "same"
    if low > 0 and median > math.log(MARGIN):
        verdict = "faster"
    elif high < 0 and median < -math.log(MARGIN):
        verdict = "slower"
    return LatencyComparison(
        pairs=len(logs),
        warmup=warmup,
        baseline=_side(baseline),
        candidate=_side(candidate),
        speedup=math.exp(median),
        speedup_low=math.exp(low),
        speedup_high=math.exp(high),
        confidence=coverage,
        verdict=verdict,
    )


def _side(seconds: list[float]) -> SideTiming:
    ordered = sorted(1e3 * value for value in seconds)
    return SideTiming(
        p50_ms=_percentile(ordered, 0.5),
        p95_ms=_percentile(ordered, 0.95),
        min_ms=ordered[0],
        iqr_ms=_percentile(ordered, 0.75) - _percentile(ordered, 0.25),
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics (Hyndman & Fan 1996, type 7)."""
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    weight = position - below
    return ordered[below] * (1 - weight) + ordered[above] * weight
