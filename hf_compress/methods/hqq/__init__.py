"""Half-quadratic quantization: uniform grids fitted to the weights, without data."""

from ...core.registry import METHODS, Method
from ..rtn.method import scheme
from .config import HQQFields, HQQQuantConfig
from .method import quantize, quantize_scheme

METHODS.register(
    Method(
        name="hqq",
        config=HQQQuantConfig,
        summary="The grid of rtn fitted to the weights, no data: closer at 2-4 bits, same bytes; at 8 bits take rtn.",
        scheme=scheme,
        quantize=quantize_scheme,
    )
)

__all__ = ["HQQFields", "HQQQuantConfig", "quantize", "scheme"]
