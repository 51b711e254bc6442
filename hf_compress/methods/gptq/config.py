"""Configuration of GPTQ."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...calibration.experts import ExpertPolicy
from ...core.config import QuantConfig, UniformFields


class GPTQFields(UniformFields):
    """Fields of `GPTQQuantConfig`.

    Attributes:
        act_order: Whether columns of large activations are rounded first.
        block_size: Columns after which errors are carried on as a matrix product.
        damping: Fraction of the Hessian's mean diagonal that is added to it.
        experts: What to do for experts that too few tokens reach.
    """

    act_order: Annotated[bool, Field(strict=True)] = True
    block_size: Annotated[int, Field(strict=True, ge=1)] = 128
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    experts: ExpertPolicy = ExpertPolicy.SHARE


class GPTQQuantConfig(QuantConfig):
    """Weight-only GPTQ, 2 to 8 bits: columns are rounded one after the other and the rest makes up for the errors.

    Args:
        bits: Bits per weight, 2 to 8; 4 by default.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1) or `"tensor"`.
        symmetric: True (default) for no zero points.
        act_order: True (default) rounds the columns of largest activations first. Groups stay consecutive columns, so
            checkpoints need no table of groups.
        block_size: Columns after which errors are carried on as a matrix product, 128 by default. Only speed depends
            on it.
        damping: Fraction of the Hessian's mean diagonal that is added to it, 0.01 by default; ten times that, and so
            on, where the Hessian is singular.
        experts: What to do for experts that too few tokens reach: `"share"` (default) lets all tokens count for them,
            `"round"` rounds them to nearest, `"error"` raises.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row, to nearest.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"`, `"gptq"` or `"guarded"`.
        calibration: Calibration data.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
        CalibrationError: The data can't be used.
    """

    method = "gptq"
    fields_type = GPTQFields
