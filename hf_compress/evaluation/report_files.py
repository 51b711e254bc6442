"""Reports as Markdown, and as files."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment as Jinja
from jinja2 import PackageLoader, StrictUndefined
from pydantic import BaseModel, ValidationError

from .. import _version
from ..checkpoint.atomic import disk_errors
from ..core.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, MethodError
from ..core.registry import METHODS
from .latency import LatencyComparison
from .quality_results import CausalLMQuality, ClassificationQuality, QualityResult
from .report_schema import SCHEMA, Layer, Report, Size

_WORST = 10
Document = TypeVar("Document", bound=BaseModel)


def headline(report: Report) -> str:
    """The report in one line; begins with SLOWER THAN THE ORIGINAL if it is, on any input, and by how much."""
    slower = _slower(report)
    if slower is None:
        return _summary(report)
    name, compared = slower
    return f"{compared.headline()} on {name}."


def to_markdown(report: Report) -> str:
    """The report as a page; its first line is `headline`."""
    versions = {**report.environment.packages, "hf_compress": report.version}
    stock = (("before", report.size.stock_resident_before), ("after", report.size.stock_resident_after))
    return page(
        "report.md.jinja",
        report=report,
        headline=headline(report),
        slower=_slower(report) is not None,
        summary=_summary(report),
        stock_resident=[(when, size) for when, size in stock if size],
        worst=_worst(report.layers),
        config=_config(report),
        packages=[f"{name} {version}" for name, version in versions.items() if version],
    )


def page(template: str, **values: Any) -> str:
    """A page of Markdown from one of our templates."""
    jinja = Jinja(
        loader=PackageLoader("hf_compress.evaluation", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; table cells are escaped by `cell`
    )
    jinja.filters["cell"] = cell
    return jinja.get_template(template).render(**values)


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.md`; each is old or new at any instant, never torn.

    Args:
        report: The report.
        directory: Where to; made if it is not there.

    Returns:
        Paths of the JSON and of the Markdown file.

    Raises:
        WriteError: The disk is full or not writable.
    """
    folder = Path(directory)
    contents = {"report.json": report.model_dump_json(indent=2) + "\n", "report.md": to_markdown(report)}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        _replace(folder / name, text)
    return folder / "report.json", folder / "report.md"


def read_report(path: str | Path) -> Report:
    """A report from its JSON file, or from the directory that holds `report.json`.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: It is no whole report, or a newer version of this package wrote it.
    """
    return read_document(Path(path), "report", Report, "evaluate")


def read_document(path: Path, what: str, kind: type[Document], again: str) -> Document:
    """A report or comparison from its JSON file, or from the directory that holds it.

    Args:
        path: The file, or the directory of `WHAT.json`.
        what: The word for it in messages, and the file's name.
        kind: Its class.
        again: The verb for making it anew.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: It is not whole, or a newer version of this package wrote it.
    """
    file = path / f"{what}.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointNotFoundError(f"There is no {what} at {file}.", f"check the path; {again} again")
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptCheckpointError(f"{file} is not whole JSON: {error}.", f"{again} and write it again") from None
    _check_schema(file, values, what)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or "its top"
        raise CorruptCheckpointError(
            f"The {what} {file} doesn't fit at {place}: {problem['msg']}.",
            f"{again} again, or pip install --upgrade hf-compress if a newer version wrote it",
        ) from None


def _check_schema(file: Path, values: object, what: str) -> None:
    """Refuse what is no report or comparison, and those of a later schema.

    Raises:
        CorruptCheckpointError: It is one of these.
    """
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise CorruptCheckpointError(f"{file} is no {what}: it has no schema_version.", "check the path")
    if version > SCHEMA:
        raise CorruptCheckpointError(
            f"{file} has schema_version {version}; hf_compress {_version.__version__} reads {SCHEMA}.",
            "pip install --upgrade hf-compress",
        )


def _replace(file: Path, text: str) -> None:
    """Write a file through a temporary sibling."""
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    with disk_errors(file):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _slower(report: Report) -> tuple[str, LatencyComparison] | None:
    """The input with the worst of the slower verdicts, or None."""
    slower = [item for item in (report.latency or {}).items() if item[1].verdict == "slower"]
    return min(slower, key=lambda item: item[1].speedup, default=None)


def _summary(report: Report) -> str:
    """Size, speed and quality in one line."""
    line = "; ".join([_size(report.size), _speed(report.latency or {}), _quality(report.quality)])
    return line[0].upper() + line[1:] + "."


def _size(size: Size) -> str:
    """`3.9 times smaller on disk`."""
    ratio, where = (size.resident_ratio, "in memory") if size.disk_ratio is None else (size.disk_ratio, "on disk")
    return f"{ratio:.2f} times smaller {where}" if ratio >= 1 else f"{1 / ratio:.2f} times LARGER {where}"


def _speed(latency: dict[str, LatencyComparison]) -> str:
    """`faster than the original (1.32 times its speed on input_ids 1×128)`, by verdicts."""
    groups: dict[str, list[str]] = {"slower": [], "faster": [], "same": []}
    for name, one in latency.items():
        interval = f"{one.speedup_low:.2f} to {one.speedup_high:.2f}"
        told = {
            "slower": f"{1 / one.speedup:.2f} times as long on {name}",
            "faster": f"{one.speedup:.2f} times its speed on {name}",
            "same": f"{one.speedup:.2f} times on {name}, 99 % interval {interval}",
        }
        groups[one.verdict].append(told[one.verdict])
    words = {
        "slower": "SLOWER than the original",
        "faster": "faster than the original",
        "same": "no difference in speed beyond 5 % proven",
    }
    parts = [f"{words[verdict]} ({'; '.join(inputs)})" for verdict, inputs in groups.items() if inputs]
    return ", ".join(parts) or "speed not measured"


def _quality(quality: QualityResult | None) -> str:
    """`accuracy 0.912 → 0.908 (95 % interval of the difference -0.012 to +0.004)`."""
    if quality is None:
        return "quality not measured"
    result, interval = quality.result, f"{100 * quality.confidence:.0f} % interval"
    if isinstance(result, ClassificationQuality):
        return (
            f"accuracy {result.baseline_accuracy:.3f} → {result.candidate_accuracy:.3f} ({interval} of the "
            f"difference {result.difference_low:+.3f} to {result.difference_high:+.3f})"
        )
    if isinstance(result, CausalLMQuality):
        return (
            f"perplexity {result.baseline_perplexity:.4g} → {result.candidate_perplexity:.4g}, × {result.ratio:.3f} "
            f"({interval} {result.ratio_low:.3f} to {result.ratio_high:.3f})"
        )
    return f"cosine with the original {result.mean:.4f} ({interval} {result.mean_low:.4f} to {result.mean_high:.4f})"


def _worst(layers: tuple[Layer, ...]) -> list[Layer]:
    """The layers with the lowest signal-to-noise ratio."""
    measured = [(layer.sqnr_db, index) for index, layer in enumerate(layers) if layer.sqnr_db is not None]
    return [layers[index] for _, index in sorted(measured)[:_WORST]]


def _config(report: Report) -> str:
    """The request as Python; its fields spelled out where this installation doesn't know the method."""
    try:
        return f"hfc.{METHODS.get(report.method).config(**_given(report.request))!r}"
    except (MethodError, ConfigError):
        return f"hfc.QuantConfig.from_dict({dict(method=report.method, **report.request)!r})"


def _given(request: dict[str, Any]) -> dict[str, Any]:
    """The request without nulls, which stand for fields that were not set."""
    return {name: value for name, value in request.items() if value is not None}


def cell(text: object) -> str:
    """Text inside a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
