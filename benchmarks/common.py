"""What all benchmarks share: bars, the result file, command line options, the verdict."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, JsonValue
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from hf_compress.evaluation.environment import Environment, environment

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SMOKE_RESULTS = ROOT / "out"
"""Ignored by git: numbers of small settings prove nothing."""

QUIET_PERCENT = 15.0
"""Most that other programs may use of all processors before a benchmark starts."""


class Bar(BaseModel):
    """A limit that a measured number must keep.

    Attributes:
        name: What is measured.
        at: Whether the limit is the most or the least allowed.
        limit: The limit.
        unit: Of the limit and the number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    at: Literal["most", "least"]
    limit: float
    unit: str

    def judge(self, value: float) -> Judged:
        """The bar with its number."""
        return Judged(**self.model_dump(), value=value)


class Judged(Bar):
    """A bar with the number that was measured.

    Attributes:
        value: The number.
    """

    value: float

    @property
    def passed(self) -> bool:
        """Whether the number keeps the limit."""
        return self.value <= self.limit if self.at == "most" else self.value >= self.limit


class Machine(BaseModel):
    """Where and in what company a benchmark ran.

    Attributes:
        environment: Hardware, versions and the load average before.
        load_average_after: Runnable processes over the last 1, 5 and 15 minutes; the benchmark's own included.
        busy_percent_before: Use of all processors in the second before it started.
        busy_percent_after: The same in the second after it ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    load_average_after: tuple[float, float, float]
    busy_percent_before: float
    busy_percent_after: float

    @property
    def quiet(self) -> bool:
        """Whether nothing else was running before and after."""
        return max(self.busy_percent_before, self.busy_percent_after) <= QUIET_PERCENT


class Result(BaseModel):
    """The content of `benchmarks/results/NAME.json`.

    Attributes:
        schema_version: Version of this layout.
        name: Name of the benchmark.
        smoke: Whether settings were cut down to try the script; such numbers prove nothing.
        date: When it ended, UTC.
        seconds: What it took in all.
        machine: Where it ran.
        settings: What was measured, as far as it can be chosen.
        measurements: All numbers.
        bars: The numbers that must keep a limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    name: str
    smoke: bool
    date: datetime
    seconds: float
    machine: Machine
    settings: dict[str, JsonValue]
    measurements: dict[str, JsonValue]
    bars: tuple[Judged, ...]

    @property
    def passed(self) -> bool:
        """Whether all bars hold."""
        return all(bar.passed for bar in self.bars)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A result from its file."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


class Measured(BaseModel):
    """What a benchmark's `measure` returns.

    Attributes:
        settings: See `Result`.
        measurements: See `Result`.
        values: The number of each bar, by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, JsonValue]
    measurements: dict[str, JsonValue]
    values: dict[str, float]


Measure = Callable[[bool], Measured]
"""Runs a benchmark; the argument says whether with small settings."""


def arguments(description: str | None) -> argparse.Namespace:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small settings, result into benchmarks/out")
    parser.add_argument("--out", type=Path, help="directory of the result, benchmarks/results by default")
    return parser.parse_args()


def run(name: str, description: str | None, bars: Iterable[Bar], measure: Measure) -> int:
    """Measure, write the result, print the verdict.

    Args:
        name: Name of the benchmark and of its file.
        description: The script's docstring.
        bars: The limits.
        measure: Runs it.

    Returns:
        The exit status: 1 if a bar does not hold.
    """
    chosen = arguments(description)
    logging.disable_progress_bar()
    before, busy = environment(), psutil.cpu_percent(interval=1)
    started = time.perf_counter()
    measured = measure(chosen.smoke)
    seconds = time.perf_counter() - started
    after = os.getloadavg()
    result = Result(
        name=name,
        smoke=chosen.smoke,
        date=datetime.now(UTC).replace(microsecond=0),
        seconds=round(seconds, 1),
        machine=Machine(
            environment=before,
            load_average_after=after,
            busy_percent_before=busy,
            busy_percent_after=psutil.cpu_percent(interval=1),
        ),
        settings=measured.settings,
        measurements=measured.measurements,
        bars=tuple(bar.judge(measured.values[bar.name]) for bar in bars),
    )
    show([result])
    path = write(result, chosen.out or (SMOKE_RESULTS if chosen.smoke else RESULTS))
    print(path)
    return 0 if result.passed else 1


def write(result: Result, folder: Path) -> Path:
    """Write a result into a directory; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def show(results: Iterable[Result]) -> None:
    """Print every bar of every result, and what makes the numbers doubtful."""
    table = Table(title="Benchmarks", title_justify="left")
    for heading in ("benchmark", "bar", "measured", "limit", "verdict"):
        table.add_column(heading, overflow="fold")
    doubts = []
    for result in results:
        for bar in result.bars:
            sign = "≤" if bar.at == "most" else "≥"
            verdict = "[green]PASS[/]" if bar.passed else "[bold red]FAIL[/]"
            table.add_row(
                result.name, bar.name, f"{bar.value:.4g} {bar.unit}", f"{sign} {bar.limit:g} {bar.unit}", verdict
            )
        if result.smoke:
            doubts.append(f"{result.name}: small settings, the numbers prove nothing")
        if not result.machine.quiet:
            doubts.append(
                f"{result.name}: the machine was busy ({result.machine.busy_percent_before:.0f} % before, "
                f"{result.machine.busy_percent_after:.0f} % after)"
            )
    console = Console()
    console.print(table)
    for doubt in doubts:
        console.print(f"[yellow]{doubt}[/]")


def summary(values: list[float]) -> dict[str, JsonValue]:
    """Median, extremes and all values, in the order measured."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def medians(rounds: Iterable[Mapping[str, float]], key: str) -> float:
    """Median of one number over rounds."""
    return statistics.median(one[key] for one in rounds)
