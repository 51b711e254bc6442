"""Codes that are positions in a table of values: NF4, FP4, powers of two, k-means."""

from ...core.registry import METHODS, Method
from .config import CodebookFields, CodebookQuantConfig
from .method import quantize, quantize_scheme, scheme

METHODS.register(
    Method(
        name="codebook",
        config=CodebookQuantConfig,
        summary="nf4 for bitsandbytes, kmeans for the least error at 2-4 bits; fp4 and 4-bit log are worse than rtn.",
        scheme=scheme,
        quantize=quantize_scheme,
    )
)

__all__ = ["CodebookFields", "CodebookQuantConfig", "quantize", "scheme"]
