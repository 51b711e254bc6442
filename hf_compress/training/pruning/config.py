"""Configuration of pruning."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ...core.config import Pattern, Settings
from ...core.errors import ConfigError
from ..schedule import Moment

Fraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
"""Pruned values of all values."""


def group_of(pattern: str) -> tuple[int, int]:
    """N and M of a pattern `N:M`: of each M consecutive inputs, N are kept.

    Raises:
        ConfigError: It is no such pattern, or keeps none or all.
    """
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    kept, size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < size:
        raise ConfigError(f"pattern={pattern!r} is not N:M with 0 < N < M.", 'pattern="2:4"')
    return kept, size


def _follows_from(given: dict[str, Any]) -> float:
    """The sparsity where none is given: that of the pattern, or one half."""
    pattern = given.get("pattern")
    if pattern is None:
        return 0.5
    kept, size = group_of(pattern)
    return 1 - kept / size


class PruningRule(Settings):
    """One line of the rules: which weights, and what is different for them.

    Attributes:
        pattern: Glob, or regular expression after `re:`, on weight names without `.weight`.
        keep: True keeps the matched weights dense; False takes back an earlier rule that kept them.
        sparsity: Fraction of the matched weights' values that is pruned, 0 to below 1; each weight for itself.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type or range.
    """

    pattern: Pattern
    keep: Annotated[bool, Field(strict=True)] | None = None
    sparsity: Fraction | None = None

    def settings(self) -> dict[str, Any]:
        """What this rule changes beside keeping."""
        return {} if self.sparsity is None else {"sparsity": self.sparsity}


class PruningConfig(Settings):
    """What is pruned, by what, and when.

    Sparsity rises from `initial` to `sparsity` by the cubic schedule of Zhu and Gupta (arXiv:1710.01878, equation 1)
    and then stays, so that the rest of the training heals what was cut. `start == end` prunes at once.

    Args:
        method: `"magnitude"` prunes the smallest values; `"movement"` those that training moves towards zero (Sanh et
            al., arXiv:2005.07683, section 3).
        pattern: `"N:M"`, such as `"2:4"`, keeps N of each M consecutive inputs (of convolutions: input channels);
            None prunes anywhere.
        sparsity: Fraction of the values that is pruned at the end, 0 to below 1; 0.5 by default. With a pattern it
            follows from that.
        scope: `"local"` gives each weight the same sparsity; `"global"` compares all values with each other, and
            leaves each weight at least 0.5 % of its values and as many as it has rows.
        initial: Sparsity at `start`.
        start: First pruning, as a fraction of the run (float) or in optimizer steps (int).
        end: Last pruning; the mask is fixed from there on.
        every: Optimizer steps between two prunings.
        skip: Patterns of weights to keep dense, added to the defaults.
        rules: Further rules; the last one that matches a weight decides.
        default_rules: Whether heads, routers, norms and embeddings are kept dense.
        initial_scores: Scores that movement starts from: `"magnitude"`, absolute values over their root mean square,
            so that it begins as magnitude pruning does; or `"zero"`, as published.
        score_learning_rate: Learning rate of the scores, per step of their own Adam. Against scores that start from
            magnitudes it says how fast movement outweighs them; from zero only the order of the scores counts.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or range, or two contradict each other.
    """

    method: Literal["magnitude", "movement"] = "magnitude"
    pattern: str | None = None
    sparsity: Fraction = Field(default_factory=_follows_from)
    scope: Literal["local", "global"] = "local"
    initial: Fraction = 0.0
    start: Moment = 0.1
    end: Moment = 0.7
    every: Annotated[int, Field(strict=True, ge=1)] = 10
    skip: tuple[Pattern, ...] = ()
    rules: tuple[PruningRule, ...] = ()
    default_rules: Annotated[bool, Field(strict=True)] = True
    initial_scores: Literal["magnitude", "zero"] = "magnitude"
    score_learning_rate: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 1e-2

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of the pattern, or None."""
        return None if self.pattern is None else group_of(self.pattern)

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            group_of(value)
        return value

    @field_validator("sparsity")
    @classmethod
    def _fits_pattern(cls, value: float, info: ValidationInfo) -> float:
        follows = _follows_from(info.data)
        if info.data.get("pattern") is not None and abs(value - follows) > 1e-9:
            raise ConfigError(
                f"pattern={info.data['pattern']!r} has a sparsity of {follows:g}, and sparsity={value} is given.",
                "leave sparsity out",
            )
        return value

    @field_validator("scope")
    @classmethod
    def _fits_scope(cls, value: str, info: ValidationInfo) -> str:
        if value == "global" and info.data.get("pattern") is not None:
            raise ConfigError(
                f"pattern={info.data['pattern']!r} prunes each group of inputs for itself, so there is no global "
                "threshold.",
                'scope="local", or leave pattern out',
            )
        return value

    @field_validator("initial")
    @classmethod
    def _rises(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("sparsity", 1.0):
            raise ConfigError(f"initial={value} is above sparsity={info.data['sparsity']}.", "initial=0.0")
        return value

    @field_validator("end")
    @classmethod
    def _in_order(cls, value: int | float, info: ValidationInfo) -> int | float:
        start = info.data.get("start")
        if type(start) is type(value) and start > value:
            raise ConfigError(f"start={start} lies behind end={value}.", f"start={value}")
        return value

    @field_validator("rules")
    @classmethod
    def _settable(cls, value: tuple[PruningRule, ...], info: ValidationInfo) -> tuple[PruningRule, ...]:
        own = next((rule for rule in value if rule.sparsity is not None), None)
        for name, free in (("pattern", None), ("scope", "local")):
            if own is not None and info.data.get(name, free) != free:
                raise ConfigError(
                    f"The rule for {own.pattern!r} sets a sparsity of its own, which can't be with "
                    f"{name}={info.data[name]!r}.",
                    f"leave {name} out, or the rule's sparsity",
                )
        return value
