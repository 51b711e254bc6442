"""Blocks of tiny models with the calls that reach them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.capture import run_model
from hf_compress.core.config import QuantConfig
from tests._utils.tiny import tiny_inputs


@torch.no_grad()
def block_of(model: PreTrainedModel, path: str, config: QuantConfig | None = None, seed: int = 7) -> Block:
    """A private copy of a block with one call of two rows, the second padded where the model takes a mask."""
    request = config or hfc.RTNQuantConfig(group_size=16, min_coverage=0.0)
    rows = plan_model(model, request).quantized
    inputs = tiny_inputs(model, seed)
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = None if args else "hidden_states"
        hidden = args[0] if args else kwargs.pop("hidden_states")
        mask = inputs.get("attention_mask")
        fits = mask is not None and mask.shape == hidden.shape[:2]
        calls.append(Call(hidden, name, args[1:], kwargs, mask.bool() if mask is not None and fits else None))

    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_model(model, inputs)
    finally:
        handle.remove()
    inside = tuple(row for row in rows if row.module.startswith(f"{path}."))
    return Block(0, path, deepcopy(model.get_submodule(path)), inside, calls)
