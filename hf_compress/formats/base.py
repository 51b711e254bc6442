"""What a checkpoint format does besides refusing what it can't hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..core.errors import CorruptCheckpointError
from ..core.plan import Plan, PlanRow
from ..core.registry import FORMATS
from ..modules.packed import Layout, PackedTensor
from ..modules.swap import packed_modules, packed_tensor


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

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """What `config.json` says under `quantization_config`."""

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """The tensors on disk of one packed weight."""

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight from the tensors on disk."""

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""


def encode_model(model: nn.Module, plan: Plan, layout: CheckpointFormat) -> dict[str, Tensor]:
    """The state dict to write: packed weights in the format's tensors, the rest as it is."""
    state = dict(model.state_dict())
    rows = {(row.module, row.parameter): row for row in plan.quantized}
    for path, module in packed_modules(model):
        for name in module.hfc_layouts:
            for suffix in ("packed", "scale", "zero_point"):
                state.pop(f"{path}.{name}_{suffix}", None)
            row = rows[plain_path(path), name]
            state.update(layout.encode(row, packed_tensor(module, name)))
    return state


def plain_path(path: str) -> str:
    """A module's path without what PEFT and torch.compile put in when they wrap a layer."""
    return path.replace(".base_layer", "").replace("._orig_mod", "")


def layout_of(row: PlanRow) -> Layout:
    """The packed layout that a row plans."""
    if row.quantization is None:
        raise ValueError(f"{row.name} is not quantized")
    return Layout(row.shape, row.quantization, row.transposed)


def take(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor by name.

    Raises:
        CorruptCheckpointError: It is not there.
    """
    if key not in tensors:
        raise CorruptCheckpointError(f"The checkpoint has no tensor {key!r}, which its plan needs.", "save it again")
    return tensors[key]


def checked(row: PlanRow, packed: PackedTensor, expected: Mapping[str, tuple[int, ...]]) -> PackedTensor:
    """The packed weight, if codes and scale have the types, and the shapes that the plan implies.

    Raises:
        CorruptCheckpointError: They don't.
    """
    if packed.codes.dtype not in (torch.int8, torch.int32) or not packed.scale.is_floating_point():
        raise CorruptCheckpointError(
            f"{row.name} has codes of {packed.codes.dtype} and scales of {packed.scale.dtype}; expected integers and "
            "floating-point numbers.",
            "save it again",
        )
    seen = {"codes": tuple(packed.codes.shape), "scale": tuple(packed.scale.shape)}
    if packed.zero_point is not None:
        seen["zero_point"] = tuple(packed.zero_point.shape)
    for part, shape in expected.items():
        if seen.get(part, shape) != shape:
            raise CorruptCheckpointError(
                f"The {part} of {row.name} have shape {seen[part]}, the plan says {shape}.", "save it again"
            )
    return packed


def format_of(plan: Plan) -> CheckpointFormat:
    """The format that a plan chose."""
    return cast(CheckpointFormat, FORMATS.get(plan.format))
