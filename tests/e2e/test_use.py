"""What users do with a compressed model and with its stock reload."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.modules.swap import packed_modules
from tests._utils.tiny import FAMILIES, output, tiny, tiny_dir, tiny_inputs, tiny_tokenizer
from tests.conformance.helpers import plan_of, quantized, reference_logits, relative, same_states, stock_logits

INT4 = {"bits": 4, "group_size": 32}
CONFIGS = {"int4": lambda: hfc.RTNQuantConfig(**INT4), "w8a8": hfc.Int8DynamicQuantConfig}
TEXTS = ["compress it", "and prove what it cost!"]


@pytest.mark.touches_rng  # transformers' pipeline does
def test_pipeline_on_both_models(tmp_path: Path) -> None:
    model = quantized("bert-classifier", tiny_dir("bert-classifier", tmp_path), hfc.RTNQuantConfig(**INT4))
    tokenizer = tiny_tokenizer()
    mine = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    stock = pipeline("text-classification", model=str(tmp_path / "out"))(TEXTS)
    assert len(mine) == 2
    assert mine == stock
    assert all(answer["label"].startswith("LABEL_") and 0 < answer["score"] < 1 for answer in mine)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_device_map(device_map: Any, config: Any, tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(path, quantization_config=config(), device_map=device_map).cpu()
    plain = AutoModelForCausalLM.from_pretrained(path, quantization_config=config())
    assert same_states(placed, plain)
    inputs = tiny_inputs(plain)
    assert torch.equal(reference_logits(placed, inputs), reference_logits(plain, inputs))
    placed.save_pretrained(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device_map).cpu()
    assert relative(output(stock, inputs), reference_logits(plain, inputs)) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dtype_request(config: Any, worker: CleanWorker, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir("llama", tmp_path), quantization_config=config(), dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert {row.dtype for row in plan_of(model).rows} == {"bfloat16"}
    assert hfc.save(model, tmp_path / "out", worker=worker).level == "full"
    inputs = tiny_inputs(model)
    found = stock_logits(worker, tmp_path / "out", model, inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(reference_logits(hfc.load(tmp_path / "out"), inputs), reference_logits(model, inputs))


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "bert-classifier"])
def test_shards(family: str, worker: CleanWorker, tmp_path: Path) -> None:
    """From shards, and into shards."""
    tiny(family).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    whole = quantized(family, tiny_dir(family, tmp_path), hfc.RTNQuantConfig(**INT4))
    model = quantized(family, tmp_path / "source", hfc.RTNQuantConfig(**INT4))
    assert same_states(model, whole)
    out = tmp_path / "out"
    model.save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").is_file()
    inputs = tiny_inputs(model)
    expected = reference_logits(model, inputs)
    assert torch.equal(stock_logits(worker, out, model, inputs), expected)
    assert torch.equal(reference_logits(hfc.load(out), inputs), expected)
    assert hfc.verify(out, worker=worker).level == "full"


def test_guarded_model_ignores_a_shard_size(tmp_path: Path) -> None:
    model = quantized("gpt2", tiny_dir("gpt2", tmp_path), hfc.RTNQuantConfig(**INT4))
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors*"))
    assert names == ["hf_compress.safetensors"]
    inputs = tiny_inputs(model)
    assert torch.equal(reference_logits(hfc.load(tmp_path / "out"), inputs), reference_logits(model, inputs))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tied_weights_stay_tied(config: Any, worker: CleanWorker, tmp_path: Path) -> None:
    model = quantized("llama-tied", tiny_dir("llama-tied", tmp_path), config())
    hfc.save(model, tmp_path / "out", worker=worker)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one in (model, hfc.load(tmp_path / "out"), stock):
        assert one.lm_head.weight is one.model.embed_tokens.weight


def test_config_as_dictionary(tmp_path: Path) -> None:
    path = tiny_dir("bert-classifier", tmp_path)
    wanted = hfc.RTNQuantConfig(**INT4, skip=["bert.encoder.layer.0.attention"], min_coverage=0.5)
    given = {"quant_method": "hf_compress", "method": "rtn", **INT4}
    given |= {"skip": ["bert.encoder.layer.0.attention"], "min_coverage": 0.5}
    kind = AutoModelForSequenceClassification
    first = kind.from_pretrained(path, quantization_config=wanted)
    assert same_states(kind.from_pretrained(path, quantization_config=given), first)
    assert same_states(kind.from_pretrained(path, quantization_config=wanted.to_dict()), first)
    assert wanted.skip == ("bert.encoder.layer.0.attention",)


@pytest.mark.parametrize("family", ["bert-classifier", "llama", "gpt2"])
def test_stock_or_our_reload_in_the_same_process(family: str, tmp_path: Path) -> None:
    """Our registration leaves native checkpoints to transformers, and the guard holds beside us too."""
    model = quantized(family, tiny_dir(family, tmp_path), hfc.RTNQuantConfig(**INT4))
    model.save_pretrained(tmp_path / "out")
    kind = getattr(transformers, FAMILIES[family][0])
    if family == "gpt2":
        with pytest.raises((OSError, ValueError)):
            kind.from_pretrained(tmp_path / "out")
        return
    stock = kind.from_pretrained(tmp_path / "out").eval()
    assert type(stock.hf_quantizer).__module__.startswith("transformers.")
    assert not list(packed_modules(stock))
    inputs = tiny_inputs(model)
    assert torch.equal(output(stock, inputs), reference_logits(model, inputs))


def dense_copy(family: str, model: Any) -> Any:
    """A stock model of dense parameters with the dequantized weights."""
    dense = tiny(family)
    values = {name: value for name, value in model.state_dict().items() if name in dense.state_dict()}
    for row in plan_of(model).quantized:
        values[row.key] = getattr(model.get_submodule(row.module), row.parameter) + 0
    dense.load_state_dict(values)
    return dense


@pytest.mark.touches_rng
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "qwen3-moe"])
def test_generate(family: str) -> None:
    """With the cache: the tokens of a dense model of the dequantized weights, greedy and sampled."""
    model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(**INT4))
    dense = dense_copy(family, model)
    ids = torch.tensor([[7, 23, 11, 5], [9, 31, 6, 8]])
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "use_cache": False}):
        made = []
        for one in (model, dense):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made.append(one.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options))
        assert torch.equal(*made), options
    assert made[0].shape[1] > 1


@pytest.mark.parametrize("family", ["llama", "bert-classifier", "gpt2", "qwen3-moe", "t5"])
def test_dequantize_gives_a_dense_model_that_stock_reloads(family: str, worker: CleanWorker, tmp_path: Path) -> None:
    model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(**INT4))
    inputs = tiny_inputs(model)
    before, expected = reference_logits(model, inputs), dense_copy(family, model)
    dense = model.dequantize()
    assert not list(packed_modules(dense))
    assert vars(dense).get("hf_quantizer") is None
    assert "quantization_config" not in vars(dense.config)
    assert same_states(dense, expected)
    assert torch.equal(output(dense, inputs), output(expected, inputs))
    assert relative(output(dense, inputs), before) <= 1e-5
    dense.save_pretrained(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(stock_logits(worker, tmp_path / "out", dense, inputs), output(dense, inputs))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compile(config: Any) -> None:
    """The default backend where a compiler is there, in float accumulation order only."""
    model = hfc.quantize(tiny("bert-classifier", num_hidden_layers=1), config())
    inputs = tiny_inputs(model)
    expected = reference_logits(model, inputs)
    torch.compiler.reset()
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled: Any = torch.compile(model, fullgraph=False, backend=backend)
    assert relative(output(compiled, inputs), expected) <= 1e-5
    assert relative(output(compiled, inputs), expected) <= 1e-5
    torch.compiler.reset()


def test_packed_modules_are_still_linears() -> None:
    """User code, PEFT and `isinstance` keep working."""
    model = hfc.quantize(tiny("bert-classifier"), hfc.RTNQuantConfig(**INT4))
    linear = model.bert.encoder.layer[0].attention.self.query
    assert isinstance(linear, nn.Linear)
    assert type(linear).__name__ == "Linear"
    assert (linear.in_features, linear.weight.shape, linear.weight.dtype) == (64, (64, 64), torch.float32)
    assert torch.equal(linear.weight + 0, linear.weight + 0)
    assert not [name for name, _ in model.named_parameters() if name.endswith("query.weight")]
