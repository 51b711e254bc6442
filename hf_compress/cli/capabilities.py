"""`hf-compress capabilities`: which recipe works on which model, in which checkpoint format."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import Output

if TYPE_CHECKING:
    from ..pipeline.capabilities import Capabilities, Cell

NAME = "capabilities"
EXAMPLES = (
    "hf-compress capabilities",
    "hf-compress capabilities --family gpt2",
    "hf-compress capabilities --method hqq --json",
)

LONGEST = len("compressed-tensors")
"""Of the words in the overview: a name that is broken in two can't be copied."""


def command(
    ctx: typer.Context,
    family: Annotated[str | None, typer.Option("--family", "-f", help="A family, such as gpt2; or its class.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="A method or a packaged recipe.")] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what was probed: recipes by kind of weight, or with --family or --method every cell."""
    from ..pipeline.capabilities import read_capabilities

    output = Output.of(ctx, as_json, quiet)
    found = read_capabilities().chosen(method, family)
    if family is None and method is None:
        _overview(output, found)
    else:
        _cells(output, found)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    output.text(f"probed with {versions}")
    output.result(found.model_dump(mode="json"))


def _overview(output: Output, found: Capabilities) -> None:
    """Recipes by kind of weight."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("recipe", *(Column(kind, min_width=LONGEST) for kind in found.kinds), padding=0)
    for recipe in found.recipes:
        table.add_row(recipe.name, *(found.summary(recipe.name, kind) for kind in found.kinds))
    needed = sum(LONGEST + 1 for _ in found.kinds) + max(len(recipe.name) for recipe in found.recipes) + 2
    console = Console(width=max(needed, shutil.get_terminal_size((140, 24)).columns), color_system=None)
    with console.capture() as drawn:
        console.print(table)
    output.text(drawn.get().rstrip())


def _cells(output: Output, found: Capabilities) -> None:
    """Every cell, by family and recipe."""
    for family in found.families:
        output.text(f"{family.name} ({family.architecture}: {', '.join(family.kinds)})")
        output.table(_row(cell) for cell in found.cells if cell.family == family.name)


def _row(cell: Cell) -> tuple[str, ...]:
    """One cell."""
    if cell.result == "ok":
        told = f"{cell.format}, coverage {cell.coverage:.0%}, proof {cell.proof}"
    else:
        told = f"{cell.result} [{cell.code}] {cell.message}" + (f" Fix: {cell.fix}" if cell.fix else "")
    return cell.recipe, cell.asked, told
