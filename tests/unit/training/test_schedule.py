"""Moments and the cubic schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.core.config import Settings
from hf_compress.core.errors import ConfigError
from hf_compress.training.schedule import Moment, cubic, step_of


class Timed(Settings):
    """A configuration with a moment."""

    at: Moment = 0.5


@pytest.mark.parametrize("value", [0, 7, 0.0, 0.25, 1.0])
def test_moment_keeps_its_type(value: Any) -> None:
    at = Timed(at=value).at
    assert at == value
    assert type(at) is type(value)


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, "0.5", True, None, math.nan, math.inf])
def test_what_is_no_moment_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="at"):
        Timed(at=value)


@pytest.mark.parametrize(
    ("moment", "step"), [(0, 0), (1, 1), (100, 100), (0.0, 0), (1.0, 100), (0.125, 12), (0.8, 80)]
)
def test_step_of(moment: int | float, step: int) -> None:
    assert step_of(moment, 100, "start") == step


def test_step_beyond_the_end_names_the_field_and_a_fix() -> None:
    with pytest.raises(ConfigError, match=r"freeze=101 .* 100 optimizer steps.*freeze=99"):
        step_of(101, 100, "freeze")


def test_cubic_is_the_published_formula() -> None:
    """Equation 1 of arXiv:1710.01878, in the paper's letters."""
    s_i, s_f, t0, n_dt = 0.1, 0.9, 20, 60
    for t in range(t0, t0 + n_dt + 1):
        published = s_f + (s_i - s_f) * (1 - (t - t0) / n_dt) ** 3
        assert cubic(t, t0, t0 + n_dt, s_i, s_f) == pytest.approx(published, abs=1e-15)


@given(
    st.integers(0, 200),
    st.integers(0, 100),
    st.integers(0, 100),
    st.floats(0, 0.5),
    st.floats(0.5, 1),
)
def test_cubic_rises_and_stays(step: int, start: int, length: int, initial: float, final: float) -> None:
    end = start + length
    value = cubic(step, start, end, initial, final)
    assert initial <= value <= final or math.isclose(value, final) or math.isclose(value, initial)
    assert cubic(step + 1, start, end, initial, final) >= value - 1e-12
    if step >= end:
        assert value == final
    elif step <= start:
        assert value == initial


def test_cubic_of_no_length_is_a_step() -> None:
    assert [cubic(step, 5, 5, 0.0, 0.5) for step in (4, 5, 6)] == [0.0, 0.5, 0.5]
