"""The layout of GPTQ checkpoints, as AutoGPTQ defined it and GPTQModel reads it.

Codes lie transposed, packed along the inputs: `qweight` is inputs · bits / 32 × outputs, int32, little endian, offset
binary, without gaps (32 values of 3 bits fill three words). `scales` are groups × outputs, `qzeros` groups × outputs ·
bits / 32, packed along the outputs, and `g_idx` names each input's group. `checkpoint_format` says how zero points are
stored: less one (`gptq`), or as they are (`gptq_v2`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import scheme as schemes
from ..core.errors import FormatError
from ..core.plan import DTYPES, Plan, PlanRow
from ..core.registry import FORMATS
from ..core.weights import WeightKind
from ..modules.packed import PackedTensor, from_words, layout_of, to_words
from .base import Limits, checked, take, tie_refusal
from .integers import (
    ROUNDINGS,
    IntegerFormat,
    check,
    check_finite,
    corrupt,
    endings,
    half,
    rounding,
    symmetric_or,
)

BITS = (2, 3, 4, 8)
"""Widths that transformers' `GPTQConfig` accepts."""

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that GPTQModel's kernels accept, besides one group for all inputs."""

_HELD = (WeightKind.LINEAR, WeightKind.CONV1D)
_REPLACED = (WeightKind.LINEAR, WeightKind.CONV1D, WeightKind.CONV)


class GPTQFormat(IntegerFormat):
    """One of the two GPTQ layouts.

    Args:
        name: `gptq` or `gptq_v2`; also its `checkpoint_format`.
        offset: What is taken from a zero point when it is stored: 1 for `gptq`, 0 for `gptq_v2`.
    """

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, name: str, offset: int) -> None:
        self.name = name
        self.offset = offset

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why a row can't be held, or None."""
        if row.quantization is None:
            return None
        return tie_refusal(row) or _place_refusal(row, plan) or _grid_refusal(row) or _mixture_refusal(row, plan)

    def limits(self, plan: Plan) -> Limits:
        """GPTQModel's arithmetic is that of float16; its choice of kernels knows no meta device."""
        unit = rounding(plan.quantized)
        return Limits(outputs=ROUNDINGS * unit, weights=unit, on_meta=False)

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What `GPTQConfig` needs to replace the planned layers and no others; no calibration data.

        optimum replaces the layers whose name starts with `block_name_to_quantize` and ends with an entry of
        `modules_in_block_to_quantize`. The endings alone select them here, so that they also do where the model is
        loaded without its head, under other names. GPTQModel's own loader replaces all layers of a block but those
        that `dynamic` takes out, which stock transformers ignores.
        """
        bits, size, symmetric = _grid(plan.quantized[0])
        left_out = (row for row in plan.rows if row.quantization is None and row.kind in _HELD)
        inside = [row.module for row in left_out if any(part.isdigit() for part in row.module.split("."))]
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "sym": symmetric,
            "desc_act": any(layout_of(row).scheme.reordered for row in plan.quantized),
            "checkpoint_format": self.name,
            "lm_head": any(row.module.rpartition(".")[2] == "lm_head" for row in plan.quantized),
            "block_name_to_quantize": "",
            "modules_in_block_to_quantize": [_selection(plan)],
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in inside}} if inside else {}),
        }

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk of one packed weight.

        Args:
            row: Its row of the plan.
            packed: Codes of outputs × inputs, scales of the row's data type.

        Returns:
            `qweight`, `qzeros` and `g_idx` (int32) and `scales` (float16) under the module's name.

        Raises:
            FormatError: The layout has no place for a zero point or a scale.
        """
        bits, (_, columns) = packed.layout.weights.num_bits, packed.layout.shape
        words = packed.codes if bits < 8 else to_words(packed.codes, bits)
        parts = (
            words.t().contiguous(),
            to_words(self._stored_zeros(row, packed), bits),
            half(row, packed.scale).t().contiguous(),
            (_group_index(row, columns) if packed.g_idx is None else packed.g_idx).to(words.device),
        )
        return dict(zip(self.keys(row), parts, strict=True))

    def read(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """`decode` for tensors of whatever origin: scales of any floating type, `g_idx` only where it says something.

        Args:
            row: Its row of the plan.
            tensors: Tensors by name.

        Raises:
            CorruptCheckpointError: A tensor is missing, or is not what the plan implies.
        """
        layout = layout_of(row)
        bits, (rows, columns) = layout.weights.num_bits, row.shape
        qweight, _, scales = (take(tensors, key) for key in self.keys(row)[:3])
        implied = not layout.scheme.reordered and f"{row.module}.g_idx" not in tensors
        g_idx = _group_index(row, columns) if implied else take(tensors, f"{row.module}.g_idx")
        grid = schemes.groups(row.shape, layout.weights)
        check(row, "qweight", qweight, torch.int32, (columns * bits // 32, rows))
        check(row, "scales", scales, scales.dtype, (grid[1], rows))
        check(row, "g_idx", g_idx, torch.int32, (columns,))
        if not layout.scheme.reordered and not torch.equal(g_idx, _group_index(row, columns)):
            raise corrupt(f"{row.module}.g_idx does not count the groups up, as the plan says")
        check_finite(row, scales)
        words = qweight.t().contiguous()
        codes = words if bits < 8 else from_words(words, bits, columns)
        zero_point = symmetric_or(row, self.zero_points(row, tensors))
        scale = scales.t().contiguous().to(DTYPES[row.dtype])
        order = g_idx if layout.scheme.reordered else None
        packed = PackedTensor(layout, codes, scale, zero_point, g_idx=order)
        return checked(row, packed, {"scale": grid, "zero_point": grid})

    def _stored_zeros(self, row: PlanRow, packed: PackedTensor) -> Tensor:
        """Zero points as they are stored, signed: int8, groups × outputs.

        Raises:
            FormatError: One is the lowest code, which less one is no code. GPTQModel adds the one to whole words,
                where it would carry into the zero point beside it (`convert_gptq_v1_to_v2_format_module`).
        """
        weights, outputs = packed.layout.weights, packed.layout.shape[0]
        if packed.zero_point is None:
            groups = schemes.groups(packed.layout.shape, weights)[1]
            return torch.full((groups, outputs), -self.offset, dtype=torch.int8, device=packed.codes.device)
        lowest = int((packed.zero_point == -(1 << (weights.num_bits - 1))).sum())
        if self.offset and lowest:
            raise FormatError(
                f"{row.name} has zero points at the lowest code ({lowest} of {packed.zero_point.numel()}): the format "
                f"{self.name!r} stores zero points less one and has no place for them. Nothing was written.",
                'quantize again with format="gptq_v2", or with symmetric=True',
            )
        return (packed.zero_point - self.offset).t().contiguous()

    def zero_points(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> Tensor:
        """Zero points (int8, outputs × groups), 0 in the middle of the grid.

        Args:
            row: Its row of the plan.
            tensors: Tensors by name.

        Raises:
            CorruptCheckpointError: They are missing, or not what the plan implies, or hold what readers disagree on.
        """
        weights, rows = layout_of(row).weights, row.shape[0]
        bits, groups = weights.num_bits, schemes.groups(row.shape, weights)[1]
        qzeros = take(tensors, f"{row.module}.qzeros")
        check(row, "qzeros", qzeros, torch.int32, (groups, rows * bits // 32))
        stored = from_words(qzeros, bits, rows).t().contiguous()
        if self.offset and bool((stored == (1 << (bits - 1)) - 1).any()):
            raise corrupt(f"{row.module}.qzeros holds {2**bits - 1}, which {self.name!r} never stores")
        return stored + self.offset


def _place_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why readers could not put a packed layer in this weight's place, or None."""
    if row.kind not in _HELD:
        return f"it holds nn.Linear and GPT-2's Conv1D, not {row.owner}"
    if row.kind is WeightKind.LINEAR and row.owner != "Linear":
        return f"its readers replace plain nn.Linear, not a subclass such as {row.owner}"
    if row.module.rpartition(".")[2].isdigit():
        return f"its readers can't replace a layer that a list holds by number ({row.module})"
    if _ending(row, _others(plan)) is None:
        return "its readers choose layers by the end of their names, and a layer that is kept has the same"
    return None


def _grid_refusal(row: PlanRow) -> str | None:
    """Why the layout can't hold a row's scheme, or None."""
    layout = layout_of(row)
    weights, (rows, columns) = layout.weights, row.shape
    bits, size = weights.num_bits, weights.group_size
    if layout.scheme.codebook is not None:
        return f"it holds uniform grids, not {layout.scheme.codebook}"
    if layout.scheme.input_activations is not None:
        return "it holds weights only, and this scheme quantizes inputs as well"
    if bits not in BITS:
        return f"it holds 2, 3, 4 or 8 bits, not {bits}"
    if weights.strategy not in ("group", "channel"):
        return f"it holds one scale per group or channel, not per {weights.strategy}"
    if weights.strategy == "group" and size not in (*GROUP_SIZES, columns):
        return f"GPTQModel reads groups of {', '.join(map(str, GROUP_SIZES))} or all inputs, not {size}"
    multiple = 32 if bits == 3 else 32 // bits
    if rows % multiple or columns % multiple:
        return f"{bits}-bit inputs and outputs must be multiples of {multiple}, not {columns} and {rows}"
    return None


def _mixture_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why a row does not fit the others, or None."""
    first = next(other for other in plan.quantized if other.kind in _HELD)
    if _grid(row) == _grid(first):
        return None
    return (
        "it has one bit width, group size and symmetry for all layers (stock transformers ignores GPTQModel's "
        f"`dynamic`), and {first.name} is {first.scheme}"
    )


def _grid(row: PlanRow) -> tuple[int, int, bool]:
    """Bits, group size (-1: one group) and symmetry, as the config says them."""
    weights = layout_of(row).weights
    size = weights.group_size if weights.strategy == "group" and weights.group_size else -1
    return weights.num_bits, size, bool(weights.symmetric)


def _selection(plan: Plan) -> list[str]:
    """Endings of names that select the planned layers and none that is kept."""
    others = _others(plan)
    endings = (_ending(row, others) for row in plan.quantized)
    return list(dict.fromkeys(ending for ending in endings if ending is not None))


def _others(plan: Plan) -> tuple[str, ...]:
    """Modules that are kept and that readers would replace if they were selected."""
    return tuple(row.module for row in plan.rows if row.quantization is None and row.kind in _REPLACED)


def _ending(row: PlanRow, others: tuple[str, ...]) -> str | None:
    """The first ending of a name that no kept layer's name has, or None."""
    return next((end for end in endings(row.module) if not any(other.endswith(end) for other in others)), None)


def _group_index(row: PlanRow, columns: int) -> Tensor:
    """The group of each input: int32, in order."""
    groups = schemes.groups(row.shape, layout_of(row).weights)[1]
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


FORMATS.register(GPTQFormat("gptq", offset=1))
FORMATS.register(GPTQFormat("gptq_v2", offset=0))
