"""Quantization-aware training: a model learns with the rounding that it will have once it is packed."""

from ...core.registry import METHODS, Method
from ...methods.rtn.method import quantize_scheme
from .config import QATConfig, QATFields, scheme
from .modules import insert_fake_quant

METHODS.register(
    Method(
        name="qat",
        config=QATConfig,
        summary="Trains with rounded weights, and inputs: the least loss at 2-4 bits where there is data to train on.",
        scheme=scheme,
        quantize=quantize_scheme,
        quantizes_activations=True,
        prepare=insert_fake_quant,
    )
)

__all__ = ["QATConfig", "QATFields", "insert_fake_quant", "scheme"]
