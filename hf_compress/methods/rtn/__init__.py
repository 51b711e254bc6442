"""Round to nearest: uniform weight-only quantization without data."""

from ...core.registry import METHODS, Method
from .config import RTNFields, RTNQuantConfig
from .method import quantize, quantize_scheme, scheme

METHODS.register(
    Method(
        name="rtn",
        config=RTNQuantConfig,
        summary="Weight-only, 2-8 bits, no data, seconds. 8 bits is nearly lossless; at 4 bits measure first.",
        scheme=scheme,
        quantize=quantize_scheme,
    )
)

__all__ = ["RTNFields", "RTNQuantConfig", "quantize", "scheme"]
