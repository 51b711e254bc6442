"""Options that commands share, and the configuration that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError
from ..core.registry import METHODS, untrained

if TYPE_CHECKING:
    from ..core.config import Calibration, QuantConfig

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id or a directory.")]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help=f"One of {', '.join(untrained())}.")]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="NAME|FILE", help="A packaged recipe, or a YAML or JSON file."),
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight, 2 to 8.")]
GroupSize = Annotated[
    str | None,
    typer.Option("--group-size", metavar="N|channel|tensor", help="Consecutive inputs that share a scale."),
]
Symmetric = Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")]
Codebook = Annotated[
    str | None,
    typer.Option("--codebook", metavar="nf4|fp4|log|kmeans", help="Table of values, for codebook."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="bf16|fp16", help="Data type, for casts.")]
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="PATTERN", help="Glob or re:… of weights to keep; may be repeated."),
]
Embeddings = Annotated[
    str | None, typer.Option("--embeddings", metavar="keep|int8", help="What happens to embedding tables.")
]
MinCoverage = Annotated[
    float | None,
    typer.Option("--min-coverage", help="Smallest fraction to quantize, 0 to 1; 0.9 by default."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="auto, compressed-tensors, bitsandbytes, gptq, gptq_v2, awq or guarded."
    ),
]


Observer = Annotated[
    str | None,
    typer.Option(
        "--observer",
        metavar="NAME",
        help="How int8_static finds ranges: minmax, moving_average, percentile, mse, entropy.",
    ),
]
Smoothing = Annotated[
    float | None,
    typer.Option("--smoothing", metavar="ALPHA", help="Strength of SmoothQuant, 0 to 1, for int8_static."),
]
ActOrder = Annotated[
    bool | None,
    typer.Option("--act-order/--no-act-order", help="Whether gptq rounds columns of large inputs first."),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="fast|balanced|best", help="Steps of learned rounding, for autoround."),
]
Iterations = Annotated[int | None, typer.Option("--iterations", help="Steps per block instead of the preset's.")]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="FILE|generated", help="Texts (.txt, .jsonl, .parquet) for methods that need data."
    ),
]
Rows = Annotated[int | None, typer.Option("--rows", help="Most rows of calibration data; 128 by default.")]
SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", metavar="TOKENS", help="Most tokens per row; 512 by default.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the draw of calibration rows; 0 by default.")]

FIELDS = (
    *("bits", "group_size", "symmetric", "codebook", "dtype", "skip", "embeddings", "min_coverage", "format"),
    *("observer", "smoothing", "act_order", "preset", "iterations"),
)
"""Options that are fields of configurations."""
DATA = ("calibration", "rows", "sequence_length", "seed")
"""Options that say what a method is calibrated with."""


def given(ctx: typer.Context) -> dict[str, Any]:
    """The options of a call that make up a configuration, by the names of its fields; those not given left out."""
    values = {name: ctx.params.get(name) for name in (*FIELDS, *DATA)}
    return {name: value for name, value in values.items() if value is not None and value not in ([], ())}


def calibration(base: Calibration | None, values: Mapping[str, Any]) -> Calibration | None:
    """Calibration data as options describe it, or None where none of them is given.

    Args:
        base: What they change, such as that of a recipe.
        values: Some of `DATA` by name; a file is checked when it is read.

    Raises:
        CalibrationError: A number is impossible.
    """
    from ..calibration.data import GENERATED
    from ..core.config import Calibration

    settings = {name: values[name] for name in DATA if name in values}
    if not settings:
        return base
    if (file := settings.pop("calibration", None)) is not None:
        settings["data"] = file if file == GENERATED else Path(file)
    return replace(base or Calibration(), **settings)


def configuration(method: str | None, recipe: str | None, **given: object) -> QuantConfig | None:
    """The configuration that a method or a recipe, and the options that were given, add up to.

    Args:
        method: The method's name.
        recipe: Name or file of a recipe, whose fields the options override.
        given: Options by the names of the configuration's fields, and some of `DATA`.

    Returns:
        The configuration; None without a method and a recipe.

    Raises:
        MethodError: There is no such method.
        ConfigError: The method has no such option, a value is impossible, or the recipe is of another method.
        CalibrationError: The method needs no data, or a number is impossible.
        BadParameter: Options were given without a method.
    """
    if isinstance(word := given.get("group_size"), str) and word.removeprefix("-").isdecimal():
        given["group_size"] = int(word)
    if recipe is not None:
        return _changed(recipe, method, given)
    if method is not None:
        fields = {name: value for name, value in given.items() if name not in DATA}
        return METHODS.get(method).config(**fields, calibration=calibration(None, given))
    if given:
        raise typer.BadParameter("options of a method need --method or --config")
    return None


def _changed(recipe: str, method: str | None, values: Mapping[str, object]) -> QuantConfig:
    """A recipe with other values for some of its fields."""
    from ..pipeline.recipes import load_config

    config = load_config(recipe)
    if method is not None and METHODS.get(method).name != config.method:
        raise ConfigError(
            f"--config {recipe} is a recipe of the method {config.method!r}, but --method is {method!r}.",
            "give one of them",
        )
    fields = config.fields.model_dump(exclude_unset=True)
    fields |= {name: value for name, value in values.items() if name not in DATA}
    return type(config)(**fields, calibration=calibration(config.calibration, values))
