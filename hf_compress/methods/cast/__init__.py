"""Casting to a 16-bit floating-point type."""

from ...core.registry import METHODS, Method
from .config import CastConfig, CastFields
from .method import notes, scheme

METHODS.register(
    Method(
        name="cast",
        config=CastConfig,
        summary="fp16 or bf16: half the size, no calibration; faster only where the processor has the instructions.",
        scheme=scheme,
        notes=notes,
    )
)

__all__ = ["CastConfig", "CastFields", "notes", "scheme"]
