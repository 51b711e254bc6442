"""Learned rounding: SignRound, as in AutoRound."""

from ...core.registry import METHODS, Method
from ..rtn.method import scheme
from .config import AutoRoundFields, AutoRoundQuantConfig
from .method import compressor

METHODS.register(
    Method(
        name="autoround",
        config=AutoRoundQuantConfig,
        summary="Weight-only, 2-8 bits: rounding learned block by block from data. Slow; best at 2 and 3 bits.",
        scheme=scheme,
        needs_data=True,
        compressor=compressor,
    )
)

__all__ = ["AutoRoundFields", "AutoRoundQuantConfig", "scheme"]
