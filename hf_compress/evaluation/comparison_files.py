"""Comparisons as a table, as Markdown, and as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .comparison import (
    ORIGINAL,
    Comparison,
    Panel,
    Standing,
    baseline_quality,
    panels,
    quality_axis,
    quality_of,
)
from .plots import save_picture
from .quality_results import CausalLMQuality, ClassificationQuality, QualityResult
from .report_files import cell, page, read_document
from .report_schema import Report

MARKER = "comparison.json"
"""The file that marks a directory as a comparison, which may be replaced on request."""
PICTURE = "pareto.png"

_WORDS: dict[Standing, str] = {
    "front": "on the front",
    "open": "not told apart from it by this measurement",
    "beaten": "beaten",
}


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `pareto.png` into a directory that is not yet in place."""
    (folder / MARKER).write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(comparison_markdown(comparison), encoding="utf-8")
    write_picture(comparison, folder / PICTURE)


def read_comparison(path: str | Path) -> Comparison:
    """A comparison from its JSON file, or from the directory that holds `comparison.json`.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: It is no whole comparison, or a newer version of this package wrote it.
    """
    return read_document(Path(path), "comparison", Comparison, "compare")


def write_picture(comparison: Comparison, path: Path) -> None:
    """Draw the comparison's panels as a PNG.

    Raises:
        BackendError: matplotlib is absent or broken.
    """
    save_picture(panels(comparison), title(comparison), path)


def title(comparison: Comparison) -> str:
    """Class and name of the model."""
    return " ".join(filter(None, (comparison.architecture, comparison.model)))


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a page."""
    versions = {**comparison.environment.packages, "hf_compress": comparison.version}
    return page(
        "comparison.md.jinja",
        comparison=comparison,
        table=markdown_table(comparison),
        fronts=fronts(comparison),
        failed=[entry for entry in comparison.entries if entry.error is not None],
        picture=PICTURE,
        packages=[f"{name} {version}" for name, version in versions.items() if version],
    )


def markdown_table(comparison: Comparison) -> str:
    """The table as Markdown, a line for the original and for each configuration."""
    heading, *lines = table(comparison)
    made = [heading, tuple("---" if index in (0, len(heading) - 1) else "---:" for index in range(len(heading)))]
    return "\n".join(f"| {' | '.join(cell(text).strip() for text in line)} |" for line in map(_flat, [*made, *lines]))


def table(comparison: Comparison) -> list[tuple[str, ...]]:
    """Headings, the original, and each configuration; cells with several inputs or kernels have several lines."""
    quality = next((report.quality for report in comparison.reports.values() if report.quality is not None), None)
    headings = (
        "",
        "disk, MB",
        "in memory here, MB",
        "in memory in stock, MB",
        "quality" if quality is None else _quality_heading(quality),
        "times the original's speed\n(99 % interval)",
        "coverage",
        "kernels",
        "proof",
    )
    base = comparison.baseline
    original = (f"{ORIGINAL}, {base.dtype}", mb(base.disk_weights), mb(base.resident), "", _original_quality(quality))
    rows: list[tuple[str, ...]] = [headings, (*original, "1", "", "", "")]
    for entry in comparison.entries:
        if entry.report is not None:
            rows.append((entry.name, *_cells(entry.report)))
        elif entry.error is not None:
            rows.append((entry.name, f"failed: {entry.error.code}", *[""] * (len(headings) - 2)))
    return rows


def fronts(comparison: Comparison) -> tuple[str, ...]:
    """One sentence for each panel: what is on its Pareto front, what may be, and what is not."""
    return tuple(_front(panel) for panel in panels(comparison))


def mb(count: int | None) -> str:
    """Bytes in decimal megabytes; three digits for small models."""
    if count is None:
        return "–"
    return f"{count / 1e6:.1f}" if count >= 10_000_000 else f"{count / 1e6:.3g}"


def _front(panel: Panel) -> str:
    found = panel.standings()
    parts = []
    for standing, words in _WORDS.items():
        names = [name for name, one in found.items() if one == standing]
        if names:
            parts.append(f"{words}: {', '.join(names)}")
    return f"{panel.x.key.capitalize()} and {panel.y.key}: {'; '.join(parts)}."


def _cells(report: Report) -> Iterator[str]:
    """A configuration's cells after its name."""
    size = report.size
    yield mb(size.resident if size.disk is None else size.disk.weights)
    yield mb(size.resident)
    yield mb(size.stock_resident_after)
    yield "" if report.quality is None else _quality(report.quality)
    yield "\n".join(_speeds(report))
    yield f"{report.coverage.fraction:.1%}"
    yield "\n".join(f"{count} × {kernel}" for kernel, count in report.kernels.items())
    yield "" if report.proof is None else report.proof.level


def _speeds(report: Report) -> Iterator[str]:
    """The speed-up on each input, loud where it is a loss."""
    for name, one in (report.latency or {}).items():
        loud = "SLOWER " if one.verdict == "slower" else ""
        shape = name.removeprefix("input_ids ")
        yield f"{shape}: {loud}{one.speedup:.2f} ({one.speedup_low:.2f} to {one.speedup_high:.2f})"


def _quality_heading(quality: QualityResult) -> str:
    percent = f"{100 * quality.confidence:.0f} %"
    if isinstance(quality.result, ClassificationQuality):
        return f"accuracy\n({percent} interval of the difference)"
    if isinstance(quality.result, CausalLMQuality):
        return f"perplexity\n({percent} interval of the ratio)"
    return f"{quality_axis(quality).label}\n({percent} interval)"


def _original_quality(quality: QualityResult | None) -> str:
    if quality is None:
        return ""
    base = baseline_quality(quality)
    if base is None:
        return "1"
    return f"{base:.1%}" if isinstance(quality.result, ClassificationQuality) else f"{base:.4g}"


def _quality(quality: QualityResult) -> str:
    result = quality.result
    if isinstance(result, ClassificationQuality):
        low, high = 100 * result.difference_low, 100 * result.difference_high
        return f"{result.candidate_accuracy:.1%} ({low:+.1f} to {high:+.1f})"
    if isinstance(result, CausalLMQuality):
        return f"{result.candidate_perplexity:.4g} (× {result.ratio_low:.3f} to {result.ratio_high:.3f})"
    found = quality_of(quality)
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def _flat(line: Sequence[str]) -> list[str]:
    """Cells whose lines are joined for Markdown."""
    return [text.replace("\n", "<br>") for text in line]
