"""`hf_compress.evaluate`: everything measured against the original, in one report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.handover import plan_of
from ..checkpoint.record import Record, read_record, record_of
from ..core.errors import DeviceError, UnsupportedModelError, listed
from ..core.plan import Plan
from ..modules.kernels.choose import kernel_counts
from .environment import Environment, environment
from .forward import device_of, evaluating
from .latency import LatencyComparison, measure_latency, synchronizer
from .quality import Task, evaluate_quality
from .quality_results import QualityResult
from .report_files import headline, read_report, to_markdown, write_report
from .report_inputs import latency_inputs, runner
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

    Both run in eval mode and `torch.inference_mode`; their training flags are restored.

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
        UnsupportedModelError: The model was not compressed by this package, or the baseline is another class, is
            compressed too or has no weights, or the checkpoint holds another compression.
        DeviceError: Model and baseline are on different devices.
        InputError: The inputs don't fit, or none can be made.
        EvaluationDataError, MeasurementError, CheckpointNotFoundError, CorruptCheckpointError: As their names say.
    """
    plan = _checked_plan(model, baseline)
    record = None if path is None else _checked_record(Path(path), plan)
    here = environment()
    latency = _latency(model, baseline, inputs, pairs, clock)
    quality = _quality(model, baseline, data, tokenizer, task, max_length, batch_size)
    return Report(
        model=record_of(baseline, plan).source or (record or record_of(model, plan)).source,
        architecture=type(model).__name__,
        method=plan.method,
        request=plan.request,
        format=plan.format,
        size=_size(model, baseline, path, record),
        coverage=_coverage(plan),
        layers=_layers(plan),
        kernels=kernel_counts(model),
        latency=latency,
        quality=quality,
        proof=None if record is None else record.proof,
        environment=here,
        notes=(*plan.notes, *_notes(here, record, quality)),
    )


def _checked_plan(model: nn.Module, baseline: nn.Module) -> Plan:
    """The model's plan, once model and baseline are a pair that can be compared."""
    plan, name = plan_of(model), type(model).__name__
    if plan is None:
        raise UnsupportedModelError(
            f"The {name} was not compressed by hf_compress: it has no plan.",
            "hf_compress.quantize(model, config) or hf_compress.load(path); the order is evaluate(model, baseline)",
        )
    if plan_of(baseline) is not None:
        raise UnsupportedModelError(
            f"The baseline, a {type(baseline).__name__}, is compressed too; quantize changes a live model in place.",
            "pass the original: load it again, or copy.deepcopy(model) before quantizing",
        )
    if not isinstance(model, type(baseline)):
        raise UnsupportedModelError(
            f"The model is a {name} and its baseline a {type(baseline).__name__}.",
            f"load the original with {name}.from_pretrained",
        )
    devices = [device_of(side) for side in (model, baseline)]
    if "meta" in (device.type for device in devices):
        raise UnsupportedModelError(f"The {name} or its baseline is on the meta device.", "load the weights")
    if devices[0] != devices[1]:
        raise DeviceError(
            f"The model is on {devices[0]} and its baseline on {devices[1]}.", f'baseline.to("{devices[0]}")'
        )
    return plan


def _checked_record(path: Path, plan: Plan) -> Record:
    """The checkpoint's record, once it is of the same compression as the model."""
    record = read_record(path)
    there = {row.name: row.scheme for row in record.plan.rows}
    here = {row.name: row.scheme for row in plan.rows}
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing or record.plan.method != plan.method:
        detail = f": they differ at {listed(differing, 3)}" if differing else ""
        raise UnsupportedModelError(
            f"{path} holds another compression ({record.plan.method}) than the model ({plan.method}){detail}.",
            f'model = hf_compress.load("{path}")',
        )
    return record


def _latency(
    model: nn.Module, baseline: nn.Module, inputs: object, pairs: int, clock: Callable[[], float]
) -> dict[str, LatencyComparison]:
    """The comparison for each input, named by its shape."""
    wait = synchronizer(device_of(model))
    with evaluating(model, baseline):
        return {
            name: measure_latency(
                runner(model, one), runner(baseline, one), pairs=pairs, clock=clock, synchronize=wait
            )
            for name, one in latency_inputs(model, inputs).items()
        }


def _quality(
    model: nn.Module,
    baseline: nn.Module,
    data: Data | None,
    tokenizer: Processor | None,
    task: Task | None,
    max_length: int | None,
    batch_size: int,
) -> QualityResult | None:
    """Quality on the data, if there is any."""
    if data is None:
        return None
    if not isinstance(model, PreTrainedModel) or not isinstance(baseline, PreTrainedModel):
        raise UnsupportedModelError(
            f"The quality of a {type(model).__name__} can't be measured: it is no transformers model.",
            "leave `data` out",
        )
    return evaluate_quality(model, baseline, data, tokenizer, task, max_length=max_length, batch_size=batch_size)


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
    load = here.load_average_before
    if load is not None and here.logical_cpus is not None and load[0] > here.logical_cpus:
        notes.append(
            f"The machine was busy before measuring: {load[0]:.1f} runnable processes on {here.logical_cpus} "
            "logical processors."
        )
    return notes
