"""Checkpoints that transformers writes and reads with another library's quantizer, never this package: torchao's.

Also stands in for the format of a model that bitsandbytes itself quantized; weights that this package packs for
bitsandbytes have a format of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.plan import Plan, PlanRow
from ..core.registry import FORMATS
from ..modules.packed import PackedTensor
from .base import ACTIVATION_LIMIT, Limits


class LibraryFormat:
    """Weights that a library quantized; there is nothing to encode or to decode.

    Args:
        library: Its name, which is also the name of the package.
    """

    weights_file: str | None = None

    def __init__(self, library: str) -> None:
        self.name = library
        self.stock_reader: str | None = library

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """It holds nothing that this package packed."""
        return f"it holds what {self.name} itself quantized"

    def adapted(self, row: PlanRow) -> PlanRow:
        """It has no form of its own."""
        return row

    def limits(self, plan: Plan) -> Limits:
        """The same weights, so bit-equal unless inputs are quantized too."""
        labels = [row.backend or "" for row in plan.rows]
        rounded = any(label.endswith("-dynamic") or label == "bitsandbytes int8" for label in labels)
        return Limits(outputs=ACTIVATION_LIMIT if rounded else 0.0)

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """transformers writes it."""
        return {}

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one weight that this package packed: none."""
        return []

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """There are none."""
        return set()

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """There is nothing to encode."""
        raise ValueError(f"{row.name} is packed, {self.name} can't hold it")

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """There is nothing to decode."""
        raise ValueError(f"{row.name} is planned as packed, {self.name} can't hold it")


FORMATS.register(LibraryFormat("torchao"))
