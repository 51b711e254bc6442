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
from ..core.weights import PACKED_SUFFIXES
from ..modules.packed import PackedTensor, layout_of, words_shape
from .base import Limits, checked, input_grid, integers_and_sides, take

GUARD = "hf_compress-guarded"


class GuardedFormat:
    """The guarded layout: canonical packed tensors, read by `hf_compress.load` only."""

    name = "guarded"
    stock_reader: str | None = None
    weights_file: str | None = "hf_compress.safetensors"

    def refusal(self, row: PlanRow, plan: Plan) -> str | None:
        """It holds everything that can be packed."""
        return None

    def adapted(self, row: PlanRow) -> PlanRow:
        """It stores scales as they are."""
        return row

    def limits(self, plan: Plan) -> Limits:
        """Stock never reads it."""
        return Limits()

    def quantization_config(self, plan: Plan) -> dict[str, Any]:
        """The guard: no `quant_method`, on purpose."""
        return {
            "format": GUARD,
            "guard": "HFC901: written by hf_compress in a form that stock transformers can't read; without this guard "
            "the weights would be random. pip install hf-compress, then hf_compress.load(path)",
        }

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""
        return [] if row.tied_to is not None else [f"{row.key}_{suffix}" for suffix in _suffixes(row)]

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on disk that belong to packed weights."""
        return integers_and_sides(tensors)

    def encode(self, row: PlanRow, packed: PackedTensor) -> dict[str, Tensor]:
        """All parts under the names that packed modules use; of tied weights once."""
        if row.tied_to is not None:
            return {}
        return {f"{row.key}_{suffix}": value for suffix, value in packed.parts().items()}

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight."""
        layout = layout_of(row)
        bits = layout.weights.num_bits
        parts = {suffix: take(tensors, f"{row.key}_{suffix}") for suffix in _suffixes(row)}
        sides = {side: parts.get(side) for side in ("zero_point", "codebook", "g_idx")}
        scale, zero_point = input_grid(row, tensors, f"{row.key}_")
        inputs = {"input_scale": scale, "input_zero_point": zero_point}
        packed = PackedTensor(layout, parts["packed"], parts["scale"], **sides, **inputs)
        grid = schemes.groups(row.shape, layout.weights)
        shape = row.shape if bits == 8 else words_shape(row.shape, bits)
        return checked(row, packed, {"codes": shape, "scale": grid, "zero_point": grid, "codebook": (2**bits,)})


def _suffixes(row: PlanRow) -> list[str]:
    """Which buffers a packed weight has."""
    layout = layout_of(row)
    inputs = layout.scheme.input_activations
    static = inputs is not None and not inputs.dynamic
    there = {
        "packed": True,
        "scale": True,
        "zero_point": not layout.weights.symmetric,
        "codebook": layout.scheme.codebook is not None,
        "g_idx": layout.scheme.reordered,
        "input_scale": static,
        "input_zero_point": static and inputs is not None and not inputs.symmetric,
    }
    return [suffix for suffix in PACKED_SUFFIXES if there[suffix]]


FORMATS.register(GuardedFormat())
