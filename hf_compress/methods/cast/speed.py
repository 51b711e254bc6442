"""Whether this processor is slower in a 16-bit type: measured, since many CPUs only emulate it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MARGIN = 1.05
"""A type counts as slower from 5 % more time on."""

_ROUNDS = 7
_ROWS, _WIDTH = 128, 768


def slowdown(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of a matrix product in `dtype` over its time in float32, on the CPU.

    Args:
        dtype: The 16-bit type.
        clock: Seconds, for tests.

    Returns:
        The ratio of the fastest of interleaved rounds; above 1 means slower than float32.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_ROWS, _WIDTH, generator=generator)
    right = torch.randn(_WIDTH, _WIDTH, generator=generator)
    pairs = [(left, right), (left.to(dtype), right.to(dtype))]
    best = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for index, (rows, columns) in enumerate(pairs):
            start = clock()
            torch.mm(rows, columns)
            best[index] = min(best[index], clock() - start)
    return best[1] / best[0] if best[0] > 0 else 1.0


def note(name: str, ratio: float) -> tuple[str, ...]:
    """The remark for a plan, or nothing where the type is not slower."""
    if ratio < MARGIN:
        return ()
    return (
        f"SLOWER HERE: this processor multiplies matrices {ratio:.1f} times slower in {name} than in float32; "
        "the cast halves the size, not the time",
    )
