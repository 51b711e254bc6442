"""`hf-compress inspect`: what was, or would be, done to every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import Output, proven, size
from .quantize import show_forecast

if TYPE_CHECKING:
    from ..core.config import QuantConfig
    from ..pipeline.inspect import Inspection

NAME = "inspect"
EXAMPLES = (
    "hf-compress inspect qwen3-int4 --all",
    "hf-compress inspect Qwen/Qwen3-0.6B --method rtn --bits 4",
    "hf-compress inspect Qwen/Qwen3-0.6B --config hqq-int4",
)


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help="A checkpoint, or a model's Hub id or directory.")
    ],
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
    every: Annotated[bool, typer.Option("--all", help="Print every weight.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's plan, sizes and proof; with --method or --config, what would be done to a model, unread."""
    output = Output.of(ctx, as_json, quiet)
    config = options.configuration(method, recipe, **options.given(ctx))
    output.calm_libraries()
    if config is None:
        _inspect(output, model, every)
    else:
        _forecast(output, model, config, every)


def _forecast(output: Output, model: str, config: QuantConfig, every: bool) -> None:
    """Print what would be done to a model."""
    from .. import preflight

    forecast = preflight(model, config)
    show_forecast(output, forecast)
    if every:
        output.rows(forecast.plan)


def _inspect(output: Output, model: str, every: bool) -> None:
    """Print what was done to a checkpoint."""
    from .. import inspect

    found = inspect(model)
    if found.plan is not None:
        output.plan(found.plan)
    output.fields(_facts(found))
    output.notes(found.notes)
    if every and found.plan is not None:
        output.rows(found.plan)
    output.result(found.model_dump(mode="json"))


def _facts(found: Inspection) -> dict[str, str]:
    """What is known, by name."""
    facts = {"source": found.source}
    if found.plan is not None:
        facts["format"] = found.plan.format
    if found.disk_bytes is not None:
        facts["on disk"] = size(found.disk_bytes)
    if found.proof is not None:
        facts["proof"] = proven(found.proof)
    return facts
