from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hf_compress.apply.planning import plan_model
from hf_compress.core import scheme as schemes
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CalibrationError, ConfigError
from hf_compress.core.registry import METHODS
from hf_compress.core.weights import list_weights
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.int8_static import Int8StaticQuantConfig
from hf_compress.methods.rtn import RTNFields
from hf_compress.training.qat import QATConfig, QATFields, insert_fake_quant, scheme
from tests._utils.tiny import tiny

STATIC: dict[str, Any] = {"activation_bits": 8, "activation_strategy": "tensor"}


def refused(expected: str, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        QATConfig(**fields)
    assert expected in str(caught.value), str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def test_defaults() -> None:
    config = QATConfig()
    assert (config.bits, config.group_size, config.symmetric) == (4, 64, True)
    assert (config.activation_bits, config.activation_strategy, config.learn_scales) == (None, "token", False)
    assert (config.start, config.freeze, config.symmetric_inputs) == (0.0, 0.8, False)
    assert config.method == "qat"


def test_registered_with_what_prepares() -> None:
    method = METHODS.get("qat")
    assert method.config is QATConfig
    assert method.prepare is insert_fake_quant
    assert not method.needs_data


def test_weights_beside_quantized_inputs_are_int8_per_channel_unless_asked_for() -> None:
    assert (QATConfig(activation_bits=8).bits, QATConfig(activation_bits=8).group_size) == (8, "channel")
    assert QATConfig(activation_bits=8, group_size="tensor").group_size == "tensor"
    assert (QATConfig(activation_bits=None).bits, QATConfig(activation_bits=None).group_size) == (4, 64)
    free = QATConfig(activation_bits=8, bits=4, group_size=32, symmetric=False, format="guarded")
    assert (free.bits, free.group_size, free.symmetric) == (4, 32, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bits": 4}, "bits=4 is not possible with activation_bits=8"),
        ({"bits": 8, "group_size": 64}, "group_size=64 is not possible with activation_bits=8"),
        ({"symmetric": False}, "symmetric=False is not possible with activation_bits=8"),
        ({"rules": [{"pattern": "fc", "bits": 4}]}, "bits=4 is not possible with activation_bits=8 and the rule for"),
        ({"rules": [{"pattern": "fc", "symmetric": False}]}, "symmetric=False is not possible with activation_bits=8"),
    ],
    ids=str,
)
def test_weights_that_no_stock_format_holds_beside_quantized_inputs(fields: dict[str, Any], expected: str) -> None:
    assert 'format="guarded"' in refused(expected, activation_bits=8, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"activation_bits": 4},
        {"activation_bits": "8"},
        {"activation_bits": 8, "activation_strategy": "channel"},
        {"learn_scales": 1},
        {"symmetric_inputs": "yes"},
        {"start": -0.1},
        {"start": 1.5},
        {"start": -1},
        {"freeze": "late"},
        {"start": True},
    ],
    ids=str,
)
def test_impossible_values(fields: dict[str, Any]) -> None:
    name, value = list(fields.items())[-1]
    refused(f"{name}={value!r} is not possible", **fields)


def test_settings_without_effect() -> None:
    refused('activation_strategy="tensor" is about quantized inputs', activation_strategy="tensor")
    refused("symmetric_inputs=True is about fixed ranges", activation_bits=8, symmetric_inputs=True)
    assert QATConfig(**STATIC, symmetric_inputs=True).symmetric_inputs is True
    assert QATConfig(symmetric_inputs=False, activation_strategy="token").activation_bits is None


def test_freeze_before_start() -> None:
    refused("freeze=0.2 comes before start=0.5", start=0.5, freeze=0.2)
    refused("freeze=3 comes before start=4", start=4, freeze=3)
    refused("freeze=0.8 comes before start=0.9", start=0.9, freeze=0.8)
    refused("freeze=0.8 comes before start=0.9", start=0.9)  # the default
    assert QATConfig(start=100, freeze=0.5).start == 100  # comparable only once the run's length is known


def test_no_calibration_data() -> None:
    with pytest.raises(CalibrationError, match="needs no calibration data"):
        QATConfig(calibration=["text"])


def test_unknown_key_names_the_nearest() -> None:
    refused("activation_bits", activation_bit=8)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_bits": 8},
        {**STATIC, "symmetric_inputs": True, "learn_scales": True},
        {"activation_bits": 8, "bits": 4, "group_size": 64, "format": "guarded"},
        {"bits": 3, "group_size": 128, "start": 10, "freeze": 0.5, "rules": [{"pattern": "a", "bits": 8}]},
    ],
    ids=str,
)
def test_round_trips(fields: dict[str, Any]) -> None:
    config = QATConfig(**fields)
    for written in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
        found = QuantConfig.from_dict(json.loads(json.dumps(written)))
        assert isinstance(found, QATConfig)
        assert found.fields == config.fields
        assert (type(found.start), type(found.freeze)) == (type(config.start), type(config.freeze))


def kinds() -> nn.ModuleDict:
    """One module of each kind."""
    with torch.random.fork_rng(devices=[]):
        return nn.ModuleDict(
            {
                "linear": nn.Linear(64, 64),
                "conv": nn.Conv2d(4, 64, 4),
                "depthwise": nn.Conv2d(64, 64, 4, groups=64),
                "lstm": nn.LSTM(64, 64),
                "attention": nn.MultiheadAttention(64, 4),
            }
        )


@pytest.mark.parametrize(
    ("fields", "linear", "conv", "rest"),
    [
        ({"bits": 3}, "int3-g64", "int3-channel", "int3-g64"),
        ({"activation_bits": 8}, "w8a8-dynamic-token", "w8a8-dynamic-tensor", "int8-channel"),
        (STATIC, "w8a8-static-tensor-asym", "w8a8-static-tensor-asym", "int8-channel"),
        ({**STATIC, "symmetric_inputs": True}, "w8a8-static-tensor", "w8a8-static-tensor", "int8-channel"),
    ],
    ids=str,
)
def test_schemes_of_all_kinds(fields: dict[str, Any], linear: str, conv: str, rest: str) -> None:
    rows = {row.name: row for row in plan_model(kinds(), QATConfig(**fields, min_coverage=0.1)).rows}
    assert rows["linear"].scheme == linear
    assert rows["conv"].scheme == conv
    assert rows["depthwise"].scheme == rest.replace("g64", "channel")
    assert rows["lstm.weight_ih_l0"].scheme == rest
    assert rows["attention.out_proj"].scheme == "kept"
    assert "nn.MultiheadAttention" in rows["attention.out_proj"].reason


@pytest.mark.parametrize("family", ["bert-classifier", "llama", "gpt2", "vit", "resnet"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (QATConfig(activation_bits=8, min_coverage=0.0), Int8DynamicQuantConfig(min_coverage=0.0)),
        (QATConfig(**STATIC, min_coverage=0.0), Int8StaticQuantConfig(min_coverage=0.0)),
    ],
    ids=["dynamic", "static"],
)
def test_plans_are_those_of_the_methods_without_training(family: str, ours: QATConfig, theirs: QuantConfig) -> None:
    model = tiny(family)
    found, expected = plan_model(model, ours), plan_model(model, theirs)
    assert found.format == expected.format
    assert [(row.name, row.quantization) for row in found.rows] == [
        (row.name, row.quantization) for row in expected.rows
    ]


def test_scheme_wants_its_own_fields() -> None:
    weight = list_weights(nn.Linear(4, 4, bias=False, device="meta"))[0]
    with pytest.raises(ConfigError, match="RTNFields has nothing to train"):
        scheme(RTNFields(), weight)
    made = scheme(QATFields(bits=2, group_size=4, symmetric=False), weight)
    assert isinstance(made, schemes.Scheme)
    assert schemes.label(made) == "int2-g4-asym"
