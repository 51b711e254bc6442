"""The guarded form: for what no stock format holds.

Weights lie in `hf_compress.safetensors` and the config has a `quantization_config` without `quant_method`; either
alone makes stock `from_pretrained` raise, so the checkpoint can never load as random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core import scheme as schemes
from ..core.plan import Plan, PlanRow
from ..core.registry import FORMATS
from ..modules.packed import PackedTensor, words_shape
from .base import checked, layout_of, take

GUARD = "hf_compress-guarded"


class GuardedFormat:
    """The guarded layout: canonical packed tensors, read by `hf_compress.load` only."""

    name = "guarded"
    stock_reader: str | None = None
    weights_file: str | None = "hf_compress.safetensors"

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """It holds everything that can be packed."""
        return None

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """The guard: no `quant_method`, on purpose."""
        return {
            "format": GUARD,
            "guard": "HFC901: written by hf_compress in a form that stock transformers can't read; without this guard "
            "the weights would be random. pip install hf-compress, then hf_compress.load(path)",
        }

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""
        asymmetric = not layout_of(row).weights.symmetric
        return [f"{row.key}_{suffix}" for suffix in ("packed", "scale", *(["zero_point"] if asymmetric else []))]

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """Codes, scale and zero point under the names that packed modules use."""
        found = {f"{row.key}_packed": packed.codes, f"{row.key}_scale": packed.scale}
        return found if packed.zero_point is None else {**found, f"{row.key}_zero_point": packed.zero_point}

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight."""
        layout = layout_of(row)
        bits = layout.weights.num_bits
        codes, scale, *rest = (take(tensors, key) for key in self.keys(row))
        packed = PackedTensor(layout, codes, scale, rest[0] if rest else None)
        grid = schemes.groups(row.shape, layout.weights)
        shape = row.shape if bits == 8 else words_shape(row.shape, bits)
        return checked(row, packed, {"codes": shape, "scale": grid, "zero_point": grid})


FORMATS.register(GuardedFormat())
