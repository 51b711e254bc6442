"""Failures of models: what is passed, what is on disk, what the weights hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from tests._utils.tiny import tiny

from .error_cases import Act, Arena, Case, edit_json, edit_weights, poison, weights_of

LAYER = "model.layers.1.mlp.down_proj.weight"
"""A weight that is quantized."""

NOT_MODELS = (("none", None), ("number", 42), ("dict", {"weight": torch.zeros(2, 2)}), ("class", nn.Linear))


def rtn(**fields: Any) -> hfc.RTNQuantConfig:
    return hfc.RTNQuantConfig(**fields)


def of_id(prepare: Callable[[Arena], Any], entry: str = "quantize", make: Callable[[], Any] = rtn) -> Any:
    """A row's call: an entry point with the id that is prepared."""

    def provoke(arena: Arena) -> Act:
        model_id, config = prepare(arena), make()
        return lambda: getattr(hfc, entry)(model_id, config)

    return provoke


def of_live(prepare: Callable[[Arena], Any], make: Callable[[], Any] = rtn, **options: Any) -> Any:
    """A row's call: quantizing the live model that is prepared."""

    def provoke(arena: Arena) -> Act:
        model, config = prepare(arena), make()
        return lambda: hfc.quantize(model, config, **options)

    return provoke


def stock(prepare: Callable[[Arena], Any], make: Callable[[], Any] = rtn, **options: Any) -> Any:
    """A row's call: transformers' `from_pretrained` with our configuration."""

    def provoke(arena: Arena) -> Act:
        path, config = prepare(arena), make()
        return lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options)

    return provoke


def with_config(family: str = "llama", **values: Any) -> Callable[[Arena], Path]:
    """A dense directory whose config.json says something else; None removes a key."""

    def change(config: dict[str, Any]) -> None:
        config.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del config[name]

    return lambda arena: edit_json(arena.dense(family) / "config.json", change).parent


def with_text(text: str | bytes) -> Callable[[Arena], Path]:
    """A dense directory whose config.json holds this."""

    def prepare(arena: Arena) -> Path:
        folder = arena.dense()
        (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
        return folder

    return prepare


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Arena], Path]:
    """A dense directory with other weights."""
    return lambda arena: edit_weights(arena.dense(), change)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER][3, 5] = float("nan")


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER] = torch.empty(0, 128)


def _other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER] = torch.ones(64, 64)


def _shards_with_nan(arena: Arena) -> Path:
    path = arena.folder / "shards"
    poison(tiny("llama")).save_pretrained(path, max_shard_size="100KB")
    if len(list(path.glob("*.safetensors"))) < 2:
        raise RuntimeError("one shard only")
    return path


def _truncated(arena: Arena) -> Path:
    folder = arena.dense()
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def _without_weights(arena: Arena) -> Path:
    folder = arena.dense()
    weights_of(folder).unlink()
    return folder


def _folder(arena: Arena) -> Path:
    (arena.folder / "empty").mkdir()
    return arena.folder / "empty"


def _file(arena: Arena) -> Path:
    (arena.folder / "file").write_text("x")
    return arena.folder / "file"


def _without_values(arena: Arena) -> Any:
    model = arena.live()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.empty(0, 128))
    return model


def _inf(arena: Arena) -> Any:
    return poison(arena.live(), float("inf"))


def _overflowing(arena: Arena) -> Any:
    return poison(arena.live(), 1e6)


def _meta(arena: Arena) -> Any:
    return arena.watch(tiny("llama").to("meta"))


def _stock_model(arena: Arena) -> Any:
    """As after a stock load of a quantized checkpoint, whose first one costs ten seconds."""
    model = arena.live()
    vars(model)["hf_quantizer"] = object()
    return model


def _foreign(arena: Arena) -> Path:
    """A compressed-tensors directory without a trace of us."""
    folder = arena.checkpoint()
    (folder / "hf_compress.json").unlink()
    return folder


def _optimize(prepare: Callable[[Arena], Any]) -> Any:
    def provoke(arena: Arena) -> Act:
        model = prepare(arena)
        return lambda: hfc.optimize_for_inference(model)

    return provoke


def _fp16() -> hfc.CastConfig:
    return hfc.CastConfig(dtype="fp16")


BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}
OURS = {"quant_method": "hf_compress"}

CASES = (
    # Not a model.
    *(
        Case(
            name=f"{entry}-{name}",
            provoke=of_id(lambda arena, given=given: given, entry),
            code="HFC403",
            words=("Expected a model", type(given).__name__),
        )
        for entry in ("plan", "quantize", "preflight")
        for name, given in NOT_MODELS
    ),
    *(
        Case(
            name=f"optimize-{name}",
            provoke=_optimize(lambda arena, given=given: given),
            code="HFC403",
            words=(type(given).__name__,),
        )
        for name, given in (*NOT_MODELS, ("path", "some/path"))
    ),
    Case(
        name="optimize-dense",
        provoke=_optimize(lambda arena: arena.live()),
        code="HFC403",
        words=("LlamaForCausalLM", "hf_compress.quantize"),
    ),
    # Not there.
    Case(name="id-unknown", provoke=of_id(lambda arena: "no/such-model"), code="HFC406", words=("no/such-model",)),
    Case(name="id-empty", provoke=of_id(lambda arena: ""), code="HFC406", words=("''",)),
    Case(name="id-nonsense", provoke=of_id(lambda arena: "a b//c\0"), code="HFC406", words=("a b//c",)),
    Case(name="id-plan", provoke=of_id(lambda arena: "no/such-model", "plan"), code="HFC406", words=("no/such",)),
    Case(name="id-preflight", provoke=of_id(lambda a: "no/such-model", "preflight"), code="HFC406", words=("no/su",)),
    Case(name="path-missing", provoke=of_id(lambda arena: arena.folder / "none"), code="HFC406", words=("none",)),
    Case(name="path-empty", provoke=of_id(_folder), code="HFC406", words=("empty", "config.json")),
    Case(name="path-a-file", provoke=of_id(_file), code="HFC406", words=("file", "config.json")),
    Case(name="config-not-json", provoke=of_id(with_text("{")), code="HFC406", words=("llama", "JSON")),
    Case(name="config-not-text", provoke=of_id(with_text(b"\xff\xfe{}")), code="HFC406", words=("llama",)),
    Case(name="config-a-list", provoke=of_id(with_text("[1]")), code="HFC406", words=("llama",)),
    Case(name="config-no-type", provoke=of_id(with_config(model_type=None)), code="HFC406", words=("model_type",)),
    Case(name="config-other-type", provoke=of_id(with_config(model_type="fooo")), code="HFC406", words=("fooo",)),
    Case(name="config-bad-width", provoke=of_id(with_config(hidden_size="64")), code="HFC406", words=("hidden_size",)),
    Case(name="config-negative", provoke=of_id(with_config(hidden_size=-64)), code="HFC403", words=("LlamaFor",)),
    Case(name="weights-not-there", provoke=of_id(_without_weights), code="HFC406", words=("llama", "safetensors")),
    # Architectures.
    Case(
        name="architecture-unknown",
        provoke=of_id(with_config(architectures=["FooForCausalLM"])),
        code="HFC403",
        words=("FooForCausalLM", "transformers"),
    ),
    Case(
        name="architecture-none",
        provoke=of_id(with_config(architectures=None)),
        code="HFC403",
        words=("architectures None", "LlamaConfig", "pass it"),
    ),
    Case(name="architecture-a-number", provoke=of_id(with_config(architectures=[42])), code="HFC403", words=("42",)),
    Case(
        name="architecture-a-function",
        provoke=of_id(with_config(architectures=["pipeline"])),
        code="HFC403",
        words=("pipeline",),
    ),
    Case(
        name="architecture-abstract",
        provoke=of_id(with_config(architectures=["PreTrainedModel"])),
        code="HFC403",
        words=("PreTrainedModel",),
    ),
    Case(
        name="architecture-of-other-config",
        provoke=of_id(with_config(architectures=["GPT2LMHeadModel"]), "plan"),
        code="HFC403",
        words=("GPT2LMHeadModel",),
    ),
    # Quantized already.
    Case(
        name="twice-live",
        provoke=of_live(lambda arena: arena.packed()),
        code="HFC405",
        words=("LlamaForCausalLM", "already", "original"),
    ),
    Case(name="twice-stock-live", provoke=of_live(_stock_model), code="HFC405", words=("already",)),
    Case(name="twice-ours", provoke=of_id(lambda arena: arena.checkpoint()), code="HFC405", words=("already",)),
    Case(name="twice-guarded", provoke=of_id(lambda a: a.checkpoint("gpt2")), code="HFC405", words=("already",)),
    Case(name="twice-compressed-tensors", provoke=of_id(_foreign), code="HFC405", words=("already", "original")),
    Case(
        name="twice-bitsandbytes",
        provoke=of_id(with_config(quantization_config=BNB), "plan"),
        code="HFC405",
        words=("already", "llama"),
    ),
    Case(
        name="twice-named-ours",
        provoke=of_id(with_config(quantization_config=OURS)),
        code="HFC405",
        words=("already",),
    ),
    # Values.
    Case(
        name="nan-live",
        provoke=of_live(lambda arena: poison(arena.live())),
        code="HFC402",
        words=("1 NaN", "down_proj", "Nothing was changed", "skip="),
    ),
    Case(name="inf-live", provoke=of_live(_inf), code="HFC402", words=("1 infinite", "down_proj")),
    Case(
        name="inf-int8-dynamic",
        provoke=of_live(_inf, lambda: hfc.Int8DynamicQuantConfig()),
        code="HFC402",
        words=("1 infinite", "down_proj"),
    ),
    Case(name="empty-live", provoke=of_live(_without_values), code="HFC402", words=("no values", "down_proj")),
    Case(name="meta-live", provoke=of_live(_meta), code="HFC403", words=("meta",)),
    Case(name="nan-id", provoke=of_id(with_weights(_nan)), code="HFC402", words=("1 NaN", "down_proj")),
    Case(name="nan-shard", provoke=of_id(_shards_with_nan), code="HFC402", words=("1 NaN", "down_proj")),
    Case(name="nan-stock", provoke=stock(with_weights(_nan)), code="HFC402", words=("1 NaN", "down_proj")),
    Case(
        name="overflow-live",
        provoke=of_live(_overflowing, _fp16),
        code="HFC402",
        words=("down_proj", "float16", 'dtype="bf16"'),
    ),
    Case(
        name="overflow-id",
        provoke=of_id(with_weights(lambda tensors: tensors[LAYER].fill_(1e6)), make=_fp16),
        code="HFC402",
        words=("down_proj", "float16"),
    ),
    Case(
        name="overflow-stock",
        provoke=stock(with_weights(lambda tensors: tensors[LAYER].fill_(1e6)), _fp16),
        code="HFC402",
        words=("down_proj", "float16"),
    ),
    # Weights that are missing or of another shape.
    Case(
        name="missing-id",
        provoke=of_id(with_weights(lambda tensors: tensors.pop(LAYER))),
        code="HFC407",
        words=("down_proj", "random"),
    ),
    Case(
        name="missing-stock",
        provoke=stock(with_weights(lambda tensors: tensors.pop(LAYER))),
        code="HFC407",
        words=("1 planned", "down_proj"),
    ),
    Case(
        name="missing-kept-id",
        provoke=of_id(with_weights(lambda tensors: tensors.pop("lm_head.weight"))),
        code="HFC407",
        words=("lm_head", "random"),
    ),
    Case(name="empty-id", provoke=of_id(with_weights(_empty)), code="HFC407", words=("(0, 128)", "down_proj")),
    Case(name="shape-id", provoke=of_id(with_weights(_other_shape)), code="HFC407", words=("down_proj", "64")),
    Case(name="shape-stock", provoke=stock(with_weights(_other_shape)), code="HFC407", words=("down_proj", "64")),
    Case(name="truncated-id", provoke=of_id(_truncated), code="HFC702", words=("llama", "damaged")),
    # Loading options of transformers.
    Case(
        name="stock-disk",
        provoke=stock(lambda arena: arena.dense(), device_map={"": "disk"}),
        code="HFC303",
        words=("disk", 'device_map="cpu"'),
    ),
    Case(
        name="stock-disk-some",
        provoke=stock(
            lambda arena: arena.dense(), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder="offload"
        ),
        code="HFC303",
        words=("disk",),
    ),
    Case(
        name="stock-pattern",
        provoke=stock(lambda arena: arena.dense(), lambda: rtn(skip=["lm_haed"])),
        code="HFC201",
        words=("lm_haed", "lm_head"),
    ),
    Case(
        name="stock-group-size",
        provoke=stock(lambda arena: arena.dense(), lambda: rtn(group_size=48)),
        code="HFC401",
        words=("group_size=48",),
    ),
    Case(
        name="stock-dict-key",
        provoke=stock(lambda arena: arena.dense(), lambda: {**OURS, "method": "rtn", "bit": 4}),
        code="HFC202",
        words=("'bit'", "'bits'"),
    ),
    Case(
        name="stock-dict-no-method",
        provoke=stock(lambda arena: arena.dense(), lambda: dict(OURS)),
        code="HFC202",
        words=("'method'",),
    ),
    Case(
        name="stock-named-ours",
        provoke=lambda arena: (lambda path: lambda: AutoModelForCausalLM.from_pretrained(path))(
            with_config(quantization_config={**OURS, "method": "rtn"})(arena)
        ),
        code="HFC702",
        words=("'hf_compress'", "never writes"),
    ),
    Case(
        name="progress-no-function",
        provoke=of_live(lambda arena: arena.live(), progress=42),
        code="HFC202",
        words=("progress", "int"),
    ),
)
