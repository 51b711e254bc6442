"""Running a model to measure it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_compress.calibration import modes
from hf_compress.core.errors import EvaluationDataError, HFCompressError, UnsupportedModelError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval and inference mode; every sub-module's own training flag is put back."""
    with modes.evaluating(*models), torch.inference_mode():
        yield


@contextmanager
def refusing(error: type[HFCompressError], message: str, fix: str) -> Iterator[None]:
    """Turn what a forward raises on arguments that don't fit into `error`; typed errors pass."""
    try:
        yield
    except HFCompressError:
        raise
    except modes.MISFITS as cause:
        lines = str(cause).strip().splitlines()
        why = ": ".join([type(cause).__name__, *lines[:1]])
        raise error(f"{message}: {why}.", fix) from cause


def output_of(model: nn.Module, inputs: dict[str, Tensor], name: str, dimensions: int) -> Tensor:
    """One output of a forward. Inputs that the model has no parameter for (token types) are left out.

    Raises:
        EvaluationDataError: The model can't run the inputs.
        UnsupportedModelError: It has no such output, or one of another number of dimensions.
    """
    known = inspect.signature(type(model).forward).parameters
    placed = {key: value.to(device_of(model)) for key, value in inputs.items() if key in known}
    told = ", ".join(f"{key} {tuple(value.shape)}" for key, value in placed.items())
    with refusing(
        EvaluationDataError, f"A {type(model).__name__} can't run the data as {told}", "use the model's own processor"
    ):
        output = model(**placed, **({"use_cache": False} if "use_cache" in known else {}))
    value = output.get(name) if isinstance(output, ModelOutput) else None
    if not isinstance(value, Tensor) or value.dim() != dimensions:
        raise UnsupportedModelError(
            f"A {type(model).__name__} gave no {name} of {dimensions} dimensions.", fix="pass the task that it is for"
        )
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
