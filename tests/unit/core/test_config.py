from __future__ import annotations

import ast
import copy
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_compress import _version
from hf_compress.core.config import Calibration, QuantConfig, Rule
from hf_compress.core.errors import CalibrationError, ConfigError, MethodError
from hf_compress.methods.cast import CastConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig

ALL = [RTNQuantConfig, Int8DynamicQuantConfig, CastConfig]
DATA = ["a calibration text"]

scalars = {
    "skip": st.lists(st.text(min_size=1), max_size=3).map(tuple),
    "default_rules": st.booleans(),
    "embeddings": st.sampled_from(["keep", "int8"]),
    "min_coverage": st.floats(0, 1),
    "format": st.sampled_from(["auto", "compressed-tensors", "guarded"]),
}
grids = {
    "bits": st.integers(2, 8),
    "group_size": st.integers(1, 4096) | st.sampled_from([-1, "channel", "tensor"]),
    "symmetric": st.booleans(),
}
rule = st.fixed_dictionaries({"pattern": st.text(min_size=1)}, optional={"keep": st.none() | st.booleans(), **grids})
values = st.fixed_dictionaries({}, optional={**scalars, **grids, "rules": st.lists(rule, max_size=3)})


def refused(expected: str, kind: type[QuantConfig] = RTNQuantConfig, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert isinstance(caught.value, ValueError)
    assert expected in str(caught.value), str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    config = RTNQuantConfig()
    assert (config.bits, config.group_size, config.symmetric) == (4, 64, True)
    assert (config.skip, config.rules, config.default_rules) == ((), (), True)
    assert (config.embeddings, config.min_coverage, config.format) == ("keep", 0.9, "auto")
    assert config.calibration is None
    assert config.method == "rtn"


@pytest.mark.parametrize("bits", ["4", True, 4.0, None, 1, 9, 0, -4, [4]])
def test_bits(bits: Any) -> None:
    refused(f"bits={bits!r} is not possible", bits=bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_that_work(bits: int) -> None:
    assert RTNQuantConfig(bits=bits).bits == bits


@pytest.mark.parametrize("group_size", [0, -2, 64.0, "64", "row", True, None, []])
def test_group_size(group_size: Any) -> None:
    """The key is named as the user wrote it, without pydantic's name for a branch of the union."""
    refused(f"group_size={group_size!r} is not possible", group_size=group_size)


def test_group_size_in_a_rule_names_the_rule() -> None:
    refused("In rules.0: group_size=0 is not possible", rules=[{"pattern": "a", "group_size": 0}])


@pytest.mark.parametrize(
    ("given", "meant"), [(-1, "channel"), ("channel", "channel"), ("tensor", "tensor"), (1, 1), (48, 48)]
)
def test_group_size_that_works(given: Any, meant: Any) -> None:
    assert RTNQuantConfig(group_size=given).group_size == meant
    assert RTNQuantConfig(rules=[{"pattern": "a", "group_size": given}]).rules[0].group_size == meant


@pytest.mark.parametrize("field", ["symmetric", "default_rules"])
@pytest.mark.parametrize("value", [1, 0, "yes", "true", None])
def test_booleans(field: str, value: Any) -> None:
    refused(f"{field}={value!r} is not possible", **{field: value})


@pytest.mark.parametrize("value", ["int4", 8, True, None])
def test_embeddings(value: Any) -> None:
    assert "'keep' or 'int8'" in refused(f"embeddings={value!r} is not possible", embeddings=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "much", None])
def test_min_coverage(value: Any) -> None:
    refused(f"min_coverage={value!r} is not possible", min_coverage=value)


@pytest.mark.parametrize("value", ["0.5", True])
def test_min_coverage_of_the_wrong_type(value: Any) -> None:
    """Like all other fields, it takes no text and no truth values."""
    refused(f"min_coverage={value!r} is not possible", min_coverage=value)


@pytest.mark.parametrize("value", ["gguf", "GUARDED", None, 1])
def test_format(value: Any) -> None:
    refused(f"format={value!r} is not possible", format=value)


@pytest.mark.parametrize("value", ["lm_head", None, 3, {"lm_head": 1}])
def test_skip_is_a_list(value: Any) -> None:
    assert 'skip=["pattern"]' in refused(f"skip={value!r} is not a list", skip=value)


def test_skip_holds_text() -> None:
    refused("skip.1=2 is not possible", skip=["a", 2])


@pytest.mark.parametrize("value", ["lm_head", None, 3, {"pattern": "lm_head"}])
def test_rules_is_a_list_and_the_fix_can_be_pasted(value: Any) -> None:
    message = refused(f"rules={value!r} is not a list", rules=value)
    fix = message.rpartition("Fix: write rules=")[2]
    assert RTNQuantConfig(rules=ast.literal_eval(fix)).rules


def test_rules_hold_rules() -> None:
    refused("rules.1='lm_head' is not possible", rules=[{"pattern": "a", "bits": 2}, "lm_head"])
    refused("In rules.0: The key 'pattern' is missing", rules=[{"bits": 2}])
    refused("In rules.0: pattern='' is not possible", rules=[{"pattern": "", "bits": 2}])
    refused("In rules.0: bits=9 is not possible", rules=[{"pattern": "a", "bits": 9}])
    refused("In rules.0: keep=1 is not possible", rules=[{"pattern": "a", "keep": 1}])
    assert RTNQuantConfig(rules=[Rule(pattern="a", bits=2)]).rules == (Rule(pattern="a", bits=2),)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("bit", "bits"), ("group_sise", "group_size"), ("symetric", "symmetric"), ("skips", "skip")],
)
def test_misspelt_key(wrong: str, right: str) -> None:
    message = refused(f"Unknown key {wrong!r}. Did you mean {right!r}", **{wrong: 4})
    assert "known keys: skip, rules" in message


def test_misspelt_key_in_a_rule() -> None:
    message = refused("In rules.0: Unknown key 'bit'. Did you mean 'bits'?", rules=[{"pattern": "a", "bit": 3}])
    assert "known keys: pattern, keep, bits" in message


def test_unknown_key_without_a_near_one() -> None:
    assert "Did you mean" not in refused("Unknown key 'qqqqqq'.", qqqqqq=4)


def test_keys_of_another_method() -> None:
    refused("Unknown key 'bits'", Int8DynamicQuantConfig, bits=8)
    refused("Unknown key 'bits'", CastConfig, bits=16)
    refused("Unknown key 'dtype'", RTNQuantConfig, dtype="bf16")


def test_cast() -> None:
    refused("'bf16' or 'fp16'", CastConfig, dtype="float16")
    refused("default_rules=True is not possible", CastConfig, default_rules=True)
    refused("embeddings='int8' is not possible", CastConfig, embeddings="int8")
    assert str(CastConfig(dtype="fp16").load_dtype) == "torch.float16"
    assert RTNQuantConfig().load_dtype is None


def test_cast_skips_nothing_and_says_so() -> None:
    """The list is one: the message must not claim otherwise."""
    with pytest.raises(ConfigError, match="skip") as caught:
        CastConfig(skip=["lm_head"])
    assert "is not a list" not in str(caught.value)


def test_fields_are_frozen() -> None:
    config = RTNQuantConfig(rules=[{"pattern": "a", "bits": 2}])
    with pytest.raises(ValidationError):
        config.fields.bits = 8
    with pytest.raises(ValidationError):
        config.rules[0].bits = 8


@pytest.mark.parametrize("field", ["bits", "group_size", "skip", "format"])
def test_shell_is_frozen_too(field: str) -> None:
    """Without this, `config.bits = 8` reads back as 8 while the weights get 4 bits."""
    config = RTNQuantConfig()
    with pytest.raises((AttributeError, ConfigError)):
        setattr(config, field, getattr(RTNQuantConfig(bits=8, group_size=32, skip=["a"], format="guarded"), field))


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no field 'widths'"):
        _ = RTNQuantConfig().widths


def test_equality_compares_fields() -> None:
    assert RTNQuantConfig(bits=4) == RTNQuantConfig()
    assert RTNQuantConfig(bits=4) != RTNQuantConfig(bits=8)


def test_repr_names_what_differs_from_the_defaults() -> None:
    assert repr(RTNQuantConfig()) == "RTNQuantConfig()"
    assert repr(RTNQuantConfig(bits=3, group_size=-1)) == "RTNQuantConfig(bits=3, group_size='channel')"


def test_signature_shows_the_fields() -> None:
    assert {"bits", "group_size", "skip"} <= set(RTNQuantConfig.__signature__.parameters)


@pytest.mark.parametrize("kind", ALL)
def test_from_dict_dispatches_on_method(kind: type[QuantConfig]) -> None:
    for asked in (QuantConfig, RTNQuantConfig):
        made = asked.from_dict({"method": kind.method, "quant_method": "hf_compress"})
        assert type(made) is kind
    made, unused = QuantConfig.from_dict({"method": kind.method}, return_unused_kwargs=True)
    assert (type(made), unused) == (kind, {})


def test_from_dict_without_method() -> None:
    with pytest.raises(ConfigError, match="needs the key 'method'") as caught:
        QuantConfig.from_dict({"bits": 4})
    assert "rtn" in caught.value.fix


def test_from_dict_with_unknown_method() -> None:
    with pytest.raises(MethodError, match=r"'rtm'.*Did you mean 'rtn'") as caught:
        QuantConfig.from_dict({"method": "rtm"})
    assert "int8_dynamic" in caught.value.fix


def test_newer_version_warns_once_and_names_the_keys(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        config = QuantConfig.from_dict({"method": "rtn", "bits": 3, "zeta": 1, "alpha": 2, "version": "99.1"})
    (record,) = [record for record in caplog.records if record.name.startswith("hf_compress")]
    assert "alpha, zeta" in record.getMessage()
    assert "99.1" in record.getMessage()
    assert config.bits == 3


def test_newer_version_with_known_keys_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    QuantConfig.from_dict({"method": "rtn", "bits": 3, "version": "99.1"})
    assert not caplog.records


@pytest.mark.parametrize("version", [None, "0.0.1", _version.__version__])
def test_same_or_older_version_does_not_forgive(version: str | None) -> None:
    with pytest.raises(ConfigError, match="Unknown key 'zeta'"):
        QuantConfig.from_dict({"method": "rtn", "zeta": 1, "version": version})


def test_version_that_is_none() -> None:
    with pytest.raises(ConfigError, match="version='latest' is not a version number"):
        QuantConfig.from_dict({"method": "rtn", "version": "latest"})


@given(values)
def test_round_trip(fields: dict[str, Any]) -> None:
    config = RTNQuantConfig(**fields)
    for stored in (config.to_dict(), json.loads(config.to_json_string()), config.to_diff_dict()):
        again = QuantConfig.from_dict(json.loads(json.dumps(stored)))
        assert type(again) is RTNQuantConfig
        assert again.fields == config.fields
        assert again.to_dict() == config.to_dict()


def test_dictionaries() -> None:
    full = RTNQuantConfig(bits=3).to_dict()
    assert full["quant_method"] == "hf_compress"
    assert full["method"] == "rtn"
    assert full["version"] == _version.__version__
    assert full["group_size"] == 64
    difference = json.loads(RTNQuantConfig(bits=3).to_json_string())
    assert set(difference) == {"quant_method", "method", "version", "bits"}
    assert json.loads(RTNQuantConfig(bits=3).to_json_string(use_diff=False)) == json.loads(json.dumps(full))


def test_update_changes_nothing() -> None:
    config = RTNQuantConfig()
    assert config.update(bits=8) == {"bits": 8}
    assert config.bits == 4


@pytest.mark.parametrize("kind", ALL)
def test_data_for_methods_without_need_is_refused(kind: type[QuantConfig]) -> None:
    with pytest.raises(CalibrationError, match=f"{kind.__name__} needs no calibration data"):
        kind(calibration=DATA)


def test_calibration_copies_by_reference() -> None:
    held = Calibration(DATA)
    copied = copy.deepcopy({"config": held})["config"]
    assert copied is held
    assert copied.data is DATA


def test_deepcopy_of_a_config_is_equal() -> None:
    config = RTNQuantConfig(bits=3, skip=["a"])
    config.calibration = Calibration(DATA)  # as `quantize(calibration=)` does
    copied = copy.deepcopy(config)
    assert copied.fields == config.fields
    assert copied.calibration is config.calibration
    for stored in (
        config.to_dict(),
        config.to_diff_dict(),
        json.loads(config.to_json_string(use_diff=False)),
    ):
        assert "calibration" not in stored
        assert DATA[0] not in json.dumps(stored)
    assert DATA[0] not in repr(config)
