"""What a GPTQ or AWQ checkpoint of another tool says of itself, in `config.json` or, from older tools, beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)

from ..core.errors import CorruptCheckpointError
from .record import has_record, read_config

SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote their settings before config.json had a place for them."""

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
"""Widths that are read."""

_LayoutName = Annotated[str, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)]


def _checked_patterns(dynamic: dict[str, dict[str, Any] | bool]) -> dict[str, dict[str, Any] | bool]:
    """The settings of some layers, if those that are read are for names that a regular expression tells."""
    for pattern in dynamic:
        try:
            re.compile("" if pattern.startswith("-:") else pattern.removeprefix("+:"))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return dynamic


class Settings(BaseModel):
    """What a GPTQ or AWQ checkpoint says of itself, under any tool's names.

    Attributes:
        method: `gptq` or `awq`.
        bits: Bits per code.
        group_size: Inputs per group; -1: all.
        desc_act: Whether groups may be in another order than the inputs.
        layout: `gptq`, `gptq_v2`, `gemm`, or one that is not read.
        backend: `llm-awq` for its own layout; other values don't matter.
        is_marlin_format: AutoGPTQ's word for another layout.
        dynamic: Other settings of some layers, by regular expression after `+:` or nothing; `-:` leaves layers out.
        meta: What wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: str = Field(validation_alias="quant_method")
    bits: StrictInt = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: StrictInt = Field(128, validation_alias=AliasChoices("group_size", "q_group_size"))
    desc_act: StrictBool = False
    layout: _LayoutName | None = Field(None, validation_alias=AliasChoices("checkpoint_format", "version", "format"))
    backend: _LayoutName | None = None
    is_marlin_format: StrictBool = False
    dynamic: Annotated[dict[str, dict[str, Any] | bool], AfterValidator(_checked_patterns)] | None = None
    meta: dict[str, Any] | None = None

    @property
    def tool(self) -> str:
        """What wrote it, such as ` of gptqmodel 7.7.0`, or empty."""
        named = (self.meta or {}).get("quantizer")
        first = named[0] if isinstance(named, list) and named else named
        return f" of {first.replace(':', ' ')}" if isinstance(first, str) else ""

    def of(self, name: str) -> tuple[int, int]:
        """Bits and group size of a layer.

        Raises:
            CorruptCheckpointError: They are no numbers.
        """
        for pattern, values in (self.dynamic or {}).items():
            matched = not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name)
            if matched and isinstance(values, dict):
                bits, size = values.get("bits", self.bits), values.get("group_size", self.group_size)
                if type(bits) is not int or type(size) is not int:
                    raise damaged(f"quantization_config.dynamic says bits={bits!r}, group_size={size!r} for {name}")
                return bits, size
        return self.bits, self.group_size


def foreign_settings(path: Path) -> Settings | None:
    """The settings of a GPTQ or AWQ checkpoint that this package did not write, or None where `path` is none.

    Raises:
        CorruptCheckpointError: They are damaged.
    """
    if not (path / "config.json").is_file() or has_record(path):
        return None
    stored = read_config(path).get("quantization_config")
    where = "config.json"
    for name, method in SETTINGS.items():
        if stored is None and (path / name).is_file():
            stored, where = _json(path / name, method), name
    known = tuple(BITS)  # compared, not hashed: a damaged config may hold a list there
    if not isinstance(stored, dict) or stored.get("quant_method") not in known:
        return None
    try:
        return Settings.model_validate(stored)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise damaged(f"{path / where} is damaged at {place}: {problem['msg']}") from None


def _json(path: Path, method: str) -> dict[str, Any]:
    """Settings from a file of their own.

    Raises:
        CorruptCheckpointError: It is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(f"{path} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise damaged(f"{path} holds no object")
    return {"quant_method": method, **values}


def damaged(message: str) -> CorruptCheckpointError:
    """The error for a checkpoint that contradicts itself."""
    return CorruptCheckpointError(f"{message}.", "download it again, or compress the original model")


@contextmanager
def of_another_tool() -> Iterator[None]:
    """Give errors about tensors the remedy that fits: this package did not write them and can't save them again.

    Raises:
        CorruptCheckpointError: What is raised inside, with another fix.
    """
    try:
        yield
    except CorruptCheckpointError as error:
        raise damaged(error.message.removesuffix(".")) from error
