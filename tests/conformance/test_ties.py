"""Tied weights: quantized once for all modules that share them, in memory and on disk, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.apply.packing import pack_weight
from hf_compress.checkpoint.session import LoadSession
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import TiedWeightsError
from hf_compress.evaluation.size import resident_bytes
from hf_compress.modules.swap import packed_tensor
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    plan_of,
    quantized,
    reference_logits,
    relative,
    same_states,
    stock_logits,
    tensors_on_disk,
)

CONFIGS = {
    "int4": lambda **options: hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8", **options),
    "w8a8": lambda **options: hfc.Int8DynamicQuantConfig(embeddings="int8", **options),
}
TABLES = {
    "llama-tied": ("lm_head", "model.embed_tokens"),
    "bert-mlm": ("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    "t5": ("lm_head", "shared"),
    "bart": ("lm_head", "model.shared"),
    "whisper": ("proj_out", "model.decoder.embed_tokens"),
    "gpt2": ("lm_head", "transformer.wte"),
}


def buffers(model: torch.nn.Module, path: str) -> list[torch.Tensor]:
    packed = packed_tensor(model.get_submodule(path), "weight")
    return [packed.codes, packed.scale]


def one_memory(model: torch.nn.Module, head: str, table: str) -> bool:
    pairs = zip(buffers(model, head), buffers(model, table), strict=True)
    return all(left is right for left, right in pairs)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", TABLES)
def test_quantized_ties_reload_in_stock(family: str, method: str, worker: CleanWorker, tmp_path: Path) -> None:
    head, table = TABLES[family]
    # Stock must dequantize 4-bit T5 while loading, and then reads one scheme only.
    guarded = family == "gpt2" or (family, method) == ("t5", "int4")
    options = {"format": "guarded"} if guarded else {}
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[method](**options))
    inputs, limit = tiny_inputs(model), 1e-5 if method == "w8a8" else 0.0
    assert one_memory(model, head, table)
    rows = {row.name: row for row in plan_of(model).rows}
    assert rows[head].quantization == rows[table].quantization
    assert rows[head].parameters == rows[head].planned_bytes == 0
    assert rows[head].sqnr_db == rows[table].sqnr_db

    out = tmp_path / "out"
    assert hfc.save(model, out, worker=worker).level == "full"
    expected = reference_logits(model, inputs)
    if not guarded:
        assert relative(stock_logits(worker, out, model, inputs), expected) <= limit
    tensors = tensors_on_disk(out)
    big = [name for name, value in tensors.items() if value.shape == buffers(model, table)[0].shape]
    assert [name for name in big if head in name or table in name] == [name for name in big if table in name]
    loaded = hfc.load(out)
    assert one_memory(loaded, head, table)
    assert torch.equal(reference_logits(loaded, inputs), expected)
    assert same_states(loaded, model)


def test_live_model_gives_the_same(tmp_path: Path) -> None:
    live = hfc.quantize(tiny("llama-tied"), CONFIGS["int4"]())
    read = quantized("llama-tied", tiny_dir("llama-tied", tmp_path), CONFIGS["int4"]())
    assert same_states(live, read)
    assert plan_of(live).rows == plan_of(read).rows
    assert one_memory(live, *TABLES["llama-tied"])


def test_memory_and_copies() -> None:
    """One packed weight, also after a copy, a cast and a move through another device."""
    model = hfc.quantize(tiny("llama-tied"), CONFIGS["int4"]())
    dense = hfc.quantize(tiny("llama"), CONFIGS["int4"](skip=["lm_head"]))
    assert resident_bytes(dense) - resident_bytes(model) == 128 * 64 * 4
    names = TABLES["llama-tied"]
    twin = copy.deepcopy(model)
    assert one_memory(twin, *names)
    assert buffers(twin, names[0])[0] is not buffers(model, names[0])[0]
    assert one_memory(copy.deepcopy(model).to(torch.bfloat16), *names)
    assert one_memory(copy.deepcopy(model).to("meta"), *names)
    inputs = tiny_inputs(model)
    assert torch.equal(output(twin, inputs), output(model, inputs))


def test_head_and_table_have_the_same_values() -> None:
    model = hfc.quantize(tiny("llama-tied"), CONFIGS["int4"]())
    inputs = tiny_inputs(model)
    dense = model.lm_head.weight.clone()
    assert torch.equal(dense, model.model.embed_tokens.weight.clone())
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
    assert torch.equal(output(model, inputs), torch.nn.functional.linear(hidden, dense))
    assert torch.equal(model.model.embed_tokens(inputs["input_ids"]), dense[inputs["input_ids"]])


def test_dequantized_is_tied_again() -> None:
    model = hfc.quantize(tiny("llama-tied"), CONFIGS["int4"]())
    inputs = tiny_inputs(model)
    expected = output(model, inputs)
    model.tie_weights()  # nothing to do, and no error
    assert torch.equal(output(model, inputs), expected)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(output(model, inputs), expected)
    assert model.all_tied_weights_keys == tiny("llama-tied").all_tied_weights_keys


@pytest.mark.parametrize(
    "options",
    [{"skip": ["lm_head"]}, {"skip": ["embed_tokens"]}, {"rules": [{"pattern": "lm_head", "keep": False, "bits": 4}]}],
    ids=str,
)
def test_one_side_alone_is_refused_and_nothing_changes(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama-tied")
    if options.get("skip") == ["embed_tokens"]:
        options = {**options, "rules": [{"pattern": "lm_head", "keep": False}]}
    with pytest.raises(TiedWeightsError, match="HFC404"):
        hfc.quantize(model, CONFIGS["int4"](**options))
    assert same_states(model, tiny("llama-tied"))
    with pytest.raises(TiedWeightsError, match="HFC404"):
        AutoModelForCausalLM.from_pretrained(
            tiny_dir("llama-tied", tmp_path), quantization_config=CONFIGS["int4"](**options)
        )


def test_guarded_form_holds_ties_of_any_scheme(worker: CleanWorker, tmp_path: Path) -> None:
    """Stock has a place for int8 ties only: a 4-bit one of linear layers needs the guarded form."""

    def model() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        made[2].weight = made[0].weight
        return made

    packed = hfc.quantize(model(), hfc.RTNQuantConfig(bits=4, group_size=32))
    assert one_memory(packed, "0", "2")
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    proof = hfc.save(packed, tmp_path / "out", inputs=[{"input": inputs}], worker=worker)
    assert proof.level == "own-reader"
    assert sorted(tensors_on_disk(tmp_path / "out")) == ["0.bias", "0.weight_packed", "0.weight_scale", "2.bias"]
    loaded = hfc.load(tmp_path / "out", model=model())
    assert one_memory(loaded, "0", "2")
    assert torch.equal(loaded(inputs), packed(inputs))


def test_checkpoint_whose_tie_is_untrue_is_refused(tmp_path: Path) -> None:
    """Two different weights on disk under a config that ties them: one of them would be lost."""
    path = tiny_dir("llama", tmp_path)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(TiedWeightsError, match="other values"):
        hfc.quantize(path, CONFIGS["int4"]())


@pytest.mark.parametrize("ran", [False, True])
def test_stock_loaded_ties_are_packed_once(ran: bool, tmp_path: Path) -> None:
    model = hfc.quantize(tiny("llama-tied"), CONFIGS["int4"]())
    model.save_pretrained(tmp_path / "out")
    stock, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tiny_inputs(model)
    if ran:
        output(stock, inputs)
    packed = hfc.optimize_for_inference(stock)
    assert one_memory(packed, *TABLES["llama-tied"])
    assert torch.equal(output(packed, inputs), output(model, inputs))
    packed.save_pretrained(tmp_path / "again")
    assert same_states(hfc.load(tmp_path / "again"), model)


@pytest.mark.parametrize("order", [("model.embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_untrue_tie_names_both_whatever_arrives_first(order: tuple[str, str], factor: float) -> None:
    """Twice the values have the same codes; their scales alone tell them apart."""
    model = tiny("llama-tied")
    table = model.model.embed_tokens.weight.detach().clone()
    session = LoadSession(hfc.plan(model, CONFIGS["int4"]()), lambda row, value: pack_weight(row, value, "rtn"))
    first, second = order
    session.receive(model, f"{first}.weight", table)
    assert one_memory(model, first, second)
    session.receive(model, f"{second}.weight", table * factor)
    if factor == 1.0:
        assert session.failures == []
        return
    (failure,) = session.failures
    assert isinstance(failure, TiedWeightsError)
    assert f"other values for {second} than for {first}" in failure.message
    assert f'skip=["{second}", "{first}"]' in failure.fix
