"""When something happens in a training run, given as a fraction of it or as a number of optimizer steps."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from ..core.errors import ConfigError

Moment: TypeAlias = Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0, le=1)]
"""A fraction of the run (a float from 0.0 to 1.0), or a number of optimizer steps (an integer)."""


def step_of(moment: int | float, steps: int, name: str) -> int:
    """The optimizer step that a moment means.

    Args:
        moment: A fraction (float) or a step (int).
        steps: Optimizer steps of the whole run, `state.max_steps`.
        name: The field, for messages.

    Raises:
        ConfigError: The step lies beyond the end of training.
    """
    if isinstance(moment, float):
        return round(moment * steps)
    if moment > steps:
        raise ConfigError(
            f"{name}={moment} lies beyond the end of training, which has {steps} optimizer steps.",
            f"{name}={max(0, steps - 1)}, or a fraction such as {name}=0.8",
        )
    return moment


def cubic(step: int, start: int, end: int, initial: float, final: float) -> float:
    """A value that rises from `initial` to `final`, fast at first (Zhu and Gupta, arXiv:1710.01878, equation 1).

    Args:
        step: Optimizer steps done.
        start: Where it is still `initial`.
        end: Where it is `final`, and stays so.
        initial: Value up to `start`.
        final: Value from `end` on.
    """
    if step >= end:
        return final
    if step <= start:
        return initial
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3
