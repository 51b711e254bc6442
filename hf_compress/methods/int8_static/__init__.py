"""Static INT8: per-channel weights, inputs on one fixed grid each, from calibration data."""

from ...core.registry import METHODS, Method
from ..rtn.method import quantize_scheme
from .config import Int8StaticFields, Int8StaticQuantConfig
from .method import StaticCompressor, make, scheme

METHODS.register(
    Method(
        name="int8_static",
        config=Int8StaticQuantConfig,
        summary="W8A8 with ranges from data: for integer engines, CNNs and encoders; no work per token at run time.",
        scheme=scheme,
        quantize=quantize_scheme,
        needs_data=True,
        compressor=make,
    )
)

__all__ = ["Int8StaticFields", "Int8StaticQuantConfig", "StaticCompressor", "make", "scheme"]
