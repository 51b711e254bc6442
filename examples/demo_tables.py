"""What the demo shows: one table for each model, on the screen and in `summary.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import hf_compress as hfc
from hf_compress.checkpoint.record import Proof
from hf_compress.evaluation.latency import LatencyComparison

console = Console(width=None if sys.stdout.isatty() else 150)  # a file has no width: leave room for the table


@dataclass(frozen=True)
class Outcome:
    """What one configuration gave.

    Args:
        name: Name of the configuration and of its folder.
        proof: How the checkpoint was proven.
        report: Everything measured against the original.
        stock_quality: Accuracy or perplexity of the checkpoint as stock transformers loads it.
    """

    name: str
    proof: Proof
    report: hfc.Report
    stock_quality: float


@dataclass(frozen=True)
class Quality:
    """Accuracy or perplexity of the original and of the compressed model.

    Args:
        name: Which of them.
        before: Of the original.
        after: Of the compressed model.
        interval: 95 % interval of the change, in words.
    """

    name: str
    before: float
    after: float
    interval: str

    @property
    def scale(self) -> float:
        """What a tolerance is a share of."""
        return self.before if self.name == "perplexity" else 1.0

    def shown(self, value: float) -> str:
        """One of the two numbers."""
        return f"{value:.2f}" if self.name == "perplexity" else f"{value:.1%}"


def quality_of(report: hfc.Report) -> Quality:
    """What the report says about quality."""
    if report.quality is None or report.quality.result.kind == "embedding":
        raise TypeError("the demo's models are a classifier and a language model")
    found = report.quality.result
    if found.kind == "causal-lm":
        low, high = 100 * (found.ratio_low - 1), 100 * (found.ratio_high - 1)
        interval = f"{low:+.1f} to {high:+.1f} %"
        return Quality("perplexity", found.baseline_perplexity, found.candidate_perplexity, interval)
    low, high = 100 * found.difference_low, 100 * found.difference_high
    return Quality("accuracy", found.baseline_accuracy, found.candidate_accuracy, f"{low:+.1f} to {high:+.1f}")


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row for the original and one for each configuration."""
    first = outcomes[0].report
    shown = Table(title=f"{first.model}: {first.architecture}", title_justify="left", show_lines=True)
    for heading in headings(first):
        shown.add_column(heading, no_wrap=True)
    shown.add_row(*original(first))
    for outcome in outcomes:
        shown.add_row(*cells(outcome))
    return shown


def headings(report: hfc.Report) -> tuple[str, ...]:
    """The table's first line."""
    sizes = ("", "disk MB", "smaller", "resident MB\nhere | stock", "covered")
    return (*sizes, f"{quality_of(report).name}\n95 % of Δ", "speed-up\n99 %", "kernel", "proof")


def original(report: hfc.Report) -> tuple[str, ...]:
    """The row of the model before."""
    size, quality = report.size, quality_of(report)
    sizes = (mb(size.baseline_disk_weights), "1 ×", mb(size.baseline_resident))
    return ("fp32", *sizes, "", quality.shown(quality.before), "1 ×", "", "")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """The row of a configuration."""
    report, size, quality = outcome.report, outcome.report.size, quality_of(outcome.report)
    disk = 0 if size.disk is None else size.disk.weights
    return (
        outcome.name,
        mb(disk),
        f"{size.baseline_disk_weights / disk:.2f} ×",
        f"{mb(size.resident)} | {mb(size.stock_resident_after)}",
        f"{report.coverage.fraction:.0%}",
        f"{quality.shown(quality.after)}\n{quality.interval}",
        "\n".join(speed(name, one) for name, one in (report.latency or {}).items()),
        "\n".join(f"{count} × {kernel}" for kernel, count in report.kernels.items()),
        outcome.proof.level,
    )


def mb(count: int | None) -> str:
    """Bytes in megabytes."""
    return "–" if count is None else f"{count / 1e6:.1f}"


def speed(name: str, timing: LatencyComparison) -> str:
    """The speed-up on one input shape with its interval, loud where it is a loss."""
    shape = name.removeprefix("input_ids ")
    interval = f"({timing.speedup_low:.2f} to {timing.speedup_high:.2f})"
    return f"{shape}: {'SLOWER ' if timing.verdict == 'slower' else ''}{timing.speedup:.2f} {interval}"


def write_summary(groups: Sequence[Sequence[Outcome]], out: Path) -> Path:
    """Write `summary.json` and `summary.md`; returns the path of the latter.

    Args:
        groups: The outcomes of each model.
        out: Where to.
    """
    outcomes = [outcome for group in groups for outcome in group]
    facts = {
        one.name: {"stock_quality": one.stock_quality, "report": one.report.model_dump(mode="json")}
        for one in outcomes
    }
    (out / "summary.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    here = outcomes[0].report.environment
    parts = [f"Measured on {here.processor}, {here.torch_threads} threads.", *(section(group) for group in groups)]
    path = out / "summary.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def section(outcomes: Sequence[Outcome]) -> str:
    """The Markdown about one model."""
    first = outcomes[0].report
    rows = [headings(first), ("---",) * len(headings(first)), original(first), *map(cells, outcomes)]
    lines = [f"| {' | '.join(flat(cell) for cell in row)} |" for row in rows]
    links = [f"- [{one.name}](reports/{one.name}/report.md)" for one in outcomes]
    return "\n".join([f"# {first.model}, compressed", "", *lines, "", *links])


def flat(cell: str) -> str:
    """A cell whose lines are joined for Markdown."""
    return cell.replace(" | ", " / ").replace("\n", "<br>")
