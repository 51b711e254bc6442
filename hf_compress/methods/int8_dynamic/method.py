"""The scheme of dynamic INT8. Weights are rounded to nearest, per output channel."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationScheme

from ...core import scheme as schemes
from ...core.config import QuantFields
from ...core.weights import Weight, WeightKind


def scheme(fields: QuantFields, weight: Weight) -> QuantizationScheme | str:
    """W8A8 for linear layers; INT8 weights alone where inputs can't be quantized per token."""
    weights = schemes.weight_args(8, "channel", symmetric=True)
    inputs = schemes.token_args() if weight.kind in (WeightKind.LINEAR, WeightKind.CONV1D) else None
    return schemes.scheme(weights, inputs)
