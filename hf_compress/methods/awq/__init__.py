"""AWQ: activation-aware scales and clipped ranges."""

from ...core.registry import METHODS, Method
from ..rtn.method import scheme
from .config import AWQFields, AWQQuantConfig
from .method import compressor

METHODS.register(
    Method(
        name="awq",
        config=AWQQuantConfig,
        summary="Weight-only, scales by activations, ranges by output error. Needs data; gentler than gptq on it.",
        scheme=scheme,
        needs_data=True,
        compressor=compressor,
        gram_copies=3,
        float32_copies=3,  # the block, what a trial puts back, and what it scales
    )
)

__all__ = ["AWQFields", "AWQQuantConfig", "scheme"]
