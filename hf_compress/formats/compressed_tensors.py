"""compressed-tensors: read by stock transformers and vLLM.

Holds linear layers and embeddings, and fused experts as one weight per expert. `pack-quantized` for weight-only
schemes, `int-quantized` for W8A8. Asymmetric weights are read by stock only with `"dequantize": true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from ..core import scheme as schemes
from ..core.errors import CorruptCheckpointError
from ..core.plan import Plan, PlanRow
from ..core.registry import FORMATS
from ..core.weights import WeightKind
from ..modules.packed import PackedTensor, from_words, layout_of, to_words, words_shape
from .base import (
    ACTIVATION_LIMIT,
    Limits,
    checked,
    input_grid,
    integers_and_sides,
    take,
    tie_refusal,
)

EXPERTS_TARGET = "re:.*experts.*"


class CompressedTensorsFormat:
    """The `compressed-tensors` layout."""

    name = "compressed-tensors"
    stock_reader: str | None = "compressed_tensors"
    weights_file: str | None = None

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why a row can't be held, or None."""
        weights = row.quantization.weights if row.quantization is not None else None
        if weights is None:
            return None
        if not _is_int_quantized(row) and (reason := tie_refusal(row)):
            return reason
        if row.kind is WeightKind.EXPERTS:
            return _experts_refusal(row, plan)
        if row.kind not in (WeightKind.LINEAR, WeightKind.EMBEDDING):
            return f"it holds nn.Linear and nn.Embedding, not {row.owner}"
        if row.quantization is not None and row.quantization.codebook is not None:
            return f"it holds uniform grids, not {row.quantization.codebook}"
        if row.quantization is not None and row.quantization.reordered:
            return "its readers no longer take groups of columns that are not consecutive (act-order's g_idx)"
        if not weights.symmetric and weights.strategy == "tensor":
            return "stock transformers can't read one zero point per tensor"
        if not _needs_dequantize(plan):
            return None
        if row.quantization is not None and row.quantization.input_activations is not None:
            return "stock transformers must dequantize this model while loading, which would drop input quantization"
        if len({_dense_key(other) for other in _dense(plan)}) > 1:
            return "stock transformers must dequantize this model while loading, and then reads only one dense scheme"
        return None

    def adapted(self, row: PlanRow) -> PlanRow:
        """It stores scales as they are."""
        return row

    def limits(self, plan: Plan) -> Limits:
        """Stock dequantizes as we do. Rounding of inputs at run time may differ by accumulation order."""
        inputs = any(row.quantization and row.quantization.input_activations for row in plan.quantized)
        return Limits(outputs=ACTIVATION_LIMIT if inputs else 0.0)

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """Groups by scheme; targets are class names where one scheme holds for all linears, else names."""
        groups = _groups(plan)
        storages = {str(group.format) for group in groups.values()}
        config = QuantizationConfig(
            config_groups=dict(groups),
            format=storages.pop() if len(storages) == 1 else "mixed-precision",
            ignore=[row.module for row in plan.rows if row.kind is WeightKind.LINEAR and row.quantization is None],
            quantization_status="compressed",
        )
        dumped: dict[str, Any] = config.model_dump()
        return {**dumped, "dequantize": True} if _needs_dequantize(plan) else dumped

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""
        if row.tied_to is not None:
            return [f"{row.name}.weight_scale"]
        return [f"{name}.{suffix}" for name in _names(row) for suffix in _suffixes(row)]

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on disk that belong to packed weights."""
        return integers_and_sides(tensors)

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk; one set per expert and part for fused experts.

        Of a tied weight only the scale: stock ties the codes while loading, and wants a scale for each module.
        """
        if row.tied_to is not None:
            return {f"{row.name}.weight_scale": packed.scale.clone()}
        if row.kind is not WeightKind.EXPERTS:
            return _encode(row.name, packed, int_quantized=_is_int_quantized(row))
        found: dict[str, Tensor] = {}
        for expert in range(row.shape[0]):
            codes = packed.codes[expert].chunk(len(row.parts))
            scales = packed.scale[expert].chunk(len(row.parts))
            for name, part, scale in zip(row.parts, codes, scales, strict=True):
                shape = (part.shape[0], row.shape[-1])
                layout = layout_of(row.model_copy(update={"shape": shape, "transposed": False}))
                found |= _encode(name.format(expert), PackedTensor(layout, part, scale), int_quantized=False)
        return found

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight, in canonical layout."""
        layout = layout_of(row)
        if row.kind is not WeightKind.EXPERTS:
            inputs = input_grid(row, tensors, f"{row.name}.")
            packed = PackedTensor(layout, *_decode(row.name, row, row.shape, tensors), None, None, *inputs)
        else:
            shape = (row.shape[-2] // len(row.parts), row.shape[-1])
            pairs = [
                [_decode(name.format(expert), row, shape, tensors)[:2] for name in row.parts]
                for expert in range(row.shape[0])
            ]
            codes = torch.stack([torch.cat([codes for codes, _ in parts]) for parts in pairs])
            packed = PackedTensor(
                layout, codes, torch.stack([torch.cat([scale for _, scale in parts]) for parts in pairs])
            )
        return checked(row, packed, {"scale": schemes.groups(row.shape, layout.weights)})


def _experts_refusal(row: PlanRow, plan: Plan) -> str | None:
    """Why fused experts can't be held, or None."""
    weights = row.quantization.weights if row.quantization is not None else None
    if weights is None:
        return None
    if not row.parts:
        return f"transformers does not store {row.owner} as one weight per expert"
    if not weights.symmetric or weights.num_bits not in (4, 8) or weights.strategy == "tensor":
        return "experts can be 4 or 8 bits, symmetric, per group or channel"
    experts = {other.scheme for other in plan.quantized if other.kind is WeightKind.EXPERTS}
    return "all experts must have one scheme" if len(experts) > 1 else None


def _dense(plan: Plan) -> list[PlanRow]:
    """Quantized rows that are not experts."""
    return [row for row in plan.quantized if row.kind is not WeightKind.EXPERTS]


def _dense_key(row: PlanRow) -> str:
    """What distinguishes groups."""
    return row.quantization.model_dump_json() if row.quantization is not None else ""


def _needs_dequantize(plan: Plan) -> bool:
    """Whether stock must dequantize while loading: zero points, or an architecture that can't start packed."""
    schemes_used = [row.quantization for row in plan.quantized if row.quantization is not None]
    return plan.stock_dequantize or any(used.weights and not used.weights.symmetric for used in schemes_used)


def _groups(plan: Plan) -> dict[str, schemes.Scheme]:
    """One group per scheme, experts apart."""
    by_scheme: dict[str, list[PlanRow]] = {}
    for row in _dense(plan):
        by_scheme.setdefault(_dense_key(row), []).append(row)
    linear_only = len(by_scheme) == 1 and all(row.kind is WeightKind.LINEAR for row in _dense(plan))
    made = {}
    for index, rows in enumerate(by_scheme.values()):
        targets = ["Linear"] if linear_only else [row.module for row in rows]
        made[f"group_{index}"] = _targeting(rows[0], targets)
    experts = [row for row in plan.quantized if row.kind is WeightKind.EXPERTS]
    if experts:
        made["experts"] = _targeting(experts[0], [EXPERTS_TARGET])
    return made


def _targeting(row: PlanRow, targets: list[str]) -> schemes.Scheme:
    """A row's scheme with targets."""
    if row.quantization is None:
        raise ValueError(f"{row.name} is not quantized")
    return row.quantization.model_copy(update={"targets": targets})


def _is_int_quantized(row: PlanRow) -> bool:
    """Whether codes are stored as plain int8."""
    return row.quantization is not None and row.quantization.format == "int-quantized"


def _names(row: PlanRow) -> list[str]:
    """Names of the modules on disk that hold a row."""
    if row.kind is not WeightKind.EXPERTS:
        return [row.name]
    return [name.format(expert) for expert in range(row.shape[0]) for name in row.parts]


def _suffixes(row: PlanRow) -> list[str]:
    """Names of the tensors of one module on disk."""
    if _is_int_quantized(row):
        inputs = row.quantization.input_activations if row.quantization is not None else None
        if inputs is None or inputs.dynamic:
            return ["weight", "weight_scale"]
        return ["weight", "weight_scale", "input_scale", *([] if inputs.symmetric else ["input_zero_point"])]
    asymmetric = row.quantization and row.quantization.weights and not row.quantization.weights.symmetric
    return ["weight_packed", "weight_scale", "weight_shape", *(["weight_zero_point"] if asymmetric else [])]


def _encode(name: str, packed: PackedTensor, int_quantized: bool) -> dict[str, Tensor]:
    """The tensors of one two-dimensional weight."""
    rows, columns = packed.layout.shape
    bits = packed.layout.weights.num_bits
    if int_quantized:
        inputs = {"input_scale": packed.input_scale, "input_zero_point": packed.input_zero_point}
        sides = {f"{name}.{side}": value for side, value in inputs.items() if value is not None}
        return {f"{name}.weight": packed.codes, f"{name}.weight_scale": packed.scale, **sides}
    words = to_words(packed.codes, bits) if packed.codes.dtype == torch.int8 else packed.codes
    found = {
        f"{name}.weight_packed": words,
        f"{name}.weight_scale": packed.scale,
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    if packed.zero_point is not None:
        found[f"{name}.weight_zero_point"] = to_words(packed.zero_point.t().contiguous(), bits).t().contiguous()
    return found


def _decode(
    name: str, row: PlanRow, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of one two-dimensional weight."""
    layout = layout_of(row)
    bits = layout.weights.num_bits
    scale = take(tensors, f"{name}.weight_scale")
    grid = schemes.groups(shape, layout.weights)
    if _is_int_quantized(row):
        packed = PackedTensor(layout, take(tensors, f"{name}.weight"), scale)
        checked(row, packed, {"codes": shape, "scale": grid})
        return packed.codes, scale, None
    words = take(tensors, f"{name}.weight_packed")
    checked(row, PackedTensor(layout, words, scale), {"codes": words_shape(shape, bits), "scale": grid})
    if take(tensors, f"{name}.weight_shape").tolist() != list(shape):
        raise CorruptCheckpointError(f"{name}.weight_shape is not {list(shape)}, as planned.", "save it again")
    codes = from_words(words, bits, shape[1]) if bits == 8 else words
    if layout.weights.symmetric:
        return codes, scale, None
    zero_words = take(tensors, f"{name}.weight_zero_point").t().contiguous()
    expected = words_shape((grid[-1], shape[0]), bits)
    if zero_words.dtype != torch.int32 or tuple(zero_words.shape) != expected:
        raise CorruptCheckpointError(
            f"The zero points of {name} are {zero_words.dtype} {tuple(zero_words.t().shape)}, expected int32 "
            f"{expected[::-1]}.",
            "save it again",
        )
    return codes, scale, from_words(zero_words, bits, shape[0]).t().contiguous()


FORMATS.register(CompressedTensorsFormat())
