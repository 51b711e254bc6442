"""`hf-compress quantize`: quantize, save, prove."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .output import Output, proven, size

if TYPE_CHECKING:
    from ..checkpoint.record import Proof
    from ..core.config import QuantConfig
    from ..pipeline.preflight import Preflight

NAME = "quantize"
EXAMPLES = (
    "hf-compress quantize Qwen/Qwen3-0.6B qwen3-int4 --method rtn --bits 4",
    "hf-compress quantize bert bert-w8 -m int8_dynamic --skip '*.layer.0.*'",
    "hf-compress quantize Qwen/Qwen3-0.6B qwen3-gptq -m gptq --calibration texts.txt --rows 128",
    "hf-compress quantize bert bert-w8a8 -m int8_static --calibration texts.txt --observer percentile",
    "hf-compress quantize bert bert-bf16 --method cast --dtype bf16 --dry-run",
)


def command(
    ctx: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    method: options.MethodName = None,
    recipe: options.Config = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = None,
    codebook: options.Codebook = None,
    dtype: options.Dtype = None,
    skip: options.Skip = None,
    embeddings: options.Embeddings = None,
    min_coverage: options.MinCoverage = None,
    format: options.Format = None,
    observer: options.Observer = None,
    smoothing: options.Smoothing = None,
    act_order: options.ActOrder = None,
    preset: options.Preset = None,
    iterations: options.Iterations = None,
    calibration: options.CalibrationFile = None,
    rows: options.Rows = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and estimate only; write nothing.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize MODEL and save it to OUT, proven by reloading it in a clean process."""
    output = Output.of(ctx, as_json, quiet)
    config = options.configuration(method, recipe, **options.given(ctx))
    if config is None:
        raise typer.BadParameter("give --method or --config", ctx)
    output.calm_libraries()
    forecast = _checked(model, config, out, overwrite, dry_run)
    if dry_run:
        show_forecast(output, forecast)
        return
    _quantize(output, model, config, out, overwrite, forecast)


def show_forecast(output: Output, forecast: Preflight) -> None:
    """Print what would happen."""
    output.plan(forecast.plan)
    output.fields(
        {
            "size": f"{size(forecast.bytes_before)} → {size(forecast.bytes_after)}",
            "peak memory": f"{size(forecast.streamed_bytes)} of {size(forecast.free_bytes)} free",
            "format": forecast.plan.format,
        }
    )
    output.notes(forecast.notes)
    output.result(
        {
            "coverage": forecast.plan.coverage,
            "schemes": forecast.plan.by_scheme(),
            **forecast.model_dump(mode="json"),
        }
    )


def _checked(model: str, config: QuantConfig, out: Path, overwrite: bool, dry_run: bool) -> Preflight:
    """Everything that can be refused before the weights are read.

    Raises:
        OutputExistsError: The output is taken.
        CalibrationError: The data can't be used; a dry run says so here, others when they read it.
        HFCompressError: The plan is refused.
    """
    from .. import preflight
    from ..checkpoint.atomic import check_output
    from ..pipeline.compress import tidy
    from ..pipeline.preflight import check_calibration

    if not dry_run:
        tidy(out.absolute())
    with _told_as_option():
        check_output(out, overwrite)
    forecast = preflight(model, config)
    if dry_run:
        check_calibration(model, config)
    return forecast


@contextlib.contextmanager
def _told_as_option() -> Iterator[None]:
    """Name the option instead of the argument where an output is taken."""
    from ..core.errors import OutputExistsError

    try:
        yield
    except OutputExistsError as error:
        raise OutputExistsError(error.message, error.fix.replace("overwrite=True", "--overwrite")) from None


def _quantize(
    output: Output, model: str, config: QuantConfig, out: Path, overwrite: bool, forecast: Preflight
) -> None:
    """Quantize, save and report."""
    from .. import compress

    processor, problem = processor_of(model)
    with output.progress("Quantizing") as advance, _told_as_option():
        proof = compress(model, config, out, tokenizer=processor, overwrite=overwrite, progress=advance)
    notes = (*forecast.notes, *([f"the tokenizer or processor was not saved: {problem}"] if problem else []))
    _show(output, forecast, out, proof, processor, notes)


def _show(
    output: Output, forecast: Preflight, out: Path, proof: Proof, processor: Any, notes: tuple[str, ...]
) -> None:
    """Print what was done."""
    from ..evaluation.size import disk_bytes

    plan, before, after = forecast.plan, forecast.bytes_before, disk_bytes(out).weights
    output.plan(plan)
    output.fields(
        {
            "size": f"{size(before)} → {size(after)} ({after / before:.0%})",
            "proof": proven(proof),
            "saved": f"{out} ({plan.format})",
        }
    )
    output.notes(notes)
    output.result(
        {
            "path": str(out),
            "method": plan.method,
            "format": plan.format,
            "coverage": plan.coverage,
            "schemes": plan.by_scheme(),
            "bytes_before": before,
            "bytes_after": after,
            "processor": None if processor is None else type(processor).__name__,
            "proof": proof.model_dump(mode="json"),
            "notes": list(notes),
        }
    )


def processor_of(model: str) -> tuple[Any, str | None]:
    """The tokenizer or processor of a model, or None; and why it could not be read, if there is one."""
    from transformers import AutoProcessor

    from ..calibration.processors import PROCESSOR_FILES, TOKENIZER_FILES, has_file

    if not any(has_file(model, name) for name in (*TOKENIZER_FILES, *PROCESSOR_FILES)):
        return None, None
    try:
        return AutoProcessor.from_pretrained(model), None
    except (OSError, ValueError, ImportError) as error:
        return None, " ".join(str(error).split())
