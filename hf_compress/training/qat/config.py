"""Configuration of quantization-aware training, and the scheme that it trains for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ...core import scheme as schemes
from ...core.config import QuantConfig, QuantFields, UniformFields
from ...core.errors import ConfigError
from ...core.weights import Weight, WeightKind
from ..schedule import Moment


class QATFields(UniformFields):
    """Fields of `QATConfig`.

    Attributes:
        bits: Bits per weight, 2 to 8; with quantized inputs 8 where it isn't given.
        group_size: Consecutive inputs that share a scale; with quantized inputs `"channel"` where it isn't given.
        activation_bits: Bits of the layers' inputs, or None for floating point.
        activation_strategy: `"token"` one scale per token, computed at run time; `"tensor"` one fixed range per input.
        symmetric_inputs: Whether a fixed range has zero in its middle.
        learn_scales: Whether scales of weights are trained.
        start: When fake quantization starts.
        freeze: When ranges and batch normalisation freeze.
    """

    activation_bits: Literal[8] | None = None
    activation_strategy: Literal["token", "tensor"] = "token"
    symmetric_inputs: Annotated[bool, Field(strict=True)] = False
    learn_scales: Annotated[bool, Field(strict=True)] = False
    start: Moment = 0.0
    freeze: Annotated[Moment, Field(validate_default=True)] = 0.8

    @model_validator(mode="before")
    @classmethod
    def _int8_beside_int8(cls, values: Any) -> Any:
        """Weights for quantized inputs are INT8 per channel unless something else is asked for."""
        if isinstance(values, dict) and values.get("activation_bits") is not None:
            return {"bits": 8, "group_size": "channel", **values}
        return values

    @field_validator("activation_bits")
    @classmethod
    def _held(cls, bits: int | None, info: ValidationInfo) -> int | None:
        """Refuse weights that stock formats don't hold beside quantized inputs; other fields come before."""
        if bits is not None and info.data.get("format") != "guarded":
            settings = {name: info.data.get(name) for name in ("bits", "group_size", "symmetric")}
            _check_int8(settings, "activation_bits=8")
            for rule in info.data.get("rules", ()):
                _check_int8(rule.settings(), f"activation_bits=8 and the rule for {rule.pattern!r}")
        return bits

    @field_validator("activation_strategy", "symmetric_inputs")
    @classmethod
    def _has_effect(cls, value: str | bool, info: ValidationInfo) -> str | bool:
        """Refuse settings of inputs that stay floating point, and of ranges that are not fixed."""
        if value == "tensor" and info.data.get("activation_bits") is None:
            raise ConfigError(
                'activation_strategy="tensor" is about quantized inputs, and these stay floating point.',
                "add activation_bits=8",
            )
        if value is True and info.data.get("activation_strategy") != "tensor":
            raise ConfigError(
                "symmetric_inputs=True is about fixed ranges of inputs; a scale per token is symmetric anyway.",
                'add activation_bits=8, activation_strategy="tensor"',
            )
        return value

    @field_validator("freeze")
    @classmethod
    def _after_start(cls, freeze: int | float, info: ValidationInfo) -> int | float:
        """Refuse to freeze before the start, where both are steps or both fractions; the rest is seen in training."""
        start = info.data.get("start")
        if type(start) is type(freeze) and freeze < start:
            raise ConfigError(f"freeze={freeze} comes before start={start}.", f"freeze={start}, or an earlier start")
        return freeze


class QATConfig(QuantConfig):
    """Quantization-aware training: the model is trained with the rounding that it will have once packed.

    For `QATCallback(QATConfig(...))`, or `from_pretrained(..., quantization_config=QATConfig(...))` with
    `QATCallback()`. Gradients pass straight through the rounding (arXiv:1308.3432, section 4). Scales follow the range
    of the weights, or are trained themselves (LSQ, arXiv:1902.08153).

    With `activation_bits=8`, inputs of linear layers, GPT-2's Conv1D and convolutions are quantized too, those that
    `int8_dynamic` (`"token"`) or `int8_static` (`"tensor"`) would quantize; recurrent layers stay weight-only. Output
    layers of `nn.MultiheadAttention` are kept, as it reads their weights without calling them. Where another module
    does so, the first forward ends in an UnsupportedModelError with what to skip.

    Args:
        bits: Bits per weight, 2 to 8; 4 by default, 8 with `activation_bits`.
        group_size: Consecutive inputs that share a scale, 64 by default; `"channel"` (or -1), the default with
            `activation_bits`, or `"tensor"`.
        symmetric: True (default) for no zero points.
        activation_bits: 8 also quantizes the inputs of layers; None (default) leaves them floating point. Beside
            anything else than symmetric 8-bit weights per channel or tensor it needs `format="guarded"`.
        activation_strategy: `"token"` (default) for one scale per token, computed at run time; `"tensor"` for one
            fixed range per input, a moving average of what training shows, used from the second step on.
        symmetric_inputs: True for fixed ranges without zero point; False by default.
        learn_scales: True trains the scales of weights, each as the logarithm of its ratio to the first one (LSQ).
            Embedding tables and tied weights keep those of their range. False by default.
        start: When fake quantization starts, as a fraction of the run (a float) or a number of optimizer steps (an
            integer); 0.0 by default.
        freeze: When ranges of inputs and statistics of batch normalisation freeze, likewise; 0.8 by default.
        skip: Patterns of weights to keep, added to the defaults.
        rules: Rules for some of the weights, the last match decides.
        default_rules: False also quantizes heads, routers and embeddings.
        embeddings: `"int8"` also quantizes embedding tables, per row.
        min_coverage: Smallest fraction of weights in scope that must be quantized, 0.9 by default.
        format: `"auto"`, `"compressed-tensors"` or `"guarded"`.

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "qat"
    fields_type = QATFields

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary without fields at their defaults; those whose default depends on others are always there."""
        return {**super().to_diff_dict(), "bits": self.fields.bits, "group_size": self.fields.group_size}  # type: ignore[attr-defined]


def scheme(fields: QuantFields, weight: Weight) -> schemes.Scheme | str:
    """The grid that a weight is trained for, and its input's, or why it is kept.

    Raises:
        ConfigError: The fields are another method's.
    """
    if not isinstance(fields, QATFields):
        raise ConfigError(f"{type(fields).__name__} has nothing to train.", "use QATConfig")
    if weight.kind is WeightKind.LINEAR and not weight.token_inputs:
        return "nn.MultiheadAttention reads it without calling its layer, which is where values are fake-quantized"
    weights = schemes.weight_args(fields.bits, fields.group_size, fields.symmetric)
    linear = weight.kind in (WeightKind.LINEAR, WeightKind.CONV1D)
    if fields.activation_bits is None or not (linear or (weight.kind is WeightKind.CONV and weight.kernel[0] > 1)):
        return schemes.scheme(weights)
    if fields.activation_strategy == "tensor":
        return schemes.scheme(weights, schemes.static_args(fields.symmetric_inputs))
    return schemes.scheme(weights, schemes.token_args() if linear else schemes.tensor_args())


def _check_int8(settings: dict[str, Any], place: str) -> None:
    """Refuse settings of weights that only the guarded form holds beside quantized inputs.

    Raises:
        ConfigError: With the value.
    """
    held = {"bits": (8,), "group_size": ("channel", "tensor"), "symmetric": (True,)}
    for name, value in settings.items():
        if value is not None and value not in held[name]:
            raise ConfigError(
                f"{name}={value!r} is not possible with {place}: beside quantized inputs, stock formats hold "
                "symmetric 8-bit weights with a scale per channel or tensor.",
                f'{name}={held[name][0]!r}, activation_bits=None, or format="guarded" for a checkpoint that only '
                "hf_compress.load reads",
            )
