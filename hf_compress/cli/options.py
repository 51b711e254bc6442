"""Options that commands share, and the configuration that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ConfigError
from ..core.registry import METHODS

if TYPE_CHECKING:
    from ..core.config import QuantConfig

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id or a directory.")]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS.names())}.")]
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
    typer.Option("--format", metavar="NAME", help="auto, compressed-tensors, bitsandbytes, gptq, gptq_v2 or guarded."),
]


def configuration(method: str | None, recipe: str | None, **given: object) -> QuantConfig | None:
    """The configuration that a method or a recipe, and the options that were given, add up to.

    Args:
        method: The method's name.
        recipe: Name or file of a recipe, whose fields the options override.
        given: Options by the names of the configuration's fields; None or empty where not given.

    Returns:
        The configuration; None without a method and a recipe.

    Raises:
        MethodError: There is no such method.
        ConfigError: The method has no such option, a value is impossible, or the recipe is of another method.
        BadParameter: Options were given without a method.
    """
    if isinstance(word := given.get("group_size"), str) and word.removeprefix("-").isdecimal():
        given["group_size"] = int(word)
    values = {name: value for name, value in given.items() if value is not None and value != []}
    if recipe is not None:
        return _changed(recipe, method, values)
    if method is not None:
        return METHODS.get(method).config(**values)
    if values:
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
    return type(config)(**{**fields, **values})
