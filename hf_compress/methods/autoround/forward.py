"""A block run with other values in place of its weights, and the gradients of its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...calibration.block import Block, Call
from ...calibration.widen import HALF, in_place, wide, wide_call
from ...core.plan import PlanRow
from ...core.weights import WeightKind
from ...modules.packed import layout_of
from .rounding import Rounding

_FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instructions that multiply bfloat16 matrices faster than float32 ones, as PyTorch names them; CPUs without them only
emulate it. Asked rather than timed, since a timing that turns out differently would give other bytes."""

_MOST_BITS = 4
"""Beyond, bfloat16's own rounding is no longer small against the grid's."""


def leaf_dtype(rows: Sequence[PlanRow]) -> torch.dtype:
    """The data type to learn in: bfloat16 where that is faster and exact enough, else float32.

    Fused experts stay in float32: what multiplies them is not told by autocast to take other types.

    Args:
        rows: The weights to learn.
    """
    exact = any(
        row.kind is WeightKind.EXPERTS or row.dtype == "float64" or layout_of(row).weights.num_bits > _MOST_BITS
        for row in rows
    )
    known = torch.cpu.get_capabilities()
    fast = any(known.get(name, False) for name in _FAST_BF16)
    return torch.bfloat16 if fast and not exact else torch.float32


class Forward:
    """Runs a block with learned weights. The block's own tensors are not changed.

    Everything but the learned weights takes part in float32, 16-bit models too, so that the gradients are those of the
    rounding; with leaves in bfloat16, matrices are multiplied in bfloat16.

    Args:
        block: The block; its calls carry targets.
        learned: The weights to learn.
    """

    def __init__(self, block: Block, learned: Mapping[str, tuple[PlanRow, Rounding]]) -> None:
        self.block = block
        self.roundings = {name: rounding for name, (_, rounding) in learned.items()}
        self.half = any(value.dtype in HALF for value in block.module.parameters())
        self.learned = {
            id(block.owner(row).get_parameter(row.parameter)): (row, rounding) for row, rounding in learned.values()
        }
        self.others = {
            id(value): wide(value.detach())
            for value in (*block.module.parameters(), *block.module.buffers())
            if id(value) not in self.learned
        }

    def backward(self, call: Call) -> None:
        """Add the gradients of the squared error of one call to the leaves; weights not reached get none."""
        with torch.enable_grad():
            error = squared_error(call, self.output(call))
            if error.requires_grad:
                error.backward(inputs=[rounding.leaf for rounding in self.roundings.values()])

    def step(self, rate: float) -> set[str]:
        """Move all roundings against their gradients.

        Args:
            rate: Step size.

        Returns:
            Names of those that have gradients.
        """
        return {name for name, rounding in self.roundings.items() if rounding.step(rate)}

    def output(self, call: Call) -> Tensor:
        """The block's output with the leaves' values."""
        with in_place(self.block.module, self._values()), self._precision():
            return (wide_call(call) if self.half else call).run(self.block.module)

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast where leaves are in bfloat16."""
        leaf = next(iter(self.roundings.values())).leaf
        if leaf.dtype == torch.bfloat16:
            return torch.autocast(leaf.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _values(self) -> dict[int, Tensor]:
        """What takes the place of which tensor."""
        return {**self.others, **{key: _parameter(row, one.leaf) for key, (row, one) in self.learned.items()}}


def squared_error(call: Call, output: Tensor) -> Tensor:
    """The sum of squared differences between an output and a call's target, padding left out."""
    if call.target is None:
        raise ValueError("learned rounding needs calls with targets")
    return functional.mse_loss(call.tokens(output).float(), call.tokens(call.target).float(), reduction="sum")


def _parameter(row: PlanRow, value: Tensor) -> Tensor:
    """A canonical weight in its module's own shape and orientation."""
    layout = layout_of(row)
    if layout.kernel:
        return value.view(layout.parameter_shape)
    return value.transpose(-1, -2) if layout.transposed else value
