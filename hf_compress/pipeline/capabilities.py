"""What works with what: probed by `scripts/capabilities.py` on tiny models, never written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import ConfigError, CorruptCheckpointError, nearest
from ..core.registry import untrained

FILE = Path(__file__).resolve().parent.parent / "capabilities.json"
"""The probed data."""

KEPT = "kept"


class Recipe(BaseModel):
    """A packaged recipe that was probed.

    Attributes:
        name: Its name for `--config`.
        method: The method's name.
        fields: The fields that it sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str
    fields: dict[str, int | float | bool | str | list[str]]


class Family(BaseModel):
    """A tiny model that was probed.

    Attributes:
        name: Short name.
        architecture: Name of its class.
        kinds: Kinds of weights that it has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    kinds: tuple[str, ...]


class Cell(BaseModel):
    """One recipe on one family with one `format`.

    Attributes:
        recipe: The recipe's name.
        family: The family's name.
        asked: The format in the request.
        result: `ok`: saved, proven, loaded, and the outputs are those of the saved model. `refused`: a typed error
            that says what to do. `failed`: anything else.
        format: The format that was written.
        coverage: Fraction of the values in scope that are compressed, 0 to 1.
        schemes: Labels of schemes by kind of weight, `kept` included.
        proof: Level of the proof.
        code: Code of the error.
        message: What it says, or what failed.
        fix: What it tells to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    family: str
    asked: str
    result: Literal["ok", "refused", "failed"]
    format: str = ""
    coverage: float = 0.0
    schemes: dict[str, list[str]] = {}
    proof: str = ""
    code: str = ""
    message: str = ""
    fix: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What was asked: recipe, family, format."""
        return self.recipe, self.family, self.asked

    def compresses(self, kind: str) -> bool:
        """Whether weights of a kind were compressed."""
        return any(label != KEPT for label in self.schemes.get(kind, ()))


class Capabilities(BaseModel):
    """The probed matrix: every recipe on every family with every format.

    Attributes:
        schema_version: Version of this layout.
        versions: Versions of the packages that it was probed with.
        recipes: The rows.
        families: The models.
        cells: The results.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    versions: dict[str, str | None]
    recipes: tuple[Recipe, ...]
    families: tuple[Family, ...]
    cells: tuple[Cell, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of weights that some recipe quantizes; a cast changes any kind."""
        quantized = [cell for cell in self.cells if cell.format != "dense"]
        every = {kind for family in self.families for kind in family.kinds}
        return tuple(sorted(kind for kind in every if any(cell.compresses(kind) for cell in quantized)))

    def chosen(self, method: str | None = None, family: str | None = None) -> Capabilities:
        """A part of the matrix.

        Args:
            method: A method, or one recipe; all by default.
            family: A family, or its model class; all by default.

        Raises:
            ConfigError: There is none of that name.
        """
        if method is not None and method not in untrained():
            _known("recipe or method", method, [*(one.name for one in self.recipes), *untrained()])
        recipes = tuple(one for one in self.recipes if method in (None, one.name, one.method))
        families = tuple(one for one in self.families if family in (None, one.name, one.architecture))
        if not families:
            _known("family", str(family), [one.name for one in self.families])
        names = {one.name for one in recipes} | {one.name for one in families}
        cells = tuple(cell for cell in self.cells if {cell.recipe, cell.family} <= names)
        return self.model_copy(update={"recipes": recipes, "families": families, "cells": cells})

    def formats(self, recipe: str, kind: str, asked: Iterable[str] | None = None) -> list[str]:
        """Formats that a recipe's weights of a kind were written in.

        Args:
            recipe: The recipe's name.
            kind: The kind of weight.
            asked: Formats in the request; all by default.
        """
        wanted = None if asked is None else set(asked)
        cells = (cell for cell in self.cells if cell.recipe == recipe and (wanted is None or cell.asked in wanted))
        return sorted({cell.format for cell in cells if cell.compresses(kind)})

    def summary(self, recipe: str, kind: str) -> str:
        """In words: what `auto` writes a kind of weight as, and what else holds it on request.

        `guarded` is named only where nothing else is: some models are guarded as a whole for one weight's sake.
        """
        every = self.formats(recipe, kind, ["auto"])
        auto = [name for name in every if name != "guarded"] or every
        others = [name for name in self.formats(recipe, kind) if name not in (*auto, "guarded")]
        tried = [
            cell
            for cell in self.cells
            if (cell.recipe, cell.asked) == (recipe, "auto") and cell.family in self._with(kind)
        ]
        refused = [cell for cell in tried if cell.result != "ok"]
        first = " or ".join(auto) or KEPT
        if refused:
            first = "refused" if len(refused) == len(tried) else f"{first} ({len(refused)} of {len(tried)} refused)"
        return first + (f"; on request {', '.join(others)}" if others else "")

    def _with(self, kind: str) -> set[str]:
        """Families that have a kind of weight."""
        return {family.name for family in self.families if kind in family.kinds}


def read_capabilities(file: Path = FILE) -> Capabilities:
    """The packaged matrix.

    Args:
        file: Where it lies.

    Raises:
        CorruptCheckpointError: The file is missing or damaged.
    """
    try:
        return Capabilities.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CorruptCheckpointError(
            f"{file} can't be read: {str(error).splitlines()[0]}.", "pip install --force-reinstall hf-compress"
        ) from None


def _known(what: str, name: str, known: list[str]) -> None:
    """Refuse a name that isn't known."""
    if name not in known:
        raise ConfigError(
            f"There is no {what} {name!r} in the matrix. {nearest(name, known)}".rstrip(),
            f"one of {', '.join(sorted(set(known)))}",
        )
