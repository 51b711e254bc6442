"""Dynamic INT8: per-channel weights, inputs quantized per token at run time."""

from ...core.registry import METHODS, Method
from ..rtn.method import quantize_scheme
from .config import Int8DynamicFields, Int8DynamicQuantConfig
from .method import scheme

METHODS.register(
    Method(
        name="int8_dynamic",
        config=Int8DynamicQuantConfig,
        summary="W8A8 without data: the one for speed on CPUs with INT8 instructions; encoders and decoders.",
        scheme=scheme,
        quantize=quantize_scheme,
        quantizes_activations=True,
    )
)

__all__ = ["Int8DynamicFields", "Int8DynamicQuantConfig", "scheme"]
