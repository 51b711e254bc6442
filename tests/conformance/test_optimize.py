"""A stock reload, optimized by us before or after its first forward, is the model that `hfc.load` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.modules.swap import packed_modules
from tests._utils.tiny import FAMILIES, output, tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    packed_weights,
    quantized,
    reference_logits,
    relative,
    same_states,
    stock_logits,
    tensors_on_disk,
)

CONFIGS = {
    "int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32),
    "int3": lambda: hfc.RTNQuantConfig(bits=3, group_size="channel"),
    "int8": lambda: hfc.RTNQuantConfig(bits=8, group_size=32),
    "tensor": lambda: hfc.RTNQuantConfig(bits=8, group_size="tensor"),
    "w8a8": hfc.Int8DynamicQuantConfig,
    "embeddings": lambda: hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8"),
    "mixed": lambda: hfc.RTNQuantConfig(
        bits=4,
        group_size=32,
        rules=[hfc.Rule(pattern="*down_proj", bits=8), hfc.Rule(pattern="q_proj", keep=True)],
        min_coverage=0.5,
    ),
}
CASES = [
    ("bert-classifier", "int4"),
    ("bert-classifier", "w8a8"),
    ("vit", "w8a8"),
    ("t5", "w8a8"),
    *(("llama", name) for name in CONFIGS),
]


@pytest.mark.parametrize("warm", [False, True], ids=["before a forward", "after a forward"])
@pytest.mark.parametrize(("family", "config"), CASES)
def test_optimized_stock_model(family: str, config: str, warm: bool, worker: CleanWorker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized(family, tiny_dir(family, tmp_path), CONFIGS[config]()).save_pretrained(out)
    stock: Any = getattr(transformers, FAMILIES[family][0]).from_pretrained(out).eval()
    inputs = tiny_inputs(stock)
    if warm:
        output(stock, inputs)
    optimized = hfc.optimize_for_inference(stock)
    assert optimized is stock
    loaded = hfc.load(out)
    assert [name for name, _ in packed_weights(optimized)] == [name for name, _ in packed_weights(loaded)]
    for (name, left), (_, right) in zip(packed_weights(optimized), packed_weights(loaded), strict=True):
        assert torch.equal(left.codes, right.codes), name
        assert torch.equal(left.scale, right.scale), name
        assert torch.equal(left.dense(), right.dense()), name
    assert same_states(optimized, loaded)
    assert torch.equal(reference_logits(optimized, inputs), reference_logits(loaded, inputs))
    assert hfc.inspect(optimized).kernels == hfc.inspect(loaded).kernels
    clean = stock_logits(worker, out, optimized, inputs)
    assert relative(reference_logits(optimized, inputs), clean) <= (1e-5 if config == "w8a8" else 0.0)


@pytest.mark.parametrize("warm", [False, True], ids=["before a forward", "after a forward"])
@pytest.mark.parametrize("config", ["int4", "w8a8"])
def test_optimized_stock_model_saves_the_same_tensors(
    config: str, warm: bool, worker: CleanWorker, tmp_path: Path
) -> None:
    quantized("llama", tiny_dir("llama", tmp_path), CONFIGS[config]()).save_pretrained(tmp_path / "out")
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    if warm:
        output(stock, tiny_inputs(stock))
    assert hfc.save(hfc.optimize_for_inference(stock), tmp_path / "again", worker=worker).level == "full"
    first, second = tensors_on_disk(tmp_path / "out"), tensors_on_disk(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_optimizing_is_idempotent(tmp_path: Path) -> None:
    quantized("llama", tiny_dir("llama", tmp_path), CONFIGS["int4"]()).save_pretrained(tmp_path / "out")
    model = hfc.optimize_for_inference(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    inputs = tiny_inputs(model)
    first = output(model, inputs)
    assert torch.equal(output(hfc.optimize_for_inference(model), inputs), first)
    assert len(list(packed_modules(model))) == 14


def test_what_is_not_packed_in_memory_is_refused(tmp_path: Path) -> None:
    config = hfc.RTNQuantConfig(bits=4, group_size=32, symmetric=False)
    quantized("llama", tiny_dir("llama", tmp_path), config).save_pretrained(tmp_path / "out")
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(hfc.HFCompressError, match="HFC403"):
        hfc.optimize_for_inference(stock)
    with pytest.raises(hfc.HFCompressError, match="HFC403"):
        hfc.optimize_for_inference(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama"))
