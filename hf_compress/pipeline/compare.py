"""`hf_compress.compare`: several configurations of one model, each saved, proven, reloaded and measured."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..apply.planning import is_quantized
from ..checkpoint.atomic import atomic_directory, check_output, recover
from ..checkpoint.save import load, output_path, save
from ..checkpoint.stock import load_source
from ..checkpoint.worker import CleanWorker
from ..core.config import Calibration, QuantConfig
from ..core.errors import (
    AlreadyQuantizedError,
    CalibrationError,
    ConfigError,
    HFCompressError,
    UnsupportedModelError,
)
from ..evaluation.comparison import Comparison, Entry, Failure, Original, baseline_quality
from ..evaluation.comparison_files import MARKER, write_comparison
from ..evaluation.environment import Environment, environment
from ..evaluation.latency import check_timing
from ..evaluation.plots import require_matplotlib
from ..evaluation.quality import Task, prepare_quality
from ..evaluation.quality_data import check_arguments
from ..evaluation.report import WARMUP, Report, busy, evaluate, try_inputs
from ..evaluation.report_inputs import latency_inputs
from ..evaluation.size import resident_bytes, stored_bytes
from .compare_names import named_configs, request_of
from .planning import Request, model_class, model_config
from .quantize import Progress, quantize

if TYPE_CHECKING:
    from ..evaluation.quality_data import Data, Processor

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class _Job:
    """What is the same for every configuration; see `compare`."""

    source: PreTrainedModel | str | Path
    baseline: PreTrainedModel
    data: Data | None
    tokenizer: Processor | None
    task: Task | None
    calibration: Calibration | None
    inputs: object
    pairs: int
    max_length: int | None
    batch_size: int


def compare(
    model_or_id: nn.Module | str | Path,
    configs: Sequence[Request] | Mapping[str, Request],
    data: Data | None = None,
    *,
    tokenizer: Processor | None = None,
    task: Task | None = None,
    calibration: Any = None,
    inputs: object = None,
    out: str | Path | None = None,
    pairs: int = 20,
    max_length: int | None = None,
    batch_size: int = 8,
    keep_checkpoints: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    worker: CleanWorker | None = None,
) -> Comparison:
    """Quantize a model in several ways and measure each as it ships: saved, proven, reloaded, against the original.

    One that is refused or fails is an entry with its error, and the others go on. All is checked before the first.

    Args:
        model_or_id: A Hub id or directory, or a live model, which is copied and stays as it is.
        configs: Configurations of this package or stock ones (`BitsAndBytesConfig`, `TorchAoConfig`), which need an
            id or directory; by name, or named after what they say.
        data: Labelled examples or texts for quality, see `evaluate`; None measures none.
        tokenizer: Tokenizer of the texts, or image processor of the images.
        task: `"classification"`, `"causal-lm"` or `"embedding"`; told from the model's class by default.
        calibration: Calibration data for all configurations that need data and have none of their own.
        inputs: Forward arguments for latency, a dict of tensors or a list of them; made by default.
        out: Directory for `comparison.json`, `comparison.md` and `pareto.png`; appears when all are measured.
        pairs: Timed pairs per input, at least 8.
        max_length: Tokens per text for quality.
        batch_size: Examples per forward for quality.
        keep_checkpoints: Keep the proven checkpoints in `out`, as `checkpoints/NAME`.
        overwrite: Replace a comparison at `out`.
        progress: Called with the number of configurations done and their number.
        worker: A clean process to reuse for the proofs; one is started for this call by default.

    Raises:
        ConfigError: There is no configuration, or what is given for one is none, or a name is not possible.
        CalibrationError, BackendError: No configuration takes the data; a picture is wanted and matplotlib is absent.
        OutputExistsError, WriteError: The output is taken, or can't be written.
        HFCompressError: The original, the data or the inputs don't fit, or every configuration failed: then of the
            first one's kind, with all of them in its message.
    """
    named = named_configs(configs)
    _check(out, keep_checkpoints, overwrite, progress)
    check_timing(pairs, WARMUP, time.perf_counter)
    check_arguments(task, max_length, batch_size)
    shared = _shared_calibration(calibration, named, tokenizer)
    source, baseline = _original(model_or_id)
    job = _Job(source, baseline, data, tokenizer, task, shared, inputs, pairs, max_length, batch_size)
    _check_measurable(job)
    with _folder(out, overwrite) as folder, CleanWorker() if worker is None else nullcontext(worker) as clean:
        comparison = _carry_out(job, named, folder, clean, keep_checkpoints, progress)
        if out is not None:
            write_comparison(comparison, folder)
    return comparison


def _carry_out(
    job: _Job,
    named: Mapping[str, Request],
    folder: Path,
    worker: CleanWorker,
    keep: bool,
    progress: Progress | None,
) -> Comparison:
    """Try every configuration.

    Raises:
        HFCompressError: All failed.
    """
    here = environment()
    outcomes: dict[str, Report | HFCompressError] = {}
    for name, config in named.items():
        outcomes[name] = _outcome(job, config, folder / CHECKPOINTS / name, worker, keep)
        if progress is not None:
            progress(len(outcomes), len(named))
    requests = {name: request_of(config) for name, config in named.items()}
    return _comparison(job.baseline, here, requests, outcomes, keep)


def _check(out: object, keep_checkpoints: bool, overwrite: bool, progress: object) -> None:
    """What needs neither model nor data.

    Raises:
        ConfigError, BackendError, OutputExistsError, WriteError: See `compare`.
    """
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is a {type(progress).__name__}.", "pass a function of done and total")
    if out is None:
        if keep_checkpoints:
            raise ConfigError("keep_checkpoints=True needs a place to keep them.", 'out="comparison"')
        return
    target = output_path(out)
    recover(target, (MARKER,))
    check_output(target, overwrite, (MARKER,))
    require_matplotlib()


def _shared_calibration(
    given: object, configs: Mapping[str, Request], tokenizer: Processor | None
) -> Calibration | None:
    """Calibration data for those that need some, read with the comparison's tokenizer unless it has its own.

    Raises:
        CalibrationError: None needs it.
    """
    if given is None:
        return None
    if not any(_wants_data(config) for config in configs.values()):
        raise CalibrationError(
            f"Calibration data was given, but none of {', '.join(configs)} takes it.",
            "leave `calibration` out, or compare a method that needs data, such as GPTQQuantConfig()",
        )
    shared = given if isinstance(given, Calibration) else Calibration(given)
    return shared if shared.tokenizer is not None else replace(shared, tokenizer=tokenizer)


def _wants_data(config: Request) -> bool:
    """Whether a configuration needs calibration data and has none of its own."""
    return isinstance(config, QuantConfig) and config.spec.needs_data and config.calibration is None


def _original(model_or_id: object) -> tuple[PreTrainedModel | str | Path, PreTrainedModel]:
    """What to quantize from, and the baseline: the live model itself, or the id loaded once in its own data type.

    Raises:
        UnsupportedModelError, AlreadyQuantizedError, ModelNotFoundError, CorruptCheckpointError: As their names say.
    """
    if isinstance(model_or_id, PreTrainedModel):
        if is_quantized(model_or_id):
            raise AlreadyQuantizedError(
                f"{type(model_or_id).__name__} is quantized already.", "compare from the original model"
            )
        return model_or_id, model_or_id
    if not isinstance(model_or_id, str | Path):
        raise UnsupportedModelError(
            f"A {type(model_or_id).__name__} can't be saved and reloaded.", "pass a transformers model or its id"
        )
    architecture = model_class(model_config(model_or_id), model_or_id)
    return model_or_id, load_source(architecture, model_or_id).eval()


def _check_measurable(job: _Job) -> None:
    """Refuse data and inputs that don't fit the original.

    Raises:
        EvaluationDataError, UnsupportedModelError, InputError: As their names say.
    """
    base = job.baseline
    if job.data is not None:
        prepare_quality(
            base, base, job.data, job.tokenizer, job.task, max_length=job.max_length, batch_size=job.batch_size
        )
    try_inputs({"original": base}, latency_inputs(base, job.inputs))


@contextmanager
def _folder(out: str | Path | None, overwrite: bool) -> Iterator[Path]:
    """Where to work: the output's temporary sibling, which then takes its place, or a temporary directory."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="hf_compress-") as made:
            yield Path(made)
        return
    with atomic_directory(output_path(out), overwrite, (MARKER,)) as folder:
        yield folder
        if (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir()):
            (folder / CHECKPOINTS).rmdir()


def _outcome(job: _Job, config: Request, path: Path, worker: CleanWorker, keep: bool) -> Report | HFCompressError:
    """One configuration's report or error; its checkpoint stays if it is wanted and could be measured."""
    try:
        report = _measure(job, config, path, worker)
    except HFCompressError as error:
        shutil.rmtree(path, ignore_errors=True)
        return type(error)(error.message, error.fix)  # a new one: the traceback would keep models in memory
    if not keep:
        shutil.rmtree(path)
    return report


def _measure(job: _Job, config: Request, path: Path, worker: CleanWorker) -> Report:
    """Quantize, save with proof, reload, measure."""
    source = copy.deepcopy(job.source) if isinstance(job.source, PreTrainedModel) else job.source
    calibration = job.calibration if _wants_data(config) else None
    save(quantize(source, copy.copy(config), calibration), path, tokenizer=job.tokenizer, worker=worker)
    del source
    return evaluate(
        load(path),
        job.baseline,
        job.data,
        tokenizer=job.tokenizer,
        task=job.task,
        path=path,
        inputs=job.inputs,
        pairs=job.pairs,
        max_length=job.max_length,
        batch_size=job.batch_size,
    )


def _comparison(
    baseline: PreTrainedModel,
    here: Environment,
    requests: Mapping[str, dict[str, Any]],
    outcomes: Mapping[str, Report | HFCompressError],
    kept: bool,
) -> Comparison:
    """Everything together.

    Raises:
        HFCompressError: Every configuration failed.
    """
    reports = {name: one for name, one in outcomes.items() if isinstance(one, Report)}
    if not reports:
        raise _all_failed({name: one for name, one in outcomes.items() if isinstance(one, HFCompressError)})
    first = next(iter(reports.values()))
    return Comparison(
        model=first.model,
        architecture=type(baseline).__name__,
        environment=here,
        baseline=Original(
            dtype=str(baseline.dtype).removeprefix("torch."),
            disk_weights=stored_bytes(baseline),
            resident=resident_bytes(baseline),
            quality=baseline_quality(first.quality),
        ),
        entries=tuple(_entry(name, requests[name], one, kept) for name, one in outcomes.items()),
        notes=tuple(_notes(here, reports)),
    )


def _entry(name: str, request: dict[str, Any], outcome: Report | HFCompressError, kept: bool) -> Entry:
    """One configuration as data."""
    if isinstance(outcome, Report):
        checkpoint = f"{CHECKPOINTS}/{name}" if kept else None
        return Entry(name=name, request=request, report=outcome, checkpoint=checkpoint)
    failure = Failure(code=outcome.code, message=outcome.message, fix=outcome.fix)
    return Entry(name=name, request=request, error=failure)


def _all_failed(errors: Mapping[str, HFCompressError]) -> HFCompressError:
    """One error of the first one's kind that tells them all."""
    name, first = next(iter(errors.items()))
    if len(errors) == 1:
        return type(first)(f"{name}: {first.message}", first.fix)
    told = " ".join(f"{one}: [{error.code}] {error.message}" for one, error in errors.items())
    return type(first)(f"All {len(errors)} configurations failed. {told}", first.fix)


def _notes(here: Environment, reports: Mapping[str, Report]) -> Iterator[str]:
    """The reports' notes, each once; with the names it is of where it is not of all.

    Of the load only what it was before the first: later, what ran was this.
    """
    yield from busy(here)
    owners: dict[str, list[str]] = {}
    for name, report in reports.items():
        for note in report.notes:
            if note not in busy(report.environment):
                owners.setdefault(note, []).append(name)
    for note, names in owners.items():
        yield note if len(names) == len(reports) else f"{', '.join(names)}: {note}"
