"""Configuration of AWQ."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...calibration.experts import ExpertPolicy
from ...core.config import QuantConfig, UniformFields


class AWQFields(UniformFields):
    """Fields of `AWQQuantConfig`.

    Attributes:
        grid: Number of exponents that the scale search tries.
        clip: Whether ranges are clipped where that lowers the error.
        experts: What to do for experts that too few tokens reach.
    """

    grid: Annotated[int, Field(strict=True, ge=1, le=200)] = 20
    clip: Annotated[bool, Field(strict=True)] = True
    experts: ExpertPolicy = ExpertPolicy.SHARE


class AWQQuantConfig(QuantConfig):
    """Weight-only AWQ, 2 to 8 bits: channels that matter are scaled up before they are rounded, ranges are clipped.

    The scales are folded into the layer before, so checkpoints are those of `RTNQuantConfig` with the same fields, to
    the byte count; only the values differ, also those of norms.

    Args:
        bits: Bits per weight, 2 to 8; 4 by default.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1) or `"tensor"`.
        symmetric: True (default) for no zero points.
        grid: Number of exponents that the scale search tries, 20 by default.
        clip: True (default) also searches each group's range; not with `group_size="tensor"`.
        experts: What to do for experts that too few tokens reach: `"share"` (default) lets all tokens count for them,
            `"round"` rounds them to nearest, `"error"` raises.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row, to nearest.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"`, `"gptq"`, `"awq"` or `"guarded"`.
        calibration: Calibration data.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
        CalibrationError: The data can't be used.
    """

    method = "awq"
    fields_type = AWQFields
