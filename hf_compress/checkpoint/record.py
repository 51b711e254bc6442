"""What travels with a checkpoint: the plan, where it came from, and the proof.

Every writer puts the record, without proof, into the safetensors metadata. `hf_compress.save` also writes
`hf_compress.json` with the proof.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .. import _version
from ..core.errors import CheckpointNotFoundError, CorruptCheckpointError, listed
from ..core.plan import Plan, dtype_name
from ..formats.base import plain_path
from ..modules.swap import packed_modules, packed_tensor

FILE = "hf_compress.json"
KEY = "hf_compress"


class Check(BaseModel):
    """One comparison of a proof.

    Attributes:
        name: What was compared.
        difference: Largest absolute difference.
        relative: Largest absolute difference over the largest absolute value.
        limit: Limit on `relative`; 0 means bit-equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    difference: float
    relative: float
    limit: float


class Proof(BaseModel):
    """How a checkpoint was proven.

    Attributes:
        level: `full`, `truncated`, `own-reader` or `none`.
        reason: Why a lower level than `full`, and how to raise it.
        reader: What reloaded it, such as `transformers 5.23.0`.
        checks: The comparisons.
        files: SHA-256 of every file but this record, by name.
        resident_bytes: Bytes of the model under a stock reload, before and after its first forward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["full", "truncated", "own-reader", "none"] = "none"
    reason: str = ""
    reader: str = ""
    checks: tuple[Check, ...] = ()
    files: dict[str, str] = {}
    resident_bytes: tuple[int, int] | None = None


class Record(BaseModel):
    """The content of `hf_compress.json`.

    Attributes:
        schema_version: Version of this layout.
        version: Version of hf_compress that wrote it.
        source: Model that was compressed: a Hub id, or the name of a local directory.
        plan: The plan as carried out.
        proof: The proof; level `none` when written by `save_pretrained`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    version: str = _version.__version__
    source: str = ""
    plan: Plan
    proof: Proof = Proof()


def record_of(model: nn.Module, plan: Plan) -> Record:
    """The record of a model in memory, not proven."""
    name = str(model.config.name_or_path) if isinstance(model, PreTrainedModel) else ""
    plan = _as_it_is(model, plan)
    return Record(source=Path(name).name if Path(name).is_dir() else name, plan=plan)


def _as_it_is(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the data types that packed weights have now: parts of the model may have been moved since."""
    now = {
        (plain_path(path), name): dtype_name(packed_tensor(module, name).scale.dtype)
        for path, module in packed_modules(model)
        for name in module.hfc_layouts
    }
    rows = (row.model_copy(update={"dtype": now.get((row.module, row.parameter), row.dtype)}) for row in plan.rows)
    return plan.model_copy(update={"rows": tuple(rows)})


def read_record(path: Path) -> Record:
    """The record of a checkpoint directory.

    Raises:
        CheckpointNotFoundError: There is no such directory, or hf_compress didn't write it.
        CorruptCheckpointError: The record or the weights file is damaged.
    """
    if not path.is_dir():
        raise CheckpointNotFoundError(f"There is no checkpoint directory at {path}.", "check the path")
    written = _written_text(path)
    text = _file_text(path)
    text = written if text is None else text
    if text is None:
        raise CheckpointNotFoundError(
            f"{path} was not written by hf_compress: no {FILE} and no record in the weights.",
            "load it with transformers' from_pretrained",
        )
    record = _parsed(path, text)
    if written is not None:
        _check_plan(path, record.plan, _parsed(path, written).plan)
    return record


def has_record(path: Path) -> bool:
    """Whether this package wrote a checkpoint directory.

    Raises:
        CorruptCheckpointError: Its weights file is damaged.
    """
    return (path / FILE).is_file() or _written_text(path) is not None


def _check_plan(path: Path, plan: Plan, written: Plan) -> None:
    """Compare the record's plan with the one that the weights were written by.

    Raises:
        CorruptCheckpointError: They differ.
    """
    if plan == written:
        return
    rows = {row.name: row for row in written.rows}
    changed = [row.name for row in plan.rows if rows.get(row.name) != row]
    raise CorruptCheckpointError(
        f"The plan in {path / FILE} is not the one that the weights were written by"
        f"{f': other rows for {listed(changed)}' if changed else ''}.",
        "save the model again",
    )


def _parsed(path: Path, text: str) -> Record:
    """A record from its JSON.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise CorruptCheckpointError(
            f"The record of {path} is damaged at {'.'.join(map(str, problem['loc']))}: {problem['msg']}.",
            "save the model again, or upgrade hf-compress if a newer version wrote it",
        ) from None


def _file_text(path: Path) -> str | None:
    """The record's JSON from its file; None if there is none."""
    if not (path / FILE).is_file():
        return None
    try:
        return (path / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"{path / FILE} can't be read: {error}.", "save the model again") from None


def _written_text(path: Path) -> str | None:
    """The record's JSON from the weights' metadata, without a proof; None if there is none."""
    for file in weight_files(path):
        with open_weights(file) as tensors:
            text = (tensors.metadata() or {}).get(KEY)
        if text is not None:
            return str(text)
    return None


def weight_files(path: Path) -> list[Path]:
    """The weights files of a checkpoint, stock or guarded."""
    return sorted([*path.glob("model*.safetensors"), *path.glob("hf_compress.safetensors")])


def open_weights(file: Path) -> safe_open:
    """Open a weights file lazily.

    Raises:
        CorruptCheckpointError: It is not a whole safetensors file.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpointError(
            f"{file} is not a whole safetensors file: {error}.", "save the model again"
        ) from None


def read_config(path: Path) -> dict[str, object]:
    """`config.json` of a checkpoint.

    Raises:
        CorruptCheckpointError: It is absent or not JSON.
    """
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path / 'config.json'} can't be read: {error}.", "save the model again"
        ) from None
    if not isinstance(values, dict):
        raise CorruptCheckpointError(f"{path / 'config.json'} holds no object.", "save the model again")
    return values


def sort_metadata(file: Path) -> None:
    """Sort the metadata in a safetensors header in place: safetensors writes it in random order.

    The header is 8 bytes of length, then JSON padded with spaces; tensors keep their offsets.
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            opened.seek(8)
            opened.write(text.ljust(length))
