"""A checkpoint cut to its first and last two blocks, for proofs of models that don't fit into memory twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .load import read_tensors
from .record import FILE, KEY, Record, read_config, read_record, weight_files

KEPT = 2
"""Blocks kept at each end."""


def truncate(source: Path, target: Path, model: PreTrainedModel) -> bool:
    """Write a copy of a checkpoint with only its first and last blocks.

    Args:
        source: The checkpoint directory.
        target: Directory to create.
        model: The model; tells where the blocks are.

    Returns:
        False when the blocks can't be told: not exactly one stack of `num_hidden_layers` modules, too few of them,
        or other names on disk than in the model.
    """
    stack = _stack(model)
    if stack is None:
        return False
    path, count = stack
    if not any(f".{path}.0." in f".{key}" for key in read_tensors(source)):
        return False
    kept = [*range(KEPT), *range(count - KEPT, count)]
    renumber = {old: new for new, old in enumerate(kept)}
    target.mkdir()
    record = _record(read_record(source), path, renumber)
    for name in ("generation_config.json",):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    config = _config(read_config(source), kept, count)
    if "quantization_config" in config:
        config["quantization_config"] = _named(config["quantization_config"], path, renumber)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = {_rename(key, path, renumber): value for key, value in read_tensors(source).items()}
    name = weight_files(source)[0].name if len(weight_files(source)) == 1 else "model.safetensors"
    kept_tensors = {key: value.clone() for key, value in tensors.items() if key is not None}
    save_file(kept_tensors, target / name, metadata={"format": "pt", KEY: record.model_dump_json()})
    (target / FILE).write_text(record.model_dump_json(), encoding="utf-8")
    return True


def _stack(model: PreTrainedModel) -> tuple[str, int] | None:
    """Path and length of the model's one stack of blocks."""
    count = vars(model.config.get_text_config()).get("num_hidden_layers")
    stacks = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return (stacks[0], int(count)) if len(stacks) == 1 and count and count > 2 * KEPT else None


def _rename(key: str, path: str, renumber: dict[int, int]) -> str | None:
    """A name with its block renumbered; None when its block is cut; other names unchanged."""
    found = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)\.", f".{key}")
    if found is None:
        return key
    block = int(found.group(1))
    start = found.start(1) - 1
    return f"{key[:start]}{renumber[block]}{key[start + len(found.group(1)) :]}" if block in renumber else None


def _record(record: Record, path: str, renumber: dict[int, int]) -> Record:
    """The record with the plan's rows renumbered."""
    rows = []
    for row in record.plan.rows:
        name, module = _rename(f"{row.name}.", path, renumber), _rename(f"{row.module}.", path, renumber)
        parts = tuple(_rename(part, path, renumber) or "" for part in row.parts)
        if name is not None and module is not None:
            rows.append(row.model_copy(update={"name": name[:-1], "module": module[:-1], "parts": parts}))
    return record.model_copy(update={"plan": record.plan.model_copy(update={"rows": tuple(rows)})})


def _named(value: Any, path: str, renumber: dict[int, int]) -> Any:
    """A quantization config with the names in its lists renumbered; those of cut blocks are dropped."""
    if isinstance(value, dict):
        return {key: _named(item, path, renumber) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    names = [_rename(f"{item}.", path, renumber) if isinstance(item, str) else item for item in value]
    return [name.removesuffix(".") if isinstance(name, str) else name for name in names if name is not None]


def _config(values: dict[str, Any], kept: list[int], count: int) -> dict[str, Any]:
    """The config with fewer blocks; lists of one entry per block are cut alike."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name == "num_hidden_layers" or (name == "max_window_layers" and value == count):
            changed[name] = len(kept)
        elif isinstance(value, list) and len(value) == count:
            changed[name] = [value[index] for index in kept]
        elif isinstance(value, dict) and name != "quantization_config":
            changed[name] = _config(value, kept, count)
        else:
            changed[name] = value
    return changed
