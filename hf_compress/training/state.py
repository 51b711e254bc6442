"""What a checkpoint of the Trainer holds of us beyond the model's weights: one file, a section for each callback.

Weights, masks and ranges travel with the model. The file keeps the configuration that they belong to, so that a run is
not resumed with another one, and tensors that are no part of the model, such as movement scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.atomic import disk_errors
from ..checkpoint.record import open_weights, sort_metadata
from ..core.errors import CorruptCheckpointError, ResumeError, first_line

FILE = "hf_compress_state.safetensors"
TRAINER_STATE = "trainer_state.json"
_KEY = "hf_compress"


@dataclass(frozen=True)
class Section:
    """What one callback keeps.

    Attributes:
        config: Its configuration as JSON types.
        step: Optimizer steps done.
        tensors: Tensors by name.
        length: Optimizer steps of the run that schedules were resolved for.
    """

    config: Mapping[str, Any]
    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    length: int = 0


def write_section(folder: Path, name: str, section: Section) -> None:
    """Add a section to a checkpoint's file, or replace it; others of the same checkpoint stay.

    What an earlier run has left in the directory goes: its sections are told by the Trainer's own state beside them.

    Args:
        folder: The checkpoint's directory.
        name: Name of the section, without dots.
        section: Its content.

    Raises:
        WriteError: The disk is full or not writable.
    """
    file = folder / FILE
    saved = _fingerprint(folder / TRAINER_STATE)
    tensors, heads = _others(file, saved)
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    kept |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in section.tensors.items()}
    heads[name] = {"config": dict(section.config), "step": section.step, "length": section.length, "saved": saved}
    partial = file.with_suffix(".partial")
    with disk_errors(file):
        try:
            save_file(kept, partial, metadata={_KEY: json.dumps(heads, sort_keys=True)})
            sort_metadata(partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def read_section(folder: Path, name: str, config: Mapping[str, Any], step: int) -> Section:
    """Read a section, and check that it belongs to a run that goes on from here.

    Args:
        folder: The checkpoint's directory.
        name: Name of the section.
        config: The configuration now, as JSON types.
        step: Optimizer steps done.

    Raises:
        ResumeError: There is no such section, or it belongs to another configuration, step or run.
        CorruptCheckpointError: The file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise ResumeError(
            f"{folder} has no {FILE}, so it was not written by a run with this callback.",
            "resume from a checkpoint of the same run, or start anew from its weights",
        )
    tensors, heads = _read(file)
    if name not in heads:
        raise ResumeError(
            f"{file} holds state of {', '.join(sorted(heads)) or 'nothing'}, not of {name!r}.",
            "use the callbacks that the run was started with",
        )
    before, now = heads[name]["config"], json.loads(json.dumps(dict(config)))
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        seen = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ResumeError(f"The configuration of {name!r} has changed since {folder} was written: {seen}.", "undo it")
    if heads[name]["step"] != step:
        raise ResumeError(
            f"{file} is of step {heads[name]['step']}, the checkpoint of step {step}.", "restore the directory"
        )
    if heads[name]["saved"] != _fingerprint(folder / TRAINER_STATE):
        raise ResumeError(
            f"{file} is of an earlier run in the same directory than the checkpoint beside it.",
            "resume from a checkpoint of a run with this callback, or start anew from its weights",
        )
    head = f"{name}."
    own = {key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)}
    return Section(before, step, own, heads[name]["length"])


def _others(file: Path, saved: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the file holds of the same save; nothing where there is no file or it is damaged."""
    try:
        tensors, heads = _read(file) if file.is_file() else ({}, {})
    except CorruptCheckpointError:
        return {}, {}
    own = {name: head for name, head in heads.items() if head["saved"] == saved}
    return {key: value for key, value in tensors.items() if key.partition(".")[0] in own}, own


def _fingerprint(file: Path) -> str:
    """Hash of a file's content; empty where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the heads of all sections.

    Raises:
        CorruptCheckpointError: The file is damaged.
    """
    try:
        with open_weights(file) as opened:
            heads = json.loads((opened.metadata() or {}).get(_KEY, "null"))
        tensors = load_file(file)
    except CorruptCheckpointError as error:  # is a ValueError, and says it all
        raise CorruptCheckpointError(error.message, "resume from another checkpoint") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise CorruptCheckpointError(
            f"{file} is damaged: {first_line(error)}.", "resume from another checkpoint"
        ) from None
    if not isinstance(heads, dict) or not all(_is_head(head) for head in heads.values()):
        raise CorruptCheckpointError(f"{file} holds no state of ours.", "resume from another checkpoint")
    return tensors, heads


def _is_head(value: object) -> bool:
    """Whether something is what `write_section` writes for a section."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return False
    kinds = {"step": int, "length": int, "saved": str}
    return all(isinstance(value.get(key), kind) for key, kind in kinds.items())
