"""Weights of a checkpoint that the Trainer leaves out when it resumes, or loads the best model.

It reads tensors by the model's own names, without transformers' conversions, and only logs what is missing. Where
`save_pretrained` stores weights in another form, such as fused experts one by one or a vision tower under older names,
they would stay as they were before.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.record import open_weights
from ..checkpoint.shards import Shards, safetensors_files
from ..core.errors import ResumeError, listed


@torch.no_grad()
def restore(folder: Path, model: nn.Module) -> None:
    """Read what is stored under other names than the model's.

    Args:
        folder: The checkpoint, which the Trainer has read.
        model: The model, without wrappers. Nothing is done to one all of whose names are there.

    Raises:
        ResumeError: The checkpoint has no values for some of the model's tensors.
        CorruptCheckpointError: A file is damaged.
    """
    files = safetensors_files(folder)
    stored: set[str] = set()
    for file in files:
        with open_weights(file) as opened:
            stored.update(opened.keys())
    state = model.state_dict()
    missing = [name for name in state if name not in stored and name not in _left_out(model)]
    if not files or not missing:
        return
    shards = Shards(files, model) if isinstance(model, PreTrainedModel) else ()
    lost = [name for name in missing if name not in shards]
    if lost or not isinstance(shards, Shards):
        raise ResumeError(
            f"{folder} has no values for {listed(lost)} ({len(lost)} tensors), which stay as they were before.",
            "resume from a checkpoint of the same model, or start anew from its weights",
        )
    for name, value in shards.read(missing, mapped=True).items():
        state[name].copy_(value)


def _left_out(model: nn.Module) -> set[str]:
    """Names that transformers does not save: of tied weights, and of what it computes."""
    if not isinstance(model, PreTrainedModel):
        return set()
    return {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
