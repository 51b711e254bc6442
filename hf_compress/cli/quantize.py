"""`hf-compress quantize`: quantize, save, prove."""

from __future__ import annotations

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
    "hf-compress quantize bert bert-bf16 --method cast --dtype bf16 --dry-run",
)
# A directory without any of these gets a tokenizer with an empty vocabulary from transformers.
_PROCESSOR_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "processor_config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and estimate only; write nothing.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize MODEL and save it to OUT, proven by reloading it in a clean process."""
    output = Output.of(ctx, as_json, quiet)
    config = options.configuration(
        method,
        recipe,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        codebook=codebook,
        dtype=dtype,
        skip=skip,
        embeddings=embeddings,
        min_coverage=min_coverage,
        format=format,
    )
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
            "peak memory": f"{size(forecast.peak_bytes)} of {size(forecast.free_bytes)} free",
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
        HFCompressError: The plan is refused.
    """
    from .. import preflight
    from ..checkpoint.atomic import check_output, recover
    from ..core.errors import OutputExistsError

    if not dry_run:
        recover(out)
    try:
        check_output(out, overwrite)
    except OutputExistsError as error:
        fix = error.fix.replace("overwrite=True", "--overwrite")
        raise OutputExistsError(error.message, fix) from None
    return preflight(model, config)


def _quantize(
    output: Output, model: str, config: QuantConfig, out: Path, overwrite: bool, forecast: Preflight
) -> None:
    """Quantize, save and report."""
    from .. import quantize, save

    with output.progress("Quantizing") as advance:
        quantized = quantize(model, config, progress=advance)
    processor, problem = processor_of(model)
    with output.status("Saving and proving"):
        proof = save(quantized, out, tokenizer=processor, overwrite=overwrite)
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

    if not any(_has(model, name) for name in _PROCESSOR_FILES):
        return None, None
    try:
        return AutoProcessor.from_pretrained(model), None
    except (OSError, ValueError, ImportError) as error:
        return None, " ".join(str(error).split())


def _has(model: str, name: str) -> bool:
    """Whether a model has a file; offline, whether it is in the cache."""
    from transformers.utils import cached_file

    try:
        return cached_file(model, name) is not None
    except OSError:
        return False
