"""Several compressions of one model side by side: the data, and which of them are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .. import _version
from .environment import Environment
from .quality_results import CausalLMQuality, ClassificationQuality, QualityResult
from .report_schema import SCHEMA, Report

ORIGINAL = "original"
"""The name of the model that is not compressed, in pictures and tables."""

Standing = Literal["front", "open", "beaten"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Failure(_Part):
    """Why a configuration gave no report.

    Attributes:
        code: The error's code, such as `HFC102`.
        message: What happened.
        fix: What to do about it.
    """

    code: str
    message: str
    fix: str


class Entry(_Part):
    """One configuration.

    Attributes:
        name: Unique in its comparison.
        request: The configuration as JSON types, without data.
        report: What was measured; None if it failed.
        error: Why it failed; None if it did not.
        checkpoint: Path of the checkpoint relative to the comparison's directory; None if it was not kept.
    """

    name: str
    request: dict[str, Any]
    report: Report | None = None
    error: Failure | None = None
    checkpoint: str | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if (self.report is None) == (self.error is None):
            raise ValueError("an entry has either a report or an error")
        return self


class Original(_Part):
    """The model that all were measured against.

    Attributes:
        dtype: Data type of its weights, such as `float32`.
        disk_weights: Bytes of its stored tensors, each once.
        resident: Bytes of the memory that its tensors hold.
        quality: Accuracy, 0 to 1, or perplexity; None if there was no data, or quality is a cosine with itself.
    """

    dtype: str
    disk_weights: int
    resident: int
    quality: float | None = None


class Comparison(_Part):
    """What `hf_compress.compare` found.

    Attributes:
        schema_version: Version of this layout.
        version: Version of hf_compress that measured.
        model: The original: a Hub id, or the name of a local directory; empty for a model made in memory.
        architecture: Class of the model.
        environment: Where it was measured.
        baseline: The original.
        entries: One for each configuration, in the order given.
        notes: Remarks that a reader of the numbers should know.
    """

    schema_version: Literal[1] = SCHEMA
    version: str = _version.__version__
    model: str
    architecture: str
    environment: Environment
    baseline: Original
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def reports(self) -> dict[str, Report]:
        """The reports by the entries' names, in order."""
        return {entry.name: entry.report for entry in self.entries if entry.report is not None}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; both ends equal it where it is exact."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without uncertainty."""
        return cls(value, value, value)

    def scaled(self, factor: float) -> Estimate:
        """Value and ends times a factor; a negative one swaps the ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.value * factor, low, high)


@dataclass(frozen=True)
class Axis:
    """What one axis of a panel shows.

    Attributes:
        key: One word for it in sentences.
        label: With its unit.
        rising: Whether more is better.
    """

    key: str
    label: str
    rising: bool


@dataclass(frozen=True)
class Panel:
    """Two things that pull against each other, of the original and every configuration that was measured.

    Attributes:
        x: Meaning of the first number of each point.
        y: Meaning of the second.
        points: By name, the original first.
    """

    x: Axis
    y: Axis
    points: dict[str, tuple[Estimate, Estimate]]

    def standings(self) -> dict[str, Standing]:
        """Where each point stands, see `standings`."""
        signs = (1.0 if self.x.rising else -1.0, 1.0 if self.y.rising else -1.0)
        return standings(
            {
                name: tuple(one.scaled(sign) for one, sign in zip(point, signs, strict=True))
                for name, point in self.points.items()
            }
        )


def standings(points: Mapping[str, Sequence[Estimate]]) -> dict[str, Standing]:
    """The Pareto front of uncertain points, where more is better in every coordinate.

    A point is `front` if no other is at least as good in every coordinate and better in one, by the estimates. One
    that is not is `beaten` if such another point exists beyond doubt, that is, with the lower ends of the other's
    intervals in place of its estimates and the upper ends of this one's; else `open`: the measurement can't tell it
    from the front.

    Args:
        points: Coordinates by name, as many for each.

    Returns:
        The standing of each name, in the order given.
    """
    found: dict[str, Standing] = {}
    for name, point in points.items():
        others = [other for key, other in points.items() if key != name]
        best = [one.value for one in point]
        if not any(_dominates([one.value for one in other], best) for other in others):
            found[name] = "front"
        elif any(_dominates([one.low for one in other], [one.high for one in point]) for other in others):
            found[name] = "beaten"
        else:
            found[name] = "open"
    return found


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is at least as good everywhere and better somewhere."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def panels(comparison: Comparison) -> tuple[Panel, ...]:
    """What a picture of a comparison shows: quality over size and over speed; without quality, speed over size."""
    reports = comparison.reports
    qualities = {name: report.quality for name, report in reports.items() if report.quality is not None}
    size = Axis("size", "weights on disk, MB", rising=False)
    speed = Axis("speed", "speed-up over the original, on the slowest input", rising=True)
    sizes = {ORIGINAL: Estimate.exact(comparison.baseline.disk_weights / 1e6)}
    sizes |= {name: Estimate.exact(_disk(report) / 1e6) for name, report in reports.items()}
    speeds = {ORIGINAL: Estimate.exact(1.0)}
    speeds |= {name: found for name, report in reports.items() if (found := speed_of(report)) is not None}
    if not qualities:
        return (_panel(size, speed, sizes, speeds),)
    quality = quality_axis(next(iter(qualities.values())))
    base = 1.0 if comparison.baseline.quality is None else comparison.baseline.quality
    measured = {ORIGINAL: Estimate.exact(base)} | {name: quality_of(one) for name, one in qualities.items()}
    if quality.key == "accuracy":
        measured = {name: one.scaled(100) for name, one in measured.items()}
    return _panel(size, quality, sizes, measured), _panel(speed, quality, speeds, measured)


def speed_of(report: Report) -> Estimate | None:
    """How many times as fast as the original, on the input where that is least; None if it was not measured.

    The interval goes from the least lower end to the least upper end over the inputs: it holds the least of the true
    medians whenever every input's interval holds its own.
    """
    timings = list((report.latency or {}).values())
    if not timings:
        return None
    return Estimate(
        min(one.speedup for one in timings),
        min(one.speedup_low for one in timings),
        min(one.speedup_high for one in timings),
    )


def quality_of(quality: QualityResult) -> Estimate:
    """Accuracy, perplexity or cosine of the compressed model.

    The interval of the first two is that of the paired difference from, or ratio to, the original, which is what
    compression changed: the sampling of the data hits both alike.
    """
    result = quality.result
    if isinstance(result, ClassificationQuality):
        base = result.baseline_accuracy
        return Estimate(result.candidate_accuracy, base + result.difference_low, base + result.difference_high)
    if isinstance(result, CausalLMQuality):
        base = result.baseline_perplexity
        return Estimate(result.candidate_perplexity, base * result.ratio_low, base * result.ratio_high)
    return Estimate(result.mean, result.mean_low, result.mean_high)


def baseline_quality(quality: QualityResult | None) -> float | None:
    """The original's accuracy or perplexity; None where neither was measured."""
    if quality is None:
        return None
    if isinstance(quality.result, ClassificationQuality):
        return quality.result.baseline_accuracy
    return quality.result.baseline_perplexity if isinstance(quality.result, CausalLMQuality) else None


def quality_axis(quality: QualityResult) -> Axis:
    """What the quality of this task is called."""
    if isinstance(quality.result, ClassificationQuality):
        return Axis("accuracy", "accuracy, %", rising=True)
    if isinstance(quality.result, CausalLMQuality):
        return Axis("perplexity", "perplexity (less is better)", rising=False)
    return Axis("cosine", "cosine with the original", rising=True)


def _panel(x: Axis, y: Axis, xs: Mapping[str, Estimate], ys: Mapping[str, Estimate]) -> Panel:
    """Points that have both coordinates."""
    return Panel(x, y, {name: (xs[name], ys[name]) for name in xs if name in ys})


def _disk(report: Report) -> int:
    """Bytes of the weights on disk; those in memory where it was not saved."""
    return report.size.resident if report.size.disk is None else report.size.disk.weights
