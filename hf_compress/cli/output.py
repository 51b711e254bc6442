"""What commands print: text for people, or one JSON object; progress and errors go to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import typer

if TYPE_CHECKING:
    from ..checkpoint.record import Proof
    from ..core.errors import HFCompressError
    from ..core.plan import Plan


_WIDE = 400
"""Columns of what is no terminal: enough for any table, which is no wider than it needs to be."""


class Output:
    """Where a command's results go.

    Args:
        as_json: Print one JSON object instead of text.
        quiet: Print no text and no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._stdout = sys.stdout

    @classmethod
    def of(cls, ctx: typer.Context, as_json: bool, quiet: bool) -> Self:
        """The output of a command, whose flags may stand before or after the command's name.

        With JSON, whatever a library prints while the command runs goes to stderr.
        """
        output = ctx.ensure_object(cls)
        output.as_json |= as_json
        output.quiet |= quiet
        if output.as_json:
            ctx.with_resource(contextlib.redirect_stdout(sys.stderr))
        return output

    def calm_libraries(self) -> None:
        """Leave progress bars to the commands; with `--quiet`, also silence warnings of transformers."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.quiet:
            logging.set_verbosity_error()

    def text(self, *lines: str) -> None:
        """Print lines for people."""
        if lines and not self.as_json and not self.quiet:
            typer.echo("\n".join(lines), file=self._stdout)

    def fields(self, values: Mapping[str, str]) -> None:
        """Print names and values, one pair a line."""
        self.table([(name, value) for name, value in values.items()], indent="")

    def table(self, rows: Iterable[Sequence[str]], indent: str = "  ") -> None:
        """Print rows in aligned columns."""
        lines = [list(row) for row in rows]
        if not lines:
            return
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)
        self.text(*((indent + line).rstrip() for line in padded))

    def grid(self, rows: Sequence[Sequence[str]], title: str) -> None:
        """Print a table with headings, whose cells may have several lines, as wide as it needs to be."""
        from rich.console import Console
        from rich.table import Table

        if self.as_json or self.quiet:
            return
        terminal = self._stdout.isatty()
        table = Table(title=title, title_justify="left", show_lines=True)
        for index, heading in enumerate(rows[0]):
            justify: Literal["left", "right"] = "right" if 0 < index < len(rows[0]) - 1 else "left"
            table.add_column(heading, justify=justify, no_wrap=not terminal)
        for row in rows[1:]:
            table.add_row(*row)
        Console(file=self._stdout, width=None if terminal else _WIDE, markup=False).print(table)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the JSON object of a command."""
        if self.as_json:
            typer.echo(json.dumps(value, indent=2, ensure_ascii=False), file=self._stdout)

    def error(self, error: HFCompressError) -> None:
        """Print an error of ours: one line on stderr, or JSON on stdout."""
        self.result({"error": {"code": error.code, "message": error.message, "fix": error.fix}})
        if not self.as_json:
            typer.echo(" ".join(str(error).split()), err=True)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar on stderr, if that is a terminal.

        Yields:
            A function that takes how much is done, and how much there is in all.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=self.quiet or not console.is_terminal) as shown:
            task = shown.add_task(label, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def status(self, label: str) -> Iterator[None]:
        """Show what is going on on stderr, if that is a terminal."""
        from rich.console import Console

        console = Console(stderr=True, quiet=self.quiet)
        with console.status(label) if console.is_terminal else contextlib.nullcontext():
            yield

    def plan(self, plan: Plan) -> None:
        """Print coverage, and weights per scheme."""
        covered = sum(row.covered for row in plan.rows)
        self.text(f"{plan.method}: {covered} of {len(plan.rows)} weights, coverage {plan.coverage:.1%}")
        self.table(
            (
                label,
                f"{entry['weights']} weight{'s' if entry['weights'] != 1 else ''}",
                f"{entry['parameters']:,} values",
            )
            for label, entry in plan.by_scheme().items()
        )

    def rows(self, plan: Plan) -> None:
        """Print every weight of a plan."""
        self.table(
            (
                row.name,
                "×".join(map(str, row.shape)),
                row.scheme,
                "" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB",
                row.reason,
            )
            for row in plan.rows
        )

    def notes(self, notes: Iterable[str]) -> None:
        """Print remarks."""
        self.text(*(f"note: {note}" for note in notes))


def size(count: int) -> str:
    """Bytes for people, in decimal units, such as `4.2 MB`."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def proven(proof: Proof) -> str:
    """The level of a proof, who read the checkpoint, and why the level is not higher."""
    by = f", by {proof.reader}" if proof.reader else ""
    why = f": {proof.reason}" if proof.reason else ""
    return f"{proof.level}{by}{why}"
