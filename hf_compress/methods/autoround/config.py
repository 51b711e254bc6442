"""Configuration of learned rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ...core.config import QuantConfig, UniformFields

ITERATIONS = {"fast": 50, "balanced": 200, "best": 1000}
"""Steps per block of each preset."""


class AutoRoundFields(UniformFields):
    """Fields of `AutoRoundQuantConfig`.

    Attributes:
        preset: How many steps to take per block: `"fast"` 50, `"balanced"` 200, `"best"` 1000.
        iterations: Steps per block instead of the preset's; 0 rounds to nearest.
        batch_rows: Rows of calibration data per step.
    """

    preset: Literal["fast", "balanced", "best"] = "fast"
    iterations: Annotated[int, Field(strict=True, ge=0)] | None = None
    batch_rows: Annotated[int, Field(strict=True, ge=1)] = 8

    @property
    def steps(self) -> int:
        """Steps per block."""
        return ITERATIONS[self.preset] if self.iterations is None else self.iterations


class AutoRoundQuantConfig(QuantConfig):
    """Weight-only quantization with learned rounding (SignRound), 2 to 8 bits, from calibration data.

    Each block learns, by gradient descent, which weights to round up and which down, and the range of each group.

    Args:
        bits: Bits per weight, 2 to 8; 4 by default.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1) or `"tensor"`.
        symmetric: True (default) for no zero points.
        preset: `"fast"` (default, 50 steps per block), `"balanced"` (200) or `"best"` (1000).
        iterations: Steps per block instead of the preset's; 0 rounds to nearest.
        batch_rows: Rows of calibration data per step, 8 by default. Whole batches of the data are taken, at least one.
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

    method = "autoround"
    fields_type = AutoRoundFields
