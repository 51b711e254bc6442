"""What a checkpoint format does besides refusing what it can't hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..core.errors import CorruptCheckpointError
from ..core.plan import DTYPES, Plan, PlanRow
from ..core.registry import FORMATS
from ..core.weights import PACKED_SUFFIXES
from ..modules.packed import PackedTensor
from ..modules.swap import PackedModule, packed_modules, packed_tensor

ACTIVATION_LIMIT = 1e-5
"""Relative limit for quantized inputs: rounding at run time may differ by accumulation order."""


@dataclass(frozen=True)
class Limits:
    """How far a stock reload may be from the model.

    Attributes:
        outputs: Relative to the largest output; 0 means bit-equal.
        weights: The same for each weight that stock keeps packed and dequantizes on request; None where stock
            computes with dense weights, so that its outputs say it all.
        on_meta: Whether stock can list the names of all weights on the meta device, as the proof of a model that is
            too large to load twice begins.
    """

    outputs: float = 0.0
    weights: float | None = None
    on_meta: bool = True


class CheckpointFormat(Protocol):
    """A layout on disk.

    Attributes:
        name: The key in configurations.
        stock_reader: Package that stock transformers needs to read it; None where stock must refuse it.
        weights_file: Name of the weights file where it isn't transformers' own, else None.
    """

    name: str
    stock_reader: str | None
    weights_file: str | None

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """Why a row can't be held, or None."""

    def adapted(self, row: PlanRow) -> PlanRow:
        """A quantized row as this format stores it."""

    def limits(self, plan: Plan) -> Limits:
        """How far a stock reload may be from the model."""

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What `config.json` says under `quantization_config`."""

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk of one packed weight."""

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight from the tensors on disk."""

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on disk that belong to packed weights.

        Told by the tensors themselves: names on disk may differ from the plan's by transformers' renames.
        """


def encode_model(model: nn.Module, plan: Plan, layout: CheckpointFormat) -> dict[str, Tensor]:
    """The state dict to write: packed weights in the format's tensors, the rest as it is."""
    state = dict(model.state_dict())
    rows = {(row.module, row.parameter): row for row in plan.quantized}
    for path, part in model.named_modules(remove_duplicate=False):
        names = part.hfc_layouts if isinstance(part, PackedModule) else ()
        for key in [f"{name}_{suffix}" for name in names for suffix in PACKED_SUFFIXES]:
            state.pop(f"{path}.{key}" if path else key, None)
    for path, module in packed_modules(model):
        for name in module.hfc_layouts:
            row = rows[plain_path(path), name]
            state.update(layout.encode(row, packed_tensor(module, name)))
    return state


def integers_and_sides(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of integer codes, and of the scales and other tensors beside them.

    A model may have parameters of its own that end in `_scale`, so names alone don't tell.
    """
    codes = {key for key, value in tensors.items() if value.dtype in (torch.int8, torch.int32)}
    bases = {key.removesuffix("_packed") for key in codes}
    names = ("scale", "shape", "zero_point", "codebook", "input_scale", "input_zero_point")
    sides = {f"{base}_{side}" for base in bases for side in names}
    modules = {key.removesuffix("weight") for key in codes if f".{key}".endswith(".weight")}
    inputs = {f"{module}{side}" for module in modules for side in ("input_scale", "input_zero_point")}
    return codes | ((sides | inputs) & set(tensors))


def plain_path(path: str) -> str:
    """A module's path without what PEFT and torch.compile put in when they wrap a layer."""
    return path.replace(".base_layer", "").replace("._orig_mod", "")


def take(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor by name.

    Raises:
        CorruptCheckpointError: It is not there.
    """
    if key not in tensors:
        raise CorruptCheckpointError(f"The checkpoint has no tensor {key!r}, which its plan needs.", "save it again")
    return tensors[key]


def checked(row: PlanRow, packed: PackedTensor, expected: Mapping[str, tuple[int, ...]]) -> PackedTensor:
    """The packed weight, if its parts have the types and shapes that the plan implies, and finite values.

    Raises:
        CorruptCheckpointError: They don't.
    """
    if packed.codes.dtype not in (torch.int8, torch.int32) or not packed.scale.is_floating_point():
        raise CorruptCheckpointError(
            f"{row.name} has codes of {packed.codes.dtype} and scales of {packed.scale.dtype}; expected integers and "
            "floating-point numbers.",
            "save it again",
        )
    _check_sides(row, packed)
    seen = {"codes": tuple(packed.codes.shape), "scale": tuple(packed.scale.shape)}
    if packed.zero_point is not None:
        seen["zero_point"] = tuple(packed.zero_point.shape)
    if packed.codebook is not None:
        seen["codebook"] = tuple(packed.codebook.shape)
    _check_order(row, packed)
    for part, shape in expected.items():
        if seen.get(part, shape) != shape:
            raise CorruptCheckpointError(
                f"The {part} of {row.name} have shape {seen[part]}, the plan says {shape}.", "save it again"
            )
    return packed


def _check_sides(row: PlanRow, packed: PackedTensor) -> None:
    """Refuse zero points and codebooks of other types than this package writes, and values that are not finite."""
    for part, value, dtype in (
        ("zero_point", packed.zero_point, torch.int8),
        ("codebook", packed.codebook, torch.float32),
    ):
        if value is not None and value.dtype != dtype:
            raise CorruptCheckpointError(
                f"The {part} of {row.name} are {value.dtype}, expected {dtype}.", "save it again"
            )
    for part, value in (("scale", packed.scale), ("codebook", packed.codebook)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise CorruptCheckpointError(f"The {part} of {row.name} holds NaN or infinite values.", "save it again")


def _check_order(row: PlanRow, packed: PackedTensor) -> None:
    """Refuse a `g_idx` where none is planned, or that does not name a group of each column."""
    groups, order = packed.scale.shape[-1], packed.g_idx
    if (order is not None) != bool(row.quantization and row.quantization.reordered):
        raise CorruptCheckpointError(
            f"{row.name} has {'no' if order is None else 'a'} g_idx, and its plan says otherwise.", "save it again"
        )
    if order is None:
        return
    if order.dtype != torch.int32 or tuple(order.shape) != row.shape[-1:]:
        raise CorruptCheckpointError(
            f"The g_idx of {row.name} is {order.dtype} {tuple(order.shape)}, expected int32 {row.shape[-1:]}.",
            "save it again",
        )
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        raise CorruptCheckpointError(
            f"The g_idx of {row.name} names group {low if low < 0 else high}; there are {groups}.", "save it again"
        )


def input_grid(row: PlanRow, tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero point of a row's input, as its plan has them.

    Args:
        row: The row.
        tensors: Tensors by their names on disk.
        prefix: What the names `input_scale` and `input_zero_point` begin with.

    Raises:
        CorruptCheckpointError: One is missing, or has another type or shape than planned, or the scale is no positive
            number.
    """
    inputs = row.quantization.input_activations if row.quantization is not None else None
    if inputs is None or inputs.dynamic:
        return None, None
    scale = take(tensors, f"{prefix}input_scale")
    zero_point = None if inputs.symmetric else take(tensors, f"{prefix}input_zero_point")
    usable = scale.is_floating_point() and tuple(scale.shape) == (1,) and bool((scale > 0) & scale.isfinite())
    if not usable:
        raise CorruptCheckpointError(
            f"The input scale of {row.name} is {scale.dtype} {tuple(scale.shape)} {scale.flatten()[:1].tolist()}, "
            "expected one positive floating-point number.",
            "save it again",
        )
    if zero_point is not None and (zero_point.dtype != torch.int8 or tuple(zero_point.shape) != (1,)):
        raise CorruptCheckpointError(
            f"The input zero point of {row.name} is {zero_point.dtype} {tuple(zero_point.shape)}, expected int8 (1,).",
            "save it again",
        )
    return scale, zero_point


def tie_refusal(row: PlanRow) -> str | None:
    """Why a format without a place for shared codes can't hold a row, or None."""
    return None if row.tied_to is None else f"it holds no {row.scheme} weight that is tied to another ({row.tied_to})"


def check_scale_type(row: PlanRow, packed: PackedTensor) -> None:
    """Refuse scales, also of static inputs, of another type than their row's, which is that of the time of saving.

    Args:
        row: The row.
        packed: Its packed weight.

    Raises:
        CorruptCheckpointError: One has another type.
    """
    for what, scale in (("scale", packed.scale), ("input scale", packed.input_scale)):
        if scale is not None and scale.dtype != DTYPES[row.dtype]:
            raise CorruptCheckpointError(
                f"The {what} of {row.name} is {scale.dtype}, the plan says {row.dtype}.", "save it again"
            )


def format_of(plan: Plan) -> CheckpointFormat:
    """The format that a plan chose."""
    return cast(CheckpointFormat, FORMATS.get(plan.format))
