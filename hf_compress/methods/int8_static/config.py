"""Configuration of static INT8."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ...core.config import QuantConfig, QuantFields


class Int8StaticFields(QuantFields):
    """Fields of `Int8StaticQuantConfig`.

    Attributes:
        observer: How the range of an input is chosen.
        percentile: Of the percentile observer, in percent.
        symmetric_inputs: Whether the grid of an input has zero in its middle.
        smoothing: Strength of SmoothQuant before ranges are looked at, or None.
    """

    observer: Literal["minmax", "moving_average", "percentile", "mse", "entropy"] = "mse"
    percentile: Annotated[float, Field(strict=True, gt=50, le=100)] = 99.99
    symmetric_inputs: Annotated[bool, Field(strict=True)] = False
    smoothing: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None


class Int8StaticQuantConfig(QuantConfig):
    """Static INT8 (W8A8): symmetric per-channel weights, one fixed scale per input from calibration data.

    Linear layers, GPT-2's Conv1D and convolutions get quantized inputs, whatever their rank. Weight-only are fused
    experts, recurrent layers, depthwise convolutions, whose inputs differ from channel to channel, and embedding
    tables. Batch normalisation behind a convolution is folded into it and stays as a mere offset.

    Args:
        observer: `"mse"` (default), `"minmax"`, `"moving_average"`, `"percentile"` or `"entropy"`.
        percentile: Percentage of values that the percentile observer keeps, above 50; 99.99 by default.
        symmetric_inputs: True for input grids without zero point, which some engines want; False by default, as most
            inputs lie to one side of zero.
        smoothing: Strength of SmoothQuant, 0 to 1: how much of the range of inputs is moved into weights where their
            channels differ; None (default) for none.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"` or `"guarded"`.
        calibration: Calibration data.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "int8_static"
    fields_type = Int8StaticFields
