"""The forward of `nn.LSTM` and `nn.GRU` with its products taken apart, so that each can quantize its inputs.

PyTorch's own forward is one fused call on all weights. Here the input projection of a whole sequence is one product,
the recurrent one a product per step; gates and states stay floating point. Equations and order of the gates are those
of the PyTorch documentation of `nn.LSTM` and `nn.GRU`, with `proj_size` as in Sak et al. 2014, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

Product = Callable[[Tensor], Tensor]
"""tokens × columns to tokens × rows, bias included."""

Multiplier = Callable[[str, str | None], Product]
"""The product with the parameter of one name and the bias of another."""

States = tuple[Tensor, ...]
"""The hidden state (batch × hidden or projected size); of an LSTM also the cell state (batch × hidden size)."""

Step = Callable[[Tensor, States], States]
"""New states from a step's projected inputs (batch × gates) and the states before."""


@dataclass(frozen=True)
class _Sequence:
    """Inputs in the order of `PackedSequence`: all sequences' first steps, then all second ones, the longest first.

    Attributes:
        data: tokens × features.
        sizes: How many sequences still run, for each step.
        states: Initial states, layers · directions × batch × size.
    """

    data: Tensor
    sizes: list[int]
    states: States


def run(module: nn.LSTM | nn.GRU, value: Tensor | PackedSequence, hx: Any, multiplier: Multiplier) -> tuple[Any, Any]:
    """The forward of a recurrent layer on products of our choice.

    Args:
        module: The layer.
        value: (steps, batch, features), (batch, steps, features) with `batch_first`, (steps, features), or packed.
        hx: Initial states as the layer takes them, or None for zeros.
        multiplier: Makes the product with a weight; called once per weight.

    Returns:
        What the layer's own forward returns, in the same forms.

    Raises:
        RuntimeError, ValueError: The inputs don't fit, as PyTorch has it.
    """
    if isinstance(value, PackedSequence):
        states = _states(module, value.data, int(value.batch_sizes[0]), hx, value.sorted_indices)
        module.check_forward_args(value.data, _joined(states), value.batch_sizes)
        output, states = _layers(module, _Sequence(value.data, value.batch_sizes.tolist(), states), multiplier)
        made = PackedSequence(output, value.batch_sizes, value.sorted_indices, value.unsorted_indices)
        return made, _joined(_permuted(states, value.unsorted_indices))
    if value.ndim not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {value.ndim}D instead")
    alone = value.ndim == 2
    steps = value.unsqueeze(1) if alone else value.transpose(0, 1) if module.batch_first else value
    if len(steps) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    batch = steps.shape[1]
    states = _states(module, value, batch, _batched(hx, alone), None)
    module.check_forward_args(steps.transpose(0, 1) if module.batch_first else steps, _joined(states), None)
    output, states = _layers(module, _Sequence(steps.flatten(0, 1), [batch] * len(steps), states), multiplier)
    output = output.unflatten(0, (len(steps), batch))
    if alone:
        return output.squeeze(1), _joined(tuple(state.squeeze(1) for state in states))
    return output.transpose(0, 1) if module.batch_first else output, _joined(states)


def _batched(hx: Any, alone: bool) -> Any:
    """Initial states with a batch dimension.

    Raises:
        RuntimeError: They have another number of dimensions than the input asks for.
    """
    if hx is None:
        return None
    given = hx if isinstance(hx, tuple) else (hx,)
    wanted = 2 if alone else 3
    if any(state.ndim != wanted for state in given):
        kind, seen = "unbatched" if alone else "batched", ", ".join(f"{state.ndim}-D" for state in given)
        raise RuntimeError(f"For {kind} {wanted}-D input, hx should also be {wanted}-D but got ({seen})")
    return _joined(tuple(state.unsqueeze(1) if alone else state for state in given))


def _states(module: nn.LSTM | nn.GRU, value: Tensor, batch: int, hx: Any, order: Tensor | None) -> States:
    """Initial states: those given, in the order of the sequences, or zeros."""
    if hx is not None:
        return _permuted(hx if isinstance(hx, tuple) else (hx,), order)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if isinstance(module, nn.LSTM) else 1]
    return tuple(value.new_zeros(layers, batch, size) for size in sizes)


def _permuted(states: States, order: Tensor | None) -> States:
    """States with their sequences in another order."""
    return states if order is None else tuple(state.index_select(1, order) for state in states)


def _joined(states: States) -> Any:
    """A pair for an LSTM, a tensor for a GRU."""
    return states if len(states) > 1 else states[0]


def _layers(module: nn.LSTM | nn.GRU, given: _Sequence, multiplier: Multiplier) -> tuple[Tensor, States]:
    """All layers and directions: outputs (tokens × directions · size) and final states."""
    data, finals = given.data, []
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        outputs = []
        for number, direction in enumerate(directions):
            index = layer * len(directions) + number
            states = tuple(state[index] for state in given.states)
            suffix = f"l{layer}{direction}"
            project = multiplier(f"weight_ih_{suffix}", f"bias_ih_{suffix}" if module.bias else None)
            step = _step(module, suffix, multiplier)
            output, final = _direction(project(data), given.sizes, states, step, backwards=bool(direction))
            outputs.append(output)
            finals.append(final)
        data = torch.cat(outputs, dim=-1)
        if module.dropout and module.training and layer < module.num_layers - 1:
            data = functional.dropout(data, module.dropout, training=True)
    return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _direction(
    projected: Tensor, sizes: list[int], states: States, step: Step, backwards: bool
) -> tuple[Tensor, States]:
    """One layer in one direction. Sequences that have ended, or not yet begun from behind, keep their states."""
    blocks = projected.split(sizes)
    outputs: list[Tensor] = []
    for index in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        size = sizes[index]
        moved = step(blocks[index], tuple(state[:size] for state in states))
        outputs.append(moved[0])
        whole = size == len(states[0])
        states = (
            moved if whole else tuple(torch.cat([new, old[size:]]) for new, old in zip(moved, states, strict=True))
        )
    return torch.cat(outputs[::-1] if backwards else outputs), states


def _step(module: nn.LSTM | nn.GRU, suffix: str, multiplier: Multiplier) -> Step:
    """The step of one layer and direction."""
    recur = multiplier(f"weight_hh_{suffix}", f"bias_hh_{suffix}" if module.bias else None)
    shrink = multiplier(f"weight_hr_{suffix}", None) if module.proj_size else None

    def lstm(projected: Tensor, states: States) -> States:
        hidden, cell = states
        enter, forget, new, leave = (projected + recur(hidden)).chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return hidden if shrink is None else shrink(hidden), cell

    def gru(projected: Tensor, states: States) -> States:
        (hidden,) = states
        reset, update, new = projected.chunk(3, dim=-1)
        again_reset, again_update, again_new = recur(hidden).chunk(3, dim=-1)
        update = (update + again_update).sigmoid()
        new = (new + (reset + again_reset).sigmoid() * again_new).tanh()
        return ((hidden - new) * update + new,)

    return lstm if isinstance(module, nn.LSTM) else gru
