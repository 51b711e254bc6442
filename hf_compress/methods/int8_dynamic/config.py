"""Configuration of dynamic INT8."""

from __future__ import annotations

from ...core.config import QuantConfig, QuantFields


class Int8DynamicFields(QuantFields):
    """Fields of `Int8DynamicQuantConfig`: only the common ones, the grid is fixed."""


class Int8DynamicQuantConfig(QuantConfig):
    """Dynamic INT8 (W8A8): symmetric per-channel weights, symmetric per-token inputs, no calibration.

    Linear layers of transformers models whose input is not (batch, tokens, features), such as poolers, are quantized
    weight-only: stock readers give such an input one scale for several rows. In plain modules every row of an input
    of any rank has its own scale. Weight-only are also fused experts, depthwise convolutions and recurrent cells. Of
    `nn.LSTM` and `nn.GRU`, inputs and hidden states of every layer are quantized per token, unless a subclass has a
    forward of its own. Inputs of other convolutions have one scale for the whole tensor, so the result of one image
    depends on its batch.

    Args:
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"` or `"guarded"`.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "int8_dynamic"
    fields_type = Int8DynamicFields
