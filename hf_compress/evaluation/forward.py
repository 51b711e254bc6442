"""Running a model to measure it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_compress.core.errors import UnsupportedModelError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval and inference mode; every sub-module's own training flag is put back."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


def output_of(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Tensor:
    """One output of a forward. Inputs that the model has no parameter for (token types) are left out."""
    known = inspect.signature(type(model).forward).parameters
    placed = {key: value.to(device_of(model)) for key, value in inputs.items() if key in known}
    output = model(**placed, **({"use_cache": False} if "use_cache" in known else {}))
    value = output.get(name) if isinstance(output, ModelOutput) else None
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(f"A {type(model).__name__} gave no {name}.", fix="pass the task that it is for")
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
