"""16-bit blocks run in float32, with other tensors in place of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from .block import Call

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_place(module: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """While entered, tensors of a module are replaced by others, wherever they are used.

    Args:
        module: The module; a whole model may look itself up, so it can't be wrapped.
        values: By the id of the tensor they replace.
    """
    tables: list[dict[str, Any]] = [table for one in module.modules() for table in (one._parameters, one._buffers)]
    places = [(table, name, value) for table in tables for name, value in table.items() if id(value) in values]
    for table, name, value in places:
        table[name] = values[id(value)]
    try:
        yield
    finally:
        for table, name, value in places:
            table[name] = value


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """While entered, a module has float32 copies of its 16-bit parameters and buffers; changes of them are lost."""
    values: dict[int, Tensor] = {
        id(value): nn.Parameter(value.detach().float(), requires_grad=False)
        for value in module.parameters()
        if value.dtype in HALF
    }
    values |= {id(value): value.float() for value in module.buffers() if value.dtype in HALF}
    with in_place(module, values):
        yield


def wide_call(call: Call) -> Call:
    """A call with its 16-bit tensors in float32."""
    made = copy(call)
    made.hidden = None if call.hidden is None else wide(call.hidden)
    made.args, made.kwargs = _widened(call.args), _widened(call.kwargs)
    return made


def _widened(value: Any) -> Any:
    """Arguments with their 16-bit tensors in float32."""
    if isinstance(value, Tensor):
        return wide(value)
    if type(value) in (tuple, list):
        return type(value)(_widened(entry) for entry in value)
    if type(value) is dict:
        return {key: _widened(entry) for key, entry in value.items()}
    return value


def wide(value: Tensor) -> Tensor:
    """A tensor in float32, if it has 16 bits."""
    return value.float() if value.dtype in HALF else value
