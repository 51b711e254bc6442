"""The layout of AWQ checkpoints, as AutoAWQ's `gemm` version defined it and GPTQModel reads it.

Codes lie transposed, packed along the outputs: `qweight` is inputs × outputs / 8, int32, offset binary; the nibbles of
a word hold outputs 0, 2, 4, 6, 1, 3, 5, 7. `qzeros` are groups × outputs / 8 in the same order, `scales` groups ×
outputs, float16. Groups are consecutive inputs. Symmetric weights are stored with the zero point 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..core import scheme as schemes
from ..core.errors import listed
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
    endings,
    half,
    rounding,
    symmetric_or,
)

BITS = 4
"""The one width that all readers take."""

GROUP_SIZES = (16, 32, 64, 128)
"""Group sizes that GPTQModel's kernels accept, besides one group for all inputs."""

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of a word holds (AutoAWQ's `order_map`)."""


class AWQFormat(IntegerFormat):
    """The `awq` layout."""

    name = "awq"
    suffixes = ("qweight", "qzeros", "scales")

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why a row can't be held, or None."""
        if row.quantization is None:
            return None
        return tie_refusal(row) or _place_refusal(row) or _grid_refusal(row) or _mixture_refusal(row, plan)

    def limits(self, plan: Plan) -> Limits:
        """GPTQModel's arithmetic is that of float16; its choice of kernels knows no meta device."""
        return Limits(outputs=ROUNDINGS * rounding(plan.quantized), on_meta=False)

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What `AwqConfig` needs to replace the planned layers and no others.

        transformers replaces all linear layers but the head and those that `modules_to_not_convert` names.
        """
        planned = [row.module for row in plan.quantized]
        kept = [row.module for row in plan.rows if row.quantization is None and row.kind is WeightKind.LINEAR]
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": _group_size(plan.quantized[0]),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(dict.fromkeys(_entry(name, planned) for name in kept)),
        }

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk of one packed weight.

        Args:
            row: Its row of the plan.
            packed: Codes of outputs × inputs, scales of the row's data type.

        Returns:
            `qweight` and `qzeros` (int32) and `scales` (float16) under the module's name.

        Raises:
            FormatError: Scales do not fit float16.
        """
        codes = from_words(packed.codes, BITS, packed.layout.shape[-1])
        zeros = torch.zeros_like(packed.scale, dtype=torch.int8) if packed.zero_point is None else packed.zero_point
        parts = (_interleaved(codes.t()), _interleaved(zeros.t()), half(row, packed.scale).t().contiguous())
        return dict(zip(self.keys(row), parts, strict=True))

    def read(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """`decode` for tensors of whatever origin: scales may be of any floating type.

        Args:
            row: Its row of the plan.
            tensors: Tensors by name.

        Raises:
            CorruptCheckpointError: A tensor is missing, or is not what the plan implies.
        """
        layout, (rows, columns) = layout_of(row), row.shape
        qweight, _, scales = (take(tensors, key) for key in self.keys(row))
        grid = schemes.groups(row.shape, layout.weights)
        check(row, "qweight", qweight, torch.int32, (columns, rows // 8))
        check(row, "scales", scales, scales.dtype, (grid[1], rows))
        check_finite(row, scales)
        codes = to_words(_in_order(qweight, rows).t().contiguous(), BITS)
        zero_point = symmetric_or(row, self.zero_points(row, tensors))
        scale = scales.t().contiguous().to(DTYPES[row.dtype])
        return checked(row, PackedTensor(layout, codes, scale, zero_point), {"scale": grid, "zero_point": grid})

    def zero_points(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> Tensor:
        """Zero points (int8, outputs × groups), 0 in the middle of the grid.

        Args:
            row: Its row of the plan.
            tensors: Tensors by name.

        Raises:
            CorruptCheckpointError: They are missing, or not what the plan implies.
        """
        rows, qzeros = row.shape[0], take(tensors, f"{row.module}.qzeros")
        groups = schemes.groups(row.shape, layout_of(row).weights)[1]
        check(row, "qzeros", qzeros, torch.int32, (groups, rows // 8))
        return _in_order(qzeros, rows).t().contiguous()


def stock_refusal(model: PreTrainedModel, plan: Plan) -> str | None:
    """Why stock transformers would not load this model as planned, whoever wrote it, or None.

    It never replaces the head and the layer with the last parameter, and of some architectures it wraps activations in
    scales of their own (`replace_quantization_scales`), which only checkpoints of AutoAWQ have.
    """
    if model.config.model_type in AWQ_SCALES_MAPPINGS:
        return f"stock transformers expects scaled activations in AWQ checkpoints of {model.config.model_type}"
    left = get_keys_to_not_convert(model)
    lost = [row.name for row in plan.quantized if not should_convert_module(row.module, left)]
    return f"stock transformers reads {listed(lost)} dense, as it does heads and tied layers" if lost else None


def _place_refusal(row: PlanRow) -> str | None:
    """Why readers could not put a packed layer in this weight's place, or None."""
    if row.kind is not WeightKind.LINEAR:
        return f"it holds nn.Linear, not {row.owner}"
    if row.owner != "Linear":
        return f"its readers replace nn.Linear, and would drop what a subclass such as {row.owner} does"
    if row.stays_float32:
        return "its readers leave out what this architecture keeps in float32"
    return None


def _grid_refusal(row: PlanRow) -> str | None:
    """Why the layout can't hold a row's scheme, or None."""
    layout = layout_of(row)
    weights, (rows, columns) = layout.weights, row.shape
    size = weights.group_size
    if layout.scheme.codebook is not None:
        return f"it holds uniform grids, not {layout.scheme.codebook}"
    if layout.scheme.input_activations is not None:
        return "it holds weights only, and this scheme quantizes inputs as well"
    if layout.scheme.reordered:
        return "its groups are consecutive inputs, and here a g_idx names them"
    if weights.num_bits != BITS:
        return f"it holds {BITS} bits, not {weights.num_bits}"
    if weights.strategy not in ("group", "channel"):
        return f"it holds one scale per group or channel, not per {weights.strategy}"
    if weights.strategy == "group" and size not in (*GROUP_SIZES, columns):
        return f"GPTQModel reads groups of {', '.join(map(str, GROUP_SIZES))} or all inputs, not {size}"
    if rows % 8:
        return f"outputs must be a multiple of 8, not {rows}"
    return None


def _mixture_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why a row does not fit the others, or None. Zero points are stored for all, so symmetry may differ."""
    first = next((other for other in plan.quantized if other.kind is WeightKind.LINEAR), row)
    if _group_size(row) == _group_size(first):
        return None
    return f"it has one group size for all layers, and {first.name} is {first.scheme}"


def _group_size(row: PlanRow) -> int:
    """Inputs per group; -1: one group."""
    weights = layout_of(row).weights
    return weights.group_size if weights.strategy == "group" and weights.group_size else -1


def _entry(name: str, planned: list[str]) -> str:
    """What leaves a kept layer as it is and no planned one.

    The first ending of its name that does, so that it also does where the model is loaded without its head, under
    other names; else a regular expression for the name itself (DistilBERT's `classifier` beside `pre_classifier`).
    """
    known = (end for end in endings(name) if all(should_convert_module(other, [end]) for other in planned))
    return next(known, f"^{re.escape(name)}$")


def _interleaved(codes: Tensor) -> Tensor:
    """int32 words of signed int8 codes (inputs or groups × outputs), eight outputs to a word in AWQ's order."""
    return to_words(codes.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2).contiguous(), BITS)


def _in_order(words: Tensor, outputs: int) -> Tensor:
    """Signed int8 codes, … × outputs, from words; the inverse of `_interleaved`."""
    back = torch.tensor(ORDER).argsort()
    return from_words(words, BITS, outputs).unflatten(-1, (-1, 8))[..., back].flatten(-2)


FORMATS.register(AWQFormat())
