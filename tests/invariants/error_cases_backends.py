"""Failures of other libraries' configurations: refused before loading, with what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import (
    AwqConfig,
    BitsAndBytesConfig,
    FbgemmFp8Config,
    FineGrainedFP8Config,
    GPTQConfig,
    QuantoConfig,
    TorchAoConfig,
)

import hf_compress as hfc
from tests._utils.tiny import tiny

from .error_cases import TEXTS, Act, Arena, Case, edit_weights, weights_of


def four(**options: Any) -> BitsAndBytesConfig:
    """NF4 by bitsandbytes."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def rounded(**options: Any) -> TorchAoConfig:
    """INT8 by torchao."""
    return TorchAoConfig(Int8WeightOnlyConfig(), **options)


def of_id(make: Callable[[], Any], family: str = "llama", entry: str = "quantize", **options: Any) -> Any:
    """A row's call: an entry point with a directory and a configuration."""

    def provoke(arena: Arena) -> Act:
        path, config = arena.dense(family), make()
        return lambda: getattr(hfc, entry)(path, config, **options)

    return provoke


def of_live(make: Callable[[], Any], entry: str = "quantize") -> Any:
    """A row's call: an entry point with a live model."""

    def provoke(arena: Arena) -> Act:
        model, config = arena.live(), make()
        return lambda: getattr(hfc, entry)(model, config)

    return provoke


def _loaded_live(arena: Arena) -> Act:
    path = arena.dense()
    model = arena.watch(type(tiny("llama")).from_pretrained(path))
    return lambda: hfc.quantize(model, four())


def _without(arena: Arena) -> Act:
    path = edit_weights(arena.dense(), lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    return lambda: hfc.quantize(path, four())


def _cut(arena: Arena) -> Act:
    path: Path = arena.dense()
    file = weights_of(path)
    file.write_bytes(file.read_bytes()[:-100])
    return lambda: hfc.quantize(path, rounded())


CASES: tuple[Case, ...] = (
    *(
        Case(
            name=f"backend-live-{entry}",
            provoke=of_live(four, entry),
            code="HFC403",
            words=("BitsAndBytesConfig", "LlamaForCausalLM", 'save_pretrained("DIR")', 'hf_compress.quantize("DIR"'),
        )
        for entry in ("quantize", "plan", "preflight")
    ),
    Case(
        name="backend-live-with-a-name",
        provoke=_loaded_live,
        code="HFC403",
        words=("BitsAndBytesConfig", "model = hf_compress.quantize(", "llama"),
    ),
    *(
        Case(name=f"backend-{config.__name__}", provoke=of_id(make), code="HFC202", words=(config.__name__, instead))
        for config, make, instead in (
            (AwqConfig, lambda: AwqConfig(bits=4), "HQQQuantConfig"),
            (GPTQConfig, lambda: GPTQConfig(bits=4), "HQQQuantConfig"),
            (QuantoConfig, lambda: QuantoConfig(weights="int8"), "RTNQuantConfig"),
            (FbgemmFp8Config, FbgemmFp8Config, "RTNQuantConfig"),
            (FineGrainedFP8Config, FineGrainedFP8Config, "RTNQuantConfig"),
        )
    ),
    Case(
        name="backend-asks-for-nothing",
        provoke=of_id(BitsAndBytesConfig),
        code="HFC202",
        words=("no bits", "load_in_4bit=True"),
    ),
    Case(
        name="backend-unknown-type",
        provoke=of_id(lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf3")),
        code="HFC202",
        words=("'nf3'", "nf4"),
    ),
    Case(
        name="backend-data",
        provoke=of_id(four, calibration=TEXTS),
        code="HFC501",
        words=("BitsAndBytesConfig", "calibration"),
    ),
    Case(
        name="backend-minimum",
        provoke=of_id(four, min_coverage=90),
        code="HFC202",
        words=("min_coverage is 90", "0 to 1"),
    ),
    Case(
        name="backend-minimum-of-ours",
        provoke=of_id(hfc.RTNQuantConfig, min_coverage=0.5),
        code="HFC202",
        words=("field of RTNQuantConfig", "RTNQuantConfig(min_coverage=0.5)"),
    ),
    Case(
        name="backend-conv1d",
        provoke=of_id(rounded, "gpt2"),
        code="HFC101",
        words=("0 of 11", "torchao does not handle Conv1D", "RTNQuantConfig"),
    ),
    Case(
        name="backend-experts",
        provoke=of_id(four, "qwen3-moe"),
        code="HFC102",
        words=("11.1%", "bitsandbytes skips fused experts", "RTNQuantConfig", "min_coverage=0.11"),
    ),
    Case(
        name="backend-float32",
        provoke=of_id(four, "t5"),
        code="HFC102",
        words=("80.0%", "keeps it in float32", "min_coverage=0.8"),
    ),
    Case(
        name="backend-skip-typo",
        provoke=of_id(lambda: four(llm_int8_skip_modules=["lm_haed"])),
        code="HFC201",
        words=("'lm_haed'", "llm_int8_skip_modules", "'lm_head'"),
    ),
    Case(
        name="backend-skip-our-syntax",
        provoke=of_id(lambda: rounded(modules_to_not_convert=["re:.*k_proj"])),
        code="HFC201",
        words=("'re:.*k_proj'", "modules_to_not_convert", "without re:"),
    ),
    Case(
        name="backend-skip-part-of-a-name",
        provoke=of_id(lambda: rounded(modules_to_not_convert=["k_proj"])),
        code="HFC201",
        words=("'k_proj'", "whole parameter names", "modules_to_not_convert=['.*k_proj']"),
    ),
    Case(
        name="backend-skip-no-pattern",
        provoke=of_id(lambda: four(llm_int8_skip_modules=["(q_proj"])),
        code="HFC201",
        words=("'(q_proj'", "regular expression"),
    ),
    Case(
        name="backend-one-side-of-a-tie",
        provoke=of_id(lambda: four(llm_int8_skip_modules=["k_proj"]), "llama-tied", min_coverage=0.5),
        code="HFC404",
        words=("lm_head", "model.embed_tokens", "llm_int8_skip_modules"),
    ),
    Case(
        name="backend-machine",
        provoke=of_id(lambda: TorchAoConfig(Int4WeightOnlyConfig())),
        code="HFC301",
        words=("torchao", "mslk", "RTNQuantConfig"),
    ),
    Case(
        name="backend-missing-weight",
        provoke=_without,
        code="HFC407",
        words=("model.layers.1.mlp.down_proj.weight", "random"),
    ),
    Case(name="backend-cut-file", provoke=_cut, code="HFC702", words=("damaged",)),
)
