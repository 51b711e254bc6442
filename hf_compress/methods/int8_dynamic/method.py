"""The scheme of dynamic INT8. Weights are rounded to nearest, per output channel."""

from __future__ import annotations

from ...core import scheme as schemes
from ...core.config import QuantFields
from ...core.weights import Weight, WeightKind


def scheme(fields: QuantFields, weight: Weight) -> schemes.Scheme | str:
    """W8A8 for linear, recurrent and convolutional layers; INT8 weights alone where inputs can't be quantized.

    Inputs get one scale per token, those of convolutions one scale per tensor. Depthwise convolutions, whose inputs
    differ from channel to channel, recurrent cells and recurrent layers with a forward of their own keep float inputs.
    """
    weights = schemes.weight_args(8, "channel", symmetric=True)
    if weight.token_inputs:
        return schemes.scheme(weights, schemes.token_args())
    if weight.kind is WeightKind.CONV and weight.kernel[0] > 1:
        return schemes.scheme(weights, schemes.tensor_args())
    return schemes.scheme(weights)
