"""`hf_compress.evaluate`: everything measured against the original, in one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.foreign import running_kernels
from ..checkpoint.inputs import InputSet
from ..checkpoint.record import Record, record_of
from ..core.errors import InputError, UnsupportedModelError
from ..core.plan import Plan
from .environment import Environment, environment
from .forward import device_of, evaluating, refusing
from .latency import LatencyComparison, check_timing, measure_latency, synchronizer
from .quality import Task, prepare_quality
from .quality_data import check_arguments
from .quality_results import QualityResult
from .report_files import headline, read_report, to_markdown, write_report
from .report_inputs import latency_inputs, runner
from .report_pair import check_sizes, checked_plan, checked_record
from .report_schema import SCHEMA, Coverage, KeptWeight, Layer, Report, SchemeCount, Size
from .size import disk_bytes, resident_bytes, stored_bytes

if TYPE_CHECKING:
    from .quality_data import Data, Processor

__all__ = [
    "SCHEMA",
    "Coverage",
    "KeptWeight",
    "Layer",
    "Report",
    "SchemeCount",
    "Size",
    "evaluate",
    "headline",
    "read_report",
    "to_markdown",
    "write_report",
]

WARMUP = 3
"""Untimed calls of each side before its pairs."""


def evaluate(
    model: nn.Module,
    baseline: nn.Module,
    data: Data | None = None,
    *,
    tokenizer: Processor | None = None,
    task: Task | None = None,
    path: str | Path | None = None,
    inputs: object = None,
    pairs: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    max_length: int | None = None,
    batch_size: int = 8,
) -> Report:
    """Measure a compressed model against the original: size, coverage, latency, quality.

    Both run in eval mode and `torch.inference_mode`; their training flags are restored. Everything given is checked
    before anything is measured, and latency is measured last.

    Args:
        model: A model that this package compressed.
        baseline: The original, of the same class and on the same device, not compressed.
        data: Labelled examples or texts for quality, see `evaluate_quality`; None measures none.
        tokenizer: Tokenizer of the texts, or image processor of the images.
        task: `"classification"`, `"causal-lm"` or `"embedding"`; told from the model's class by default.
        path: The checkpoint that `hf_compress.save` wrote of this model; for bytes on disk and the proof.
        inputs: Forward arguments for latency, a dict of tensors or a list of them; made from the model's signature
            by default, see `latency_inputs`.
        pairs: Timed pairs per input, at least 8.
        clock: Returns seconds, never going back.
        max_length: Tokens per text for quality.
        batch_size: Examples per forward for quality.

    Raises:
        UnsupportedModelError: The model was not compressed by this package, or the baseline is of another class or
            size, is compressed too or has no weights, or the checkpoint holds another compression.
        DeviceError: Model and baseline are on different devices.
        InputError: The inputs don't fit or the model can't run them, or none can be made.
        EvaluationDataError, MeasurementError, CheckpointNotFoundError, CorruptCheckpointError: As their names say.
    """
    plan = checked_plan(model, baseline)
    check_timing(pairs, WARMUP, clock)
    check_arguments(task, max_length, batch_size)
    measure_quality = _prepared_quality(model, baseline, data, tokenizer, task, max_length, batch_size)
    check_sizes(model, baseline)
    record = None if path is None else checked_record(Path(path), plan)
    sets = latency_inputs(model, inputs)
    here = environment()
    try_inputs({"model": model, "baseline": baseline}, sets)
    quality = None if measure_quality is None else measure_quality()
    latency = _latency(model, baseline, sets, pairs, clock)
    measured = {"latency": latency, "quality": quality, "environment": here}
    return Report(
        **_described(model, baseline, plan, path, record),
        **measured,
        notes=(*plan.notes, *_notes(here, record, quality)),
    )


def _described(
    model: nn.Module, baseline: nn.Module, plan: Plan, path: str | Path | None, record: Record | None
) -> dict[str, Any]:
    """The fields of a report that need no measurement."""
    return {
        "model": record_of(baseline, plan).source or (record or record_of(model, plan)).source,
        "architecture": type(model).__name__,
        "method": plan.method,
        "request": plan.request,
        "format": plan.format,
        "size": _size(model, baseline, path, record),
        "coverage": _coverage(plan),
        "layers": _layers(plan),
        "kernels": running_kernels(model, plan),
        "proof": None if record is None else record.proof,
    }


def try_inputs(models: Mapping[str, nn.Module], sets: Mapping[str, InputSet]) -> None:
    """Run models once on each input, so that one that doesn't fit is refused before anything is measured.

    Args:
        models: By their names in messages, on one device.
        sets: Forward arguments by name.

    Raises:
        InputError: A model can't run them.
    """
    wait = synchronizer(device_of(next(iter(models.values()))))
    with evaluating(*models.values()):
        for name, one in sets.items():
            for told, side in models.items():
                with refusing(
                    InputError,
                    f"The {told}, a {type(side).__name__}, can't run the inputs {name}",
                    'inputs=dict(tokenizer("a text", return_tensors="pt")), of the model\'s own processor',
                ):
                    runner(side, one)()
                    if wait is not None:
                        wait()


def _latency(
    model: nn.Module, baseline: nn.Module, sets: dict[str, InputSet], pairs: int, clock: Callable[[], float]
) -> dict[str, LatencyComparison]:
    """The comparison for each input, named by its shape."""
    wait = synchronizer(device_of(model))
    with evaluating(model, baseline):
        return {
            name: measure_latency(
                runner(model, one),
                runner(baseline, one),
                pairs=pairs,
                warmup=WARMUP,
                clock=clock,
                synchronize=wait,
            )
            for name, one in sets.items()
        }


def _prepared_quality(
    model: nn.Module,
    baseline: nn.Module,
    data: Data | None,
    tokenizer: Processor | None,
    task: Task | None,
    max_length: int | None,
    batch_size: int,
) -> Callable[[], QualityResult] | None:
    """The measurement of quality on the data, once that is checked, if there is any."""
    if data is None:
        return None
    if not isinstance(model, PreTrainedModel) or not isinstance(baseline, PreTrainedModel):
        raise UnsupportedModelError(
            f"The quality of a {type(model).__name__} can't be measured: it is no transformers model.",
            "leave `data` out",
        )
    return prepare_quality(model, baseline, data, tokenizer, task, max_length=max_length, batch_size=batch_size)


def _size(model: nn.Module, baseline: nn.Module, path: str | Path | None, record: Record | None) -> Size:
    """Bytes on disk and in memory."""
    proven = None if record is None else record.proof.resident_bytes
    before, after = (None, None) if proven is None else proven
    return Size(
        disk=None if path is None else disk_bytes(path),
        baseline_disk_weights=stored_bytes(baseline),
        resident=resident_bytes(model),
        baseline_resident=resident_bytes(baseline),
        stock_resident_before=before,
        stock_resident_after=after,
    )


def _coverage(plan: Plan) -> Coverage:
    """What the plan compressed, and what not and why."""
    return Coverage(
        fraction=plan.coverage,
        by_scheme={scheme: SchemeCount(**counts) for scheme, counts in plan.by_scheme().items()},
        kept=tuple(
            KeptWeight(name=row.name, parameters=row.parameters, reason=row.reason, in_scope=row.in_scope)
            for row in plan.rows
            if not row.covered
        ),
        small_parameters=plan.small_parameters,
    )


def _layers(plan: Plan) -> tuple[Layer, ...]:
    """The compressed weights with their noise."""
    return tuple(Layer(name=row.name, scheme=row.scheme, sqnr_db=row.sqnr_db) for row in plan.rows if row.covered)


def _notes(here: Environment, record: Record | None, quality: QualityResult | None) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    if record is None:
        notes.append("Evaluated without a checkpoint: nothing here says that the model can be saved and reloaded.")
    elif record.proof.level == "none":
        notes.append("The checkpoint was never proven; `hf-compress verify` does so.")
    if quality is None:
        notes.append("Quality was not measured: no data was given.")
    elif quality.truncated:
        notes.append(f"Texts cut at {quality.max_length} tokens: {quality.truncated}.")
    return [*notes, *busy(here)]


def busy(here: Environment) -> tuple[str, ...]:
    """A note where more processes wanted to run before measuring than the machine has processors."""
    load = here.load_average_before
    if load is None or here.logical_cpus is None or load[0] <= here.logical_cpus:
        return ()
    return (
        f"The machine was busy before measuring: {load[0]:.1f} runnable processes on {here.logical_cpus} "
        "logical processors.",
    )
