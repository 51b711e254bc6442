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
Symmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
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
    float | None, typer.Option("--min-coverage", help="Smallest fraction to quantize, 0 to 1; 0.9 by default.")
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="auto|compressed-tensors|guarded", help="Checkpoint format."),
]


def configuration(
    method: str,
    *,
    bits: int | None,
    group_size: str | None,
    symmetric: bool | None,
    dtype: str | None,
    skip: list[str] | None,
    embeddings: str | None,
    min_coverage: float | None,
    format: str | None,
) -> QuantConfig:
    """The method's configuration from the options that were given.

    Args:
        method: The method's name.
        bits: As `--bits`; None where an option was not given.
        group_size: As `--group-size`: a number or a word.
        symmetric: As `--symmetric/--asymmetric`.
        dtype: As `--dtype`.
        skip: As all `--skip` together.
        embeddings: As `--embeddings`.
        min_coverage: As `--min-coverage`.
        format: As `--format`.

    Raises:
        MethodError: There is no such method.
        ConfigError: The method has no such option, or the value is impossible.
    """
    given = {
        "bits": bits,
        "group_size": _number_or_word(group_size),
        "symmetric": symmetric,
        "dtype": dtype,
        "skip": tuple(skip) if skip else None,
        "embeddings": embeddings,
        "min_coverage": min_coverage,
        "format": format,
    }
    return METHODS.get(method).config(**{name: value for name, value in given.items() if value is not None})


def _number_or_word(text: str | None) -> int | str | None:
    """A group size; the configuration judges words and numbers."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else text
