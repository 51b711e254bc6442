"""The console entry point `hf-compress`. Commands import torch when they run, so `--help` stays fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import _version
from ..core.errors import HFCompressError
from . import capabilities, compare, doctor, inspect, quantize, verify
from .options import AsJson, Quiet
from .output import Output

_EXAMPLES = (
    "Examples:",
    "hf-compress quantize Qwen/Qwen3-0.6B qwen3-int4 --method rtn --bits 4",
    "hf-compress compare bert --methods rtn,int8_dynamic --data labelled.csv --out comparison",
    "hf-compress inspect qwen3-int4",
    "hf-compress verify qwen3-int4",
    "hf-compress doctor",
)


class _Group(TyperGroup):
    """Reports our own errors in one line with exit code 1; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except HFCompressError as error:
            ctx.ensure_object(Output).error(error)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\n\n".join(_EXAMPLES),
)
for _module in (quantize, compare, inspect, verify, capabilities, doctor):
    app.command(_module.NAME, epilog="\n\n".join(("Examples:", *_module.EXAMPLES)))(_module.command)


def _print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"hf-compress {_version.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    ctx: typer.Context,
    as_json: AsJson = False,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress any Hugging Face model, prove what it cost, ship it anywhere."""
    ctx.obj = Output(as_json, quiet)


def main(arguments: Sequence[str] | None = None, program: str = "hf-compress") -> None:
    """Run the command line and exit.

    Args:
        arguments: The words after the program's name; those of this process by default.
        program: The name that usage messages show.
    """
    app(args=arguments, prog_name=program)


if __name__ == "__main__":
    main()
