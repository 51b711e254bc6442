"""GPTQ: rounding column by column, with the second moments of the inputs."""

from ...core.registry import METHODS, Method
from ..rtn.method import scheme
from .config import GPTQFields, GPTQQuantConfig
from .method import compressor

METHODS.register(
    Method(
        name="gptq",
        config=GPTQQuantConfig,
        summary="Weight-only, 2-8 bits, from data, minutes: first to try at 3 and 4 bits. Same bytes as rtn.",
        scheme=scheme,
        needs_data=True,
        compressor=compressor,
        gram_copies=3,
    )
)

__all__ = ["GPTQFields", "GPTQQuantConfig", "scheme"]
