"""All the ways to save write the same bytes, before and after a forward, and every reader agrees on them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from tests._utils.tiny import FAMILIES, output, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    hashes,
    metadata,
    plan_of,
    quantized,
    reference_logits,
    relative,
    same_states,
    stock_logits,
    tensors_on_disk,
)

CONFIGS = {
    "int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32),
    "w8a8": hfc.Int8DynamicQuantConfig,
    "asymmetric": lambda: hfc.RTNQuantConfig(bits=4, group_size=32, symmetric=False),
}
CASES = [
    ("bert-classifier", "int4"),
    ("bert-classifier", "w8a8"),
    ("llama-tied", "int4"),
    ("llama", "w8a8"),
    ("llama", "asymmetric"),
    ("t5", "int4"),
    ("qwen3-moe", "int4"),
    ("qwen3-moe", "w8a8"),
    ("gpt2", "int4"),
]
"""Every storage: packed, int8, dequantized by stock, experts apart, guarded."""


def stock_in_this_process(path: Path, family: str) -> PreTrainedModel:
    """A stock reload beside us: our import must not change what transformers does with a native checkpoint."""
    model: PreTrainedModel = getattr(transformers, FAMILIES[family][0]).from_pretrained(path)
    return model.eval()


@pytest.mark.parametrize(("family", "config"), CASES)
def test_a_forward_changes_no_byte(family: str, config: str, worker: CleanWorker, tmp_path: Path) -> None:
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[config]())
    hfc.save(model, tmp_path / "before", worker=worker)
    output(model, tiny_inputs(model))
    hfc.save(model, tmp_path / "after", worker=worker)
    before, after = hashes(tmp_path / "before"), hashes(tmp_path / "after")
    before.pop("hf_compress.json"), after.pop("hf_compress.json")  # measured bytes and kernels may be in the proof
    assert before == after
    assert {"config.json", *(name for name in before if name.endswith(".safetensors"))} <= set(before)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_save_pretrained_writes_the_bytes_of_save(
    family: str, config: str, worker: CleanWorker, tmp_path: Path
) -> None:
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[config]())
    hfc.save(model, tmp_path / "proven", worker=worker)
    model.save_pretrained(tmp_path / "plain")
    with TemporaryDirectory() as pushed:  # what push_to_hub does before it uploads
        model.save_pretrained(pushed, max_shard_size="50GB")
        assert hashes(Path(pushed)) == hashes(tmp_path / "plain")
    proven = hashes(tmp_path / "proven")
    assert proven.pop("hf_compress.json")
    assert hashes(tmp_path / "plain") == proven

    (file,) = (tmp_path / "plain").glob("*.safetensors")
    record = json.loads(metadata(file)["hf_compress"])
    assert record["proof"]["level"] == "none"
    assert record["plan"] == json.loads(plan_of(model).model_dump_json())
    assert not any("hf_compress" in text for text in _methods(tmp_path / "plain"))


def _methods(path: Path) -> list[str]:
    """The `quant_method`s that a config names: none of them may be ours."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return [str(config[key]) for key in config if key == "quant_method"]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_verify_raises_the_level(family: str, config: str, worker: CleanWorker, tmp_path: Path) -> None:
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[config]())
    out = tmp_path / "out"
    model.save_pretrained(out)
    unproven = hfc.inspect(out).proof
    assert unproven is not None
    assert unproven.level == "none"
    before = hashes(out)
    assert hfc.verify(out, worker=worker).level == "full"
    proven = hfc.inspect(out).proof
    assert proven is not None
    assert proven.level == "full"
    after = hashes(out)
    assert after.pop("hf_compress.json")
    assert after == before == proven.files


@pytest.mark.touches_rng  # Trainer seeds
@pytest.mark.parametrize(("family", "config"), [("llama", "int4"), ("bert-classifier", "w8a8"), ("gpt2", "int4")])
def test_trainer_saves_a_model_that_was_quantized_in_its_hands(
    family: str, config: str, worker: CleanWorker, tmp_path: Path
) -> None:
    path = tiny_dir(family, tmp_path)
    model = getattr(transformers, FAMILIES[family][0]).from_pretrained(path)
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[]))
    hfc.quantize(trainer.model, CONFIGS[config]())
    trainer.save_model(str(tmp_path / "trained"))
    hfc.save(trainer.model.eval(), tmp_path / "proven", worker=worker)
    trained, proven = hashes(tmp_path / "trained", "*.safetensors"), hashes(tmp_path / "proven", "*.safetensors")
    assert trained == proven
    assert hashes(tmp_path / "trained", "config.json") == hashes(tmp_path / "proven", "config.json")


@pytest.mark.parametrize(("family", "config"), [case for case in CASES if case[0] != "gpt2"])
def test_all_readers_agree(family: str, config: str, worker: CleanWorker, tmp_path: Path) -> None:
    """The clean process, stock transformers beside us, and our own reader."""
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[config]())
    out = tmp_path / "out"
    hfc.save(model, out, worker=worker)
    loaded, inputs = hfc.load(out), tiny_inputs(model)
    clean, mine = stock_logits(worker, out, model, inputs), reference_logits(loaded, inputs)
    here = output(stock_in_this_process(out, family), inputs)
    assert torch.equal(here, clean)
    assert relative(clean, mine) <= (1e-5 if config == "w8a8" else 0.0)
    assert torch.equal(mine, reference_logits(model, inputs))
    assert same_states(loaded, model)
    assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize(("family", "config"), CASES)
def test_live_model_and_from_pretrained_are_one_path(family: str, config: str, tmp_path: Path) -> None:
    path = tiny_dir(family, tmp_path)
    streamed = quantized(family, path, CONFIGS[config]())
    live = hfc.quantize(getattr(transformers, FAMILIES[family][0]).from_pretrained(path), CONFIGS[config]())
    by_id = hfc.quantize(path, CONFIGS[config]())
    assert same_states(live, streamed)
    assert same_states(by_id, streamed)
    assert plan_of(live) == plan_of(streamed) == plan_of(by_id)
    for name, model in {"live": live, "streamed": streamed, "id": by_id}.items():
        model.save_pretrained(tmp_path / name)
    assert hashes(tmp_path / "live") == hashes(tmp_path / "streamed") == hashes(tmp_path / "id")


@pytest.mark.parametrize(("family", "config"), CASES)
def test_plan_from_an_id_is_what_is_carried_out(family: str, config: str, tmp_path: Path) -> None:
    path = tiny_dir(family, tmp_path)
    planned = hfc.plan(path, CONFIGS[config]())
    carried = plan_of(quantized(family, path, CONFIGS[config]()))
    exact = carried.model_copy(
        update={"rows": tuple(row.model_copy(update={"sqnr_db": None}) for row in carried.rows)}
    )
    assert exact == planned == hfc.plan(tiny(family), CONFIGS[config]())
    assert all(row.sqnr_db is None for row in planned.rows)
    noise = [row.sqnr_db for row in carried.rows if row.quantization is not None]
    assert all(value is not None and value > 10 for value in noise)


def test_verify_after_a_reader_changed_nothing(worker: CleanWorker, tmp_path: Path) -> None:
    """Loading, inspecting and verifying twice leave every byte of a proven checkpoint but the proof's own."""
    model = quantized("llama", tiny_dir("llama", tmp_path), hfc.RTNQuantConfig(bits=4, group_size=32))
    out = tmp_path / "out"
    first = hfc.save(model, out, worker=worker)
    before = hashes(out)
    hfc.load(out)
    hfc.inspect(out)
    assert hashes(out) == before
    assert hfc.verify(out, worker=worker) == first
    assert hashes(out) == before


def test_saved_again_after_a_reload(worker: CleanWorker, tmp_path: Path) -> None:
    """A model that was loaded saves the same weights; only the note of where it came from differs."""
    model = quantized("bert-classifier", tiny_dir("bert-classifier", tmp_path), hfc.Int8DynamicQuantConfig())
    hfc.save(model, tmp_path / "first", worker=worker)
    hfc.save(hfc.load(tmp_path / "first"), tmp_path / "second", worker=worker)
    first, second = tensors_on_disk(tmp_path / "first"), tensors_on_disk(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    left, right = hashes(tmp_path / "first", "config.json"), hashes(tmp_path / "second", "config.json")
    assert left == right


def test_tokenizer_and_generation_config_travel(worker: CleanWorker, tmp_path: Path) -> None:
    from tests._utils.tiny import tiny_tokenizer

    model: Any = quantized("llama", tiny_dir("llama", tmp_path), hfc.RTNQuantConfig(bits=8, group_size=32))
    model.generation_config.max_new_tokens = 7
    hfc.save(model, tmp_path / "out", tokenizer=tiny_tokenizer(), worker=worker)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello").input_ids == tiny_tokenizer()("Hello").input_ids
    assert hfc.load(tmp_path / "out").generation_config.max_new_tokens == 7
