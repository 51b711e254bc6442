"""Inputs that latency is measured on, and their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.inputs import InputSet, example_inputs, normalise_inputs
from ..core.errors import InputError
from .forward import device_of
from .quality_data import config_value

LENGTH = 128
"""Tokens of the long text input."""

_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
_SPARE_POSITIONS = 2  # RoBERTa counts its positions from 2 on


def latency_inputs(model: nn.Module, given: object = None) -> dict[str, InputSet]:
    """Forward arguments by a name that tells their shapes, such as `input_ids 1×128`.

    Args:
        model: The model.
        given: The user's inputs: a dict of tensors or a list of them. By default the first of the model's example
            inputs and, for text, one row of 128 tokens, or fewer if the model takes fewer.

    Raises:
        InputError: The given inputs don't fit, or none can be made.
    """
    if given is not None:
        sets = normalise_inputs(given, model if isinstance(model, PreTrainedModel) else None)
    elif isinstance(model, PreTrainedModel):
        first = example_inputs(model)[0]
        longer = _longer(first, model)
        sets = [first] if longer is None else [first, longer]
    else:
        raise InputError(
            f"A {type(model).__name__} is no transformers model, so its inputs are not known.",
            'inputs={"argument of forward": tensor}',
        )
    named: dict[str, InputSet] = {}
    for one in sets:
        name = shapes(one)
        repeats = sum(known == name or known.startswith(f"{name} (") for known in named)
        named[f"{name} ({repeats + 1})" if repeats else name] = one
    return named


def shapes(inputs: InputSet) -> str:
    """The names and shapes of inputs, masks left out unless there is nothing else."""
    told = {name: value for name, value in inputs.items() if not name.endswith("attention_mask")} or inputs
    return ", ".join(f"{name} {'×'.join(map(str, value.shape))}" for name, value in told.items())


def runner(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """A call of the model on inputs that are already on its device and, if floating, in its data type."""
    device = device_of(model)
    floating = (value.dtype for value in model.parameters() if value.is_floating_point())
    dtype = model.dtype if isinstance(model, PreTrainedModel) else next(floating, torch.float32)
    placed = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
    }
    return lambda: model(**placed)


def _longer(inputs: InputSet, model: PreTrainedModel) -> InputSet | None:
    """One row of `LENGTH` tokens, repeating the first row, which has no padding; None where that is not possible."""
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or not set(inputs) <= _TEXT:
        return None
    limits = [config_value(model, name) for name in ("max_position_embeddings", "max_target_positions")]
    room = min((limit - _SPARE_POSITIONS for limit in limits if isinstance(limit, int)), default=LENGTH)
    length = min(LENGTH, room)
    if length <= ids.shape[1]:
        return None
    made = {name: value[:1] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask"):
        if name in made:
            made[name] = made[name].repeat(1, -(-length // ids.shape[1]))[:, :length].contiguous()
    return made
