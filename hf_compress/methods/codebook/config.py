"""Configuration of codebook quantization."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationInfo, field_validator

from ...core.config import Bits, GroupSize, QuantConfig, QuantFields
from ...core.errors import ConfigError

FOUR_BITS = ("nf4", "fp4")
"""Codebooks that exist with 4 bits only."""


class CodebookFields(QuantFields):
    """Fields of `CodebookQuantConfig`.

    Attributes:
        codebook: Kind of the table.
        bits: Bits per weight, 2 to 8; 4 for `"nf4"` and `"fp4"`.
        group_size: Consecutive inputs that share a scale; `"channel"` (or -1) one scale per output channel,
            `"tensor"` one for the whole weight.
    """

    codebook: Literal["nf4", "fp4", "log", "kmeans"] = "nf4"
    bits: Bits = 4
    group_size: GroupSize = 64

    @field_validator("bits")
    @classmethod
    def _of_the_codebook(cls, bits: int, info: ValidationInfo) -> int:
        """Refuse bit widths that the codebook doesn't have; `codebook` is missing when it was refused itself."""
        check_bits(str(info.data.get("codebook")), bits)
        return bits


class CodebookQuantConfig(QuantConfig):
    """Weight-only quantization to a table of 2^bits values, times one scale per group, without data.

    Args:
        codebook: `"nf4"` (default) quantiles of the normal distribution, `"fp4"` 4-bit floating point, `"log"`
            signed powers of two, `"kmeans"` a table learned for each weight.
        bits: Bits per weight, 2 to 8; `"nf4"` and `"fp4"` have 4.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1) or `"tensor"`.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"bitsandbytes"` (NF4 and FP4) or `"guarded"`.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "codebook"
    fields_type = CodebookFields


def check_bits(codebook: str, bits: int) -> None:
    """Refuse bit widths that a codebook doesn't have.

    Raises:
        ConfigError: `"nf4"` or `"fp4"` with other than 4 bits.
    """
    if codebook in FOUR_BITS and bits != 4:
        raise ConfigError(
            f"bits={bits} is not possible with codebook={codebook!r}, which has 16 values.",
            f'bits=4, or codebook="kmeans" for {bits} bits',
        )
