"""Failures of calibration data: refused before a weight is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTImageProcessorPil, Wav2Vec2FeatureExtractor

import hf_compress as hfc
from hf_compress.calibration.data import prepare
from tests._utils.tiny import tiny, tiny_tokenizer

from .error_cases import Act, Arena, Case

LINES = [f"line {number} has a few words" for number in range(40)]
IDS = torch.full((8, 40), 7)


def given(data: Any, family: str = "llama", **options: Any) -> Callable[[Arena], Act]:
    """A row's call: making batches of data, which may be a function of the arena."""

    def provoke(arena: Arena) -> Act:
        model, made = arena.live(family), data(arena) if callable(data) else data
        request = hfc.Calibration(made, **options)
        return lambda: prepare(request, model)

    return provoke


def texts(data: Any, family: str = "llama", **options: Any) -> Callable[[Arena], Act]:
    """The same, with a tokenizer."""
    return given(data, family, tokenizer=tiny_tokenizer(), **options)


def option(**options: Any) -> Callable[[Arena], Act]:
    """A row's call: building a request."""
    return lambda arena: lambda: hfc.Calibration(LINES, **options)


def written(name: str, content: bytes) -> Callable[[Arena], Path]:
    """A file in the arena."""

    def write(arena: Arena) -> Path:
        path = arena.folder / name
        path.write_bytes(content)
        return path

    return write


def case(name: str, provoke: Callable[[Arena], Act], *words: str) -> Case:
    return Case(name=f"calibration-{name}", provoke=provoke, code="HFC501", words=words)


def other(name: str, provoke: Callable[[Arena], Act], *words: str) -> Case:
    return Case(name=f"calibration-{name}", provoke=provoke, code="HFC403", words=words)


def _on_meta(arena: Arena) -> Act:
    model = arena.watch(arena.live().to("meta"))
    return lambda: prepare(hfc.Calibration.generated(), model)


def _broken_tokenizer(arena: Arena) -> Act:
    path = arena.dense("llama")
    (path / "tokenizer.json").write_text("{")
    model = arena.live()
    return lambda: prepare(hfc.Calibration(LINES), model, path)


def _texts_for_a_module(arena: Arena) -> Act:
    model = arena.watch(nn.Sequential(nn.Linear(8, 8)))
    return lambda: prepare(hfc.Calibration(LINES, tokenizer=tiny_tokenizer()), model)


def _no_data(arena: Arena) -> Act:
    model = arena.live("bert")
    return lambda: hfc.quantize(model, hfc.GPTQQuantConfig(bits=4))


def _bad_batch(arena: Arena) -> Act:
    model = arena.live()
    data = [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}]
    return lambda: hfc.quantize(model, hfc.GPTQQuantConfig(bits=4), calibration=data)


def fails(family: str, *changed: dict[str, torch.Tensor], rows: int = 8) -> Callable[[Arena], Act]:
    """A row's call: quantizing with a good batch of ids and others, which hold what is given too."""

    def provoke(arena: Arena) -> Act:
        model = arena.live(family)
        names = (
            [] if any(key in one for one in changed for key in ("pixel_values", "inputs_embeds")) else ["input_ids"]
        )
        data = [{**dict.fromkeys(names, IDS[:rows]), **one} for one in changed]
        request = hfc.GPTQQuantConfig(bits=4, group_size="channel", min_coverage=0.0, format="guarded")
        return lambda: hfc.quantize(model, request, calibration=data)

    return provoke


def smooths(family: str, **changed: torch.Tensor) -> Callable[[Arena], Act]:
    """A row's call: smoothing with a batch of ids and others."""

    def provoke(arena: Arena) -> Act:
        model = arena.live(family)
        return lambda: hfc.smooth(model, [{"input_ids": IDS, **changed}])

    return provoke


def _spectrogram(length: int) -> Callable[[Arena], Act]:
    def provoke(arena: Arena) -> Act:
        model = arena.live("whisper")
        data = [{"input_features": torch.zeros(8, 8, 24), "labels": torch.full((8, length), 7)}]
        return lambda: prepare(hfc.Calibration(data, min_tokens=1), model)

    return provoke


def _wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Arena], Act]:
    """A row's call: planning for a wrapper."""

    def provoke(arena: Arena) -> Act:
        model = arena.watch(wrap(tiny("llama")))
        return lambda: hfc.plan(model, hfc.RTNQuantConfig(min_coverage=0.0))

    return provoke


def _adapted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft's own use of transformers
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


def _adapter_inside(model: nn.Module) -> nn.Module:
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    return model


class _Locked:
    """A hook that can't be copied."""

    def __init__(self) -> None:
        self.lock = Lock()

    def __call__(self, *given: object) -> None:
        return None


def _hooked(arena: Arena) -> Act:
    model = arena.live()
    model.model.layers[0].mlp.register_forward_hook(_Locked())
    return lambda: hfc.quantize(model, hfc.GPTQQuantConfig(bits=4, min_coverage=0.0), calibration=[{"input_ids": IDS}])


MASK = torch.ones_like(IDS)
PADDED = MASK.index_fill(1, torch.arange(30, 40), 0)


def _pixels(value: float) -> list[dict[str, torch.Tensor]]:
    pixels = torch.zeros(8, 3, 16, 16)
    pixels[3, 0, 2, 2] = value
    return [{"pixel_values": pixels}]


CASES = (
    # Requests.
    case("rows", option(rows=0), "rows=0", "rows=8"),
    case("rows-bool", option(rows=True), "rows=True"),
    case("length", option(sequence_length=1), "sequence_length=1"),
    case("pack", option(pack="yes"), "pack='yes'", "pack=True"),
    case("column-type", option(column=3), "column is a int"),
    case("image-size", option(image_size=(16, 0)), "image_size=(16, 0)"),
    case("twice", lambda arena: lambda: hfc.Calibration(hfc.Calibration(LINES)), "Calibration already"),
    # Nothing usable.
    case("empty", given([]), "empty", "calibration=["),
    case("blank", texts(["", "  "] * 5), "0 usable rows", "10 read", "10 without any token"),
    case("all-padding", given([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}]), "is padding"),
    case("all-padding-ids", given([{"input_ids": torch.zeros_like(IDS)}]), "is padding"),
    case("few-rows", texts(["one text", "another"], "bert"), "2 usable rows", "min_rows=8", "min_rows=2"),
    case("few-packed", texts(LINES[:4]), "1 usable rows", "min_rows=8", "sequence_length="),
    case("few-tokens", texts(["one"] * 8, "bert"), "40 tokens", "min_tokens=256", "min_tokens=40"),
    # Files.
    case("file-missing", given("absent.jsonl"), "absent.jsonl", "can't be read"),
    case("file-form", given(Path("texts.docx")), "'texts.docx'", ".parquet"),
    case("one-string", given("a text of its own"), "'a text of its own'", "[text]"),
    case("file-empty", given(written("x.txt", b"\n \n")), "x.txt", "empty"),
    case("file-bytes", given(written("x.txt", b"\xff\xfe\xff")), "x.txt", "can't be read"),
    case("file-json", given(written("x.jsonl", b'{"text": "a"}\n{"text":\n')), "x.jsonl, line 2", "no JSON"),
    case("file-number", given(written("x.jsonl", b"3\n")), "line 1 is a int", '{"text": "..."}'),
    case("file-column", given(written("x.jsonl", b'{"txt": "a"}\n')), "columns txt", 'column="txt"'),
    case("file-parquet", given(written("x.parquet", b"PAR1 is no table")), "x.parquet", "no readable parquet"),
    # Forms.
    case("column", given(Dataset.from_dict({"body": LINES}), column="bodi"), "'bodi'", "'body'"),
    case("splits", given(DatasetDict(train=Dataset.from_dict({"text": LINES}))), "splits train", 'data["train"]'),
    case("number", given(7), "is a int", "calibration=["),
    case("numbers", given([1.5, 2.5]), "is a float"),
    case("nothing", given([None, "a text"]), "is a NoneType", "calibration=["),
    case("texts-for-a-module", _texts_for_a_module, "Sequential reads no tokens", "ready batches"),
    case("mixed", texts([*LINES, {"input_ids": [5, 6]}], rows=64), "mixes", "texts", "token ids"),
    case("half-a-letter", texts(["\ud800 half a letter"] * 8), "half a character"),
    case("no-tensor", given([{"input_ids": IDS, "attention_mask": [[1] * 40] * 8}]), "'attention_mask'", "no tensor"),
    case("no-batch", given({"inputs": [[5, 6]]}), "inputs", 'return_tensors="pt"'),
    case("argument", given([{"pixels": torch.zeros(8, 3, 16, 16)}], "resnet"), "'pixels'", "'pixel_values'"),
    case("mask-length", given([{"input_ids": [5, 6, 7], "attention_mask": [1]}] * 8), "3 tokens", "mask of 1"),
    case("no-template", texts([[{"role": "user", "content": "Hi"}]] * 8), "no chat template", "chat_template="),
    case(
        "template",
        texts([[{"role": "user", "content": "Hi"}]] * 8, chat_template="{{ raise_exception('no system') }}"),
        "no system",
    ),
    # Data and model.
    case("positions", texts(LINES, sequence_length=65), "sequence_length=65", "64 positions", "sequence_length=64"),
    case("long-row", given([[7] * 70] * 8), "70 tokens", "64 positions", "sequence_length=64"),
    case("long-batch", given([{"input_ids": torch.full((8, 70), 7)}]), "70 tokens", "64 positions", "max_length=64"),
    case("vocabulary", given([[5, 6, 128] * 4] * 40), "5 to 128", "128 embeddings", "tokenizer="),
    case("negative-id", given([[5, -6] * 4] * 40), "-6 to 5", "128 embeddings"),
    case("decoder-positions", fails("bart", {"labels": IDS.repeat(1, 2)}), "80 tokens", "64 positions"),
    case("speech-positions", _spectrogram(70), "70 tokens", "32 positions"),
    case("float-ids", fails("llama", {"input_ids": IDS.float()}), "input_ids", "float32", ".long()"),
    case("mask-shape", fails("llama", {"attention_mask": PADDED[:, :39]}), "attention_mask", "[8, 39]", "[8, 40]"),
    case("mask-of-ones", fails("llama", {"attention_mask": MASK[:, :20]}), "attention_mask", "[8, 20]", "[8, 40]"),
    case("mask-rows", fails("llama", {"attention_mask": PADDED[:3]}), "attention_mask", "[3, 40]", "[8, 40]"),
    case("mask-pairs", fails("llama", {"attention_mask": torch.ones(8, 1, 40, 39)}), "[8, 1, 40, 39]", "[8, 40]"),
    case(
        "token-types", fails("bert", {"token_type_ids": torch.full_like(IDS, 7)}), "can't read batch 0", "IndexError"
    ),
    case("later-batch", fails("bert", {}, {"token_type_ids": torch.full_like(IDS, 7)}), "can't read batch 1"),
    case(
        "position-ids", fails("gpt2", {"position_ids": torch.full_like(IDS, 100)}), "can't read batch 0", "IndexError"
    ),
    case("smooth-types", smooths("bert", token_type_ids=torch.full_like(IDS, 7)), "can't read batch 0", "IndexError"),
    case("smooth-positions", smooths("gpt2", position_ids=torch.full_like(IDS, 10_000)), "can't read batch 0"),
    case("smooth-albert", smooths("albert", token_type_ids=torch.full_like(IDS, 7)), "can't read batch 0"),
    case("embeddings", fails("bert", {"inputs_embeds": torch.zeros(8, 80, 64)}), "inputs_embeds [8, 80, 64] float32"),
    case("image-shape", fails("vit", {"pixel_values": torch.zeros(8, 3, 20, 20)}), "can't read batch 0", "20*20"),
    case("channels", fails("resnet", {"pixel_values": torch.zeros(8, 1, 32, 32)}), "can't read batch 0", "[8, 1, 32"),
    case("nan", given(_pixels(float("nan")), "vit"), "pixel_values of batch 0", "not finite"),
    case("infinite", given(_pixels(float("inf")), "vit"), "pixel_values of batch 0", "not finite"),
    case("texts-for-images", texts(LINES, "vit"), "reads no tokens", "images"),
    case("no-tokenizer", given(LINES), "needs a tokenizer", "AutoTokenizer"),
    case("wrong-processor", given(LINES, tokenizer=ViTImageProcessorPil()), "ViTImageProcessorPil", "AutoTokenizer"),
    case("broken-tokenizer", _broken_tokenizer, "can't be read", "AutoTokenizer"),
    case(
        "no-image", given([np.zeros((2, 2, 2, 2, 2))] * 8, "vit", tokenizer=ViTImageProcessorPil()), "refuses item 0"
    ),
    case(
        "rate",
        given([{"array": np.zeros(400), "sampling_rate": 8000}] * 8, "wav2vec2", tokenizer=Wav2Vec2FeatureExtractor()),
        "8000 Hz",
        "16000 Hz",
    ),
    case("no-default", given(None, "vit"), "no language model", "calibration=["),
    case("none-for-an-encoder", _no_data, "BertModel has no default", "calibration=["),
    case("padding-through-quantize", _bad_batch, "every row is padding", "attention_mask"),
    # Data that the model makes.
    case("generated-on-meta", _on_meta, "on the meta device", "load the model"),
    case("generated-by-encoder", given("generated", "bert"), "can't make its own", "calibration=["),
    case("generated-size", given("generated", "resnet"), "size of the images", "image_size=224"),
    # Models that are in something else.
    other("compiled", _wrapped(torch.compile), "OptimizedModule", "._orig_mod"),
    other("parallel", _wrapped(nn.DataParallel), "DataParallel", ".module"),
    other("adapted", _wrapped(_adapted), "PeftModel", "merge_and_unload()"),
    other("adapter-inside", _wrapped(_adapter_inside), "LlamaForCausalLM", "adapter", "q_proj"),
    other("hook", _hooked, "model.layers.0", "can't be copied", "hook"),
)
