"""A plain transformers checkpoint, for plans that quantize nothing (casts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.plan import Plan, PlanRow
from ..core.registry import FORMATS
from ..modules.packed import PackedTensor
from .base import Limits


class DenseFormat:
    """No packed weights at all."""

    name = "dense"
    stock_reader: str | None = "transformers"
    weights_file: str | None = None

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """It holds no packed weight."""
        return None if row.quantization is None else "a dense checkpoint holds no packed weights"

    def adapted(self, row: PlanRow) -> PlanRow:
        """It stores scales as they are."""
        return row

    def limits(self, plan: Plan) -> Limits:
        """The same weights: bit-equal."""
        return Limits()

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight: none."""
        return []

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """There are no packed weights."""
        return set()

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """There are no packed weights."""
        raise ValueError(f"{row.name} is packed, a dense checkpoint can't hold it")

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """There are no packed weights."""
        raise ValueError(f"{row.name} is planned as packed in a dense checkpoint")


FORMATS.register(DenseFormat())
