"""Options that commands share, and the configuration that they add up to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..core.registry import METHODS

if TYPE_CHECKING:
    from ..core.config import QuantConfig

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id or a directory.")]
MethodName = Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS.names())}.")]
OptionalMethodName = Annotated[
    str | None, typer.Option("--method", "-m", help=f"Plan this method: {', '.join(METHODS.names())}.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="Bits per weight, 2 to 8.")]
GroupSize = Annotated[
    str | None,
    typer.Option("--group-size", metavar="N|channel|tensor", help="Consecutive inputs that share a scale."),
]
Symmetric = Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")]
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
    typer.Option("--format", metavar="NAME", help="auto, compressed-tensors or guarded."),
]


def configuration(method: str, **given: object) -> QuantConfig:
    """The method's configuration from the options that were given.

    Args:
        method: The method's name.
        given: Options by the names of the configuration's fields; None or empty where not given.

    Raises:
        MethodError: There is no such method.
        ConfigError: The method has no such option, or the value is impossible.
    """
    if isinstance(word := given.get("group_size"), str) and word.removeprefix("-").isdecimal():
        given["group_size"] = int(word)
    values = {name: value for name, value in given.items() if value is not None and value != []}
    return METHODS.get(method).config(**values)
