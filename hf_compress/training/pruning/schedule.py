"""At which optimizer steps is pruned, and how many values."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import ConfigError
from ..schedule import cubic, step_of
from .config import PruningConfig
from .masks import count_of
from .targets import Target


class Schedule:
    """The schedule of a run, a function of the steps done.

    Args:
        config: The configuration.
        steps: Optimizer steps of the whole run; 0 where that is not known yet.

    Attributes:
        start: Steps done when something is pruned for the first time.
        end: Steps done when the mask becomes final.

    Raises:
        ConfigError: The schedule is longer than the run, ends before it starts, or leaves movement no step to learn.
    """

    def __init__(self, config: PruningConfig, steps: int) -> None:
        self._config = config
        self.start = step_of(config.start, steps, "start") if steps else 0
        self.end = step_of(config.end, steps, "end") if steps else 0
        if self.start > self.end:
            raise ConfigError(
                f"start={config.start!r} is step {self.start}, behind end={config.end!r}, step {self.end} of {steps}.",
                f"start={config.end!r} or earlier",
            )
        zero = config.initial_scores == "zero"
        if steps and config.method == "movement" and (self.start if zero else self.end) == 0:
            raise ConfigError(
                f"{'start' if zero else 'end'} is before the first of {steps} steps, when nothing has moved yet.",
                f"{'start' if zero else 'end'}=0.5, or method='magnitude'",
            )

    def is_due(self, step: int) -> bool:
        """Whether something is pruned after so many steps."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self._config.every == 0 or step == self.end)

    def is_fixed(self, step: int) -> bool:
        """Whether the mask is final after so many steps."""
        return step >= self.end

    def last_due(self, step: int) -> int | None:
        """The last time that something was pruned, or None where that has not begun."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self._config.every

    def demanded(self, targets: Sequence[Target], step: int | None) -> list[int]:
        """How many values of each weight are pruned after so many steps.

        Args:
            targets: The weights. Where they compete with each other, only the sum is meant.
            step: Optimizer steps done, one at which something is pruned; None for the end.
        """
        sparsities = [self._at(target.sparsity, step) for target in targets]
        sizes = [target.weight.count for target in targets]
        if self._config.group is not None:
            size = self._config.group[1]
            return [round(value * size) * count // size for value, count in zip(sparsities, sizes, strict=True)]
        if self._config.scope == "global":
            return [count_of(sparsities[0], sum(sizes)), *(0 for _ in sizes[1:])]
        return [count_of(value, count) for value, count in zip(sparsities, sizes, strict=True)]

    def _at(self, final: float, step: int | None) -> float:
        """The sparsity after so many steps, of a weight that ends with `final`."""
        if step is None:
            return final
        return cubic(step, self.start, self.end, min(self._config.initial, final), final)
