"""Failures of configurations, rules and plans: nothing is read yet."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import QuantoConfig

import hf_compress as hfc
from hf_compress.core.config import QuantConfig
from hf_compress.core.registry import METHODS

from .error_cases import TEXTS, Act, Arena, Case


def config(**fields: Any) -> Any:
    """A row's call: building a configuration."""
    return lambda arena: lambda: hfc.RTNQuantConfig(**fields)


def from_dict(values: Any) -> Any:
    """A row's call: a configuration from a dictionary."""
    return lambda arena: lambda: QuantConfig.from_dict(values)


def plan(family: str = "llama", **fields: Any) -> Any:
    """A row's call: planning a live model."""

    def provoke(arena: Arena) -> Act:
        model = arena.live(family)
        return lambda: hfc.plan(model, hfc.RTNQuantConfig(**fields))

    return provoke


def _data_config(arena: Arena) -> type[QuantConfig]:
    """The configuration class of a method that needs data."""

    class DataConfig(hfc.RTNQuantConfig):
        method = "with_data"

    METHODS.get("rtn")
    spec = dataclasses.replace(METHODS.get("rtn"), name="with_data", config=DataConfig, needs_data=True)
    arena.patch.setitem(METHODS._entries, "with_data", spec)
    return DataConfig


def _data_twice(arena: Arena) -> Act:
    kind, model = _data_config(arena), arena.live()
    return lambda: hfc.quantize(model, kind(calibration=TEXTS), calibration=TEXTS)


def _data_not_needed(arena: Arena) -> Act:
    model = arena.live()
    return lambda: hfc.quantize(model, hfc.RTNQuantConfig(), calibration=TEXTS)


def with_config(entry: str, given: Any) -> Any:
    """A row's call: an entry point with something that is no configuration of ours."""

    def provoke(arena: Arena) -> Act:
        model, made = arena.live(), given() if callable(given) and not isinstance(given, type) else given
        return lambda: getattr(hfc, entry)(model, made)

    return provoke


def _not_floating(dtype: torch.dtype) -> Any:
    def provoke(arena: Arena) -> Act:
        model = nn.Sequential(nn.Linear(64, 64, bias=False, device="meta"))
        model[0].weight = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
        arena.watch(model)
        return lambda: hfc.quantize(model, hfc.RTNQuantConfig())

    return provoke


def _int8_rule(arena: Arena) -> Act:
    model = arena.live()
    made = hfc.Int8DynamicQuantConfig(rules=[{"pattern": "q_proj", "bits": 4}])
    return lambda: hfc.plan(model, made)


def _rule(**fields: Any) -> Any:
    return lambda arena: lambda: hfc.Rule(**fields)


def _register_twice(arena: Arena) -> Act:
    spec = METHODS.get("rtn")
    return lambda: METHODS.register(spec)


def _no_weights(arena: Arena) -> Act:
    model = arena.watch(nn.Sequential(nn.ReLU()))
    return lambda: hfc.plan(model, hfc.RTNQuantConfig())


CASES = (
    # Keys and values.
    Case(name="misspelt-key", provoke=config(bit=4), code="HFC202", words=("'bit'", "Did you mean 'bits'")),
    Case(name="bits-too-many", provoke=config(bits=9), code="HFC202", words=("bits=9", "less than or equal to 8")),
    Case(name="bits-a-string", provoke=config(bits="4"), code="HFC202", words=("bits='4'", "integer")),
    Case(name="bits-a-bool", provoke=config(bits=True), code="HFC202", words=("bits=True", "integer")),
    Case(name="bits-none", provoke=config(bits=None), code="HFC202", words=("bits=None",)),
    Case(name="group-size-zero", provoke=config(group_size=0), code="HFC202", words=("group_size=0",)),
    Case(name="group-size-word", provoke=config(group_size="row"), code="HFC202", words=("'row'", "'channel'")),
    Case(name="symmetric-a-string", provoke=config(symmetric="yes"), code="HFC202", words=("symmetric='yes'",)),
    Case(name="skip-a-string", provoke=config(skip="lm_head"), code="HFC202", words=("skip='lm_head'", "list")),
    Case(name="skip-of-numbers", provoke=config(skip=[1]), code="HFC202", words=("skip", "1", "string")),
    Case(name="skip-empty-pattern", provoke=plan(skip=[""]), code="HFC202", words=("skip", "''")),
    Case(name="rules-of-strings", provoke=config(rules=["x"]), code="HFC202", words=("rules", "'x'")),
    Case(name="rule-unknown-key", provoke=config(rules=[{"patern": "x"}]), code="HFC202", words=("patern", "pattern")),
    Case(name="rule-bits", provoke=config(rules=[{"pattern": "x", "bits": 99}]), code="HFC202", words=("99",)),
    Case(name="rule-class-bits", provoke=_rule(pattern="x", bits=99), code="HFC202", words=("bits=99",)),
    Case(name="rule-class-key", provoke=_rule(patern="x"), code="HFC202", words=("'patern'", "'pattern'")),
    Case(name="min-coverage-two", provoke=config(min_coverage=2.0), code="HFC202", words=("min_coverage=2.0",)),
    Case(name="min-coverage-nan", provoke=config(min_coverage=float("nan")), code="HFC202", words=("nan",)),
    Case(name="format-unknown", provoke=config(format="gguf"), code="HFC202", words=("'gguf'", "'guarded'")),
    Case(name="embeddings-unknown", provoke=config(embeddings="int4"), code="HFC202", words=("'int4'", "'int8'")),
    Case(
        name="cast-skip",
        provoke=lambda arena: lambda: hfc.CastConfig(skip=["lm_head"]),
        code="HFC202",
        words=("takes no skip", "lm_head", "leave skip out"),
    ),
    Case(
        name="cast-dtype",
        provoke=lambda arena: lambda: hfc.CastConfig(dtype="fp8"),
        code="HFC202",
        words=("dtype='fp8'", "'bf16'"),
    ),
    Case(
        name="int8-bits",
        provoke=lambda arena: lambda: hfc.Int8DynamicQuantConfig(bits=4),
        code="HFC202",
        words=("'bits'", "known keys"),
    ),
    Case(name="dict-no-method", provoke=from_dict({"bits": 4}), code="HFC202", words=("'method'", "rtn")),
    Case(name="dict-unknown-key", provoke=from_dict({"method": "rtn", "bit": 4}), code="HFC202", words=("'bits'",)),
    Case(name="dict-bad-version", provoke=from_dict({"method": "rtn", "version": "x"}), code="HFC202", words=("'x'",)),
    Case(name="dict-none", provoke=from_dict(None), code="HFC202", words=("got None", "dictionary")),
    Case(name="dict-a-list", provoke=from_dict(["rtn"]), code="HFC202", words=("got ['rtn']", "dictionary")),
    Case(name="dict-number-key", provoke=from_dict({"method": "rtn", 4: 4}), code="HFC202", words=("4",)),
    Case(name="dict-method", provoke=from_dict({"method": "rtm"}), code="HFC204", words=("'rtm'", "'rtn'")),
    Case(name="dict-method-list", provoke=from_dict({"method": ["rtn"]}), code="HFC204", words=("['rtn']", "rtn")),
    Case(
        name="method-unknown",
        provoke=lambda arena: lambda: METHODS.get("gtpq"),
        code="HFC204",
        words=("'gtpq'", "int8_dynamic"),
    ),
    Case(name="method-twice", provoke=_register_twice, code="HFC204", words=("'rtn'", "already")),
    Case(
        name="base-config",
        provoke=lambda arena: lambda: hfc.QuantConfig(),
        code="HFC202",
        words=("QuantConfig", "RTNQuantConfig"),
    ),
    # Not a configuration of ours.
    *(
        Case(name=f"{entry}-config-{name}", provoke=with_config(entry, given), code="HFC202", words=(word, "RTN"))
        for entry in ("plan", "quantize", "preflight")
        for name, given, word in (
            ("none", None, "NoneType"),
            ("dict", {"method": "rtn"}, "dict"),
            ("quanto", lambda: QuantoConfig(weights="int8"), "QuantoConfig"),
        )
    ),
    Case(
        name="config-class-not-instance",
        provoke=with_config("quantize", hfc.RTNQuantConfig),
        code="HFC202",
        words=("config", "RTNQuantConfig"),
    ),
    # Data.
    Case(name="data-not-needed", provoke=config(calibration=TEXTS), code="HFC501", words=("RTNQuantConfig", "data")),
    Case(name="data-not-needed-argument", provoke=_data_not_needed, code="HFC501", words=("'rtn'", "calibration")),
    Case(name="data-twice", provoke=_data_twice, code="HFC501", words=("twice", "once")),
    # Patterns and rules.
    Case(name="pattern-typo", provoke=plan(skip=["lm_haed"]), code="HFC201", words=("'lm_haed'", "'lm_head'")),
    Case(name="pattern-weight-suffix", provoke=plan(skip=["*.weight"]), code="HFC201", words=("'*.weight'",)),
    Case(name="pattern-regex", provoke=plan(skip=["re:("]), code="HFC201", words=("'re:('", "regular"), fix=False),
    Case(name="pattern-glob", provoke=plan(skip=["["]), code="HFC201", words=("'['",)),
    Case(
        name="rule-says-nothing",
        provoke=plan(rules=[{"pattern": "q_proj"}]),
        code="HFC203",
        words=("'q_proj'", "changes nothing", "keep"),
    ),
    Case(
        name="rule-contradicts",
        provoke=plan(rules=[{"pattern": "q_proj", "keep": True, "bits": 8}]),
        code="HFC203",
        words=("'q_proj'", "bits"),
    ),
    Case(
        name="rule-without-effect",
        provoke=plan(rules=[{"pattern": "lm_head", "bits": 8}]),
        code="HFC203",
        words=("'lm_head'", "head", "keep=False"),
    ),
    Case(name="rule-other-method", provoke=_int8_rule, code="HFC203", words=("bits", "'int8_dynamic'")),
    # Coverage, groups, ties, formats.
    Case(name="nothing-left", provoke=plan(skip=["re:.*"]), code="HFC101", words=("0 of", "LlamaForCausalLM")),
    Case(name="nothing-there", provoke=_no_weights, code="HFC101", words=("0 of 0", "no weights")),
    Case(name="coverage", provoke=plan(skip=["mlp"]), code="HFC102", words=("mlp", "min_coverage=", "accepts")),
    Case(
        name="group-size",
        provoke=plan(group_size=48),
        code="HFC401",
        words=("group_size=48", "64", "q_proj", "group_size=64"),
    ),
    Case(
        name="group-size-by-rule",
        provoke=plan(rules=[{"pattern": "down_proj", "group_size": 96}]),
        code="HFC401",
        words=("group_size=96", "128", "down_proj"),
    ),
    Case(
        name="tie-head",
        provoke=plan("llama-tied", rules=[{"pattern": "lm_head", "keep": False}]),
        code="HFC404",
        words=("lm_head", "embed_tokens", "tie_word_embeddings"),
    ),
    Case(
        name="tie-embeddings",
        provoke=plan("llama-tied", embeddings="int8", skip=["lm_head"]),
        code="HFC404",
        words=("lm_head", "embed_tokens"),
    ),
    Case(
        name="format-conv1d",
        provoke=plan("gpt2", format="compressed-tensors"),
        code="HFC801",
        words=("compressed-tensors", "Conv1D", 'format="guarded"'),
    ),
    Case(
        name="format-tensor-zero-point",
        provoke=plan(symmetric=False, group_size="tensor"),
        code="HFC801",
        words=("zero point", 'format="guarded"'),
    ),
    Case(name="format-experts", provoke=plan("mixtral", bits=3), code="HFC801", words=("experts", "4 or 8 bit")),
    # Weights that are no floating-point numbers.
    Case(name="weights-int8", provoke=_not_floating(torch.int8), code="HFC101", words=("int8",)),
    Case(name="weights-complex", provoke=_not_floating(torch.complex64), code="HFC101", words=("complex64",)),
    Case(name="weights-float8", provoke=_not_floating(torch.float8_e4m3fn), code="HFC101", words=("float8",)),
)
