"""Configuration of half-quadratic quantization."""

from __future__ import annotations

from ...core.config import QuantConfig, UniformFields


class HQQFields(UniformFields):
    """Fields of `HQQQuantConfig`."""


class HQQQuantConfig(QuantConfig):
    """Weight-only half-quadratic quantization, 2 to 8 bits, without data: the grid of round to nearest, fitted.

    Checkpoints are those of `RTNQuantConfig` with the same fields, to the byte count; only the values differ.

    Args:
        bits: Bits per weight, 2 to 8; 4 by default.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1) or `"tensor"`.
        symmetric: True (default) for no zero points.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"`, `"gptq"` or `"guarded"`.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "hqq"
    fields_type = HQQFields
