"""`hf-compress inspect`: what was, or would be, done to every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import Output, proven, size
from .quantize import show_forecast

if TYPE_CHECKING:
    from ..pipeline.inspect import Inspection

NAME = "inspect"
EXAMPLES = (
    "hf-compress inspect qwen3-int4 --all",
    "hf-compress inspect Qwen/Qwen3-0.6B --method rtn --bits 4",
)


def command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="A checkpoint, or a model's Hub id or directory.")],
    method: options.OptionalMethodName = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = None,
    dtype: options.Dtype = None,
    skip: options.Skip = None,
    embeddings: options.Embeddings = None,
    min_coverage: options.MinCoverage = None,
    format: options.Format = None,
    every: Annotated[bool, typer.Option("--all", help="Print every weight.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's plan, sizes and proof; with --method, what would be done to a model. Reads no weights."""
    output = Output.of(ctx, as_json, quiet)
    given = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "dtype": dtype,
        "skip": skip,
        "embeddings": embeddings,
        "min_coverage": min_coverage,
        "format": format,
    }
    if method is not None:
        _forecast(output, model, options.configuration(method, **given), every)
        return
    _inspect(output, model, every)
