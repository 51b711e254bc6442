"""The measured defects A1-A6 of today's tools (shared/facts/users.md), as regression tests for us."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_compress as hfc
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.worker import CleanWorker
from tests._utils.tiny import tiny, tiny_dir

INT4 = {"bits": 4, "group_size": 32}


def rows(model: Any) -> dict[str, Any]:
    plan = plan_of(model)
    assert plan is not None
    return {row.name: row for row in plan.rows}


@pytest.mark.parametrize("family", ["llama", "bert-classifier", "gpt2", "qwen3-moe"])
def test_a1_no_checkpoint_names_a_method_that_stock_does_not_know(
    family: str, worker: CleanWorker, tmp_path: Path
) -> None:
    """An unknown `quant_method` loads in stock transformers with random weights and no exception."""
    model = hfc.quantize(tiny_dir(family, tmp_path), hfc.RTNQuantConfig(**INT4))
    model.save_pretrained(tmp_path / "out")
    native = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert native.get("quant_method") == (None if family == "gpt2" else "compressed-tensors")
    answer = worker.request("raises", path=tmp_path / "out", architecture=type(model).__name__)
    if family == "gpt2":
        assert answer["exception"] in ("OSError", "ValueError")
    else:
        assert answer["exception"] is None
        keys = worker.request("keys", path=tmp_path / "out", architecture=type(model).__name__)
        assert keys["missing_keys"] == keys["unexpected_keys"] == keys["mismatched_keys"] == []


def test_a1_each_guard_alone_makes_stock_raise(worker: CleanWorker, tmp_path: Path) -> None:
    hfc.quantize(tiny_dir("gpt2", tmp_path), hfc.RTNQuantConfig(**INT4)).save_pretrained(tmp_path / "both")
    shutil.copytree(tmp_path / "both", tmp_path / "config only")
    weights = tmp_path / "config only" / "hf_compress.safetensors"
    weights.rename(weights.with_name("model.safetensors"))
    shutil.copytree(tmp_path / "both", tmp_path / "name only")
    config = json.loads((tmp_path / "name only" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "name only" / "config.json").write_text(json.dumps(config))
    for name, kind in (("both", None), ("config only", "ValueError"), ("name only", "OSError")):
        answer = worker.request("raises", path=tmp_path / name, architecture="GPT2LMHeadModel")
        assert answer["exception"] is not None, name
        assert kind in (None, answer["exception"]), name


def test_a1_a_forged_config_of_our_name_is_refused_beside_us(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = hfc.RTNQuantConfig(**INT4).to_dict()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hfc.HFCompressError, match="HFC702"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_a2_a_skip_adds_to_the_defaults() -> None:
    found = rows(hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(**INT4, skip=["k_proj"], min_coverage=0.5)))
    kept = {name for name, row in found.items() if not row.covered}
    assert kept == {
        *("lm_head", "model.embed_tokens"),
        *("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"),
    }


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("lm_haed", "lm_head"), ("re:.*k_projj", "k_proj"), ("model.layer.0", "layers")]
)
@pytest.mark.parametrize("where", ["skip", "rules"])
def test_a3_a_typo_in_a_pattern_is_an_error_with_the_nearest_name(pattern: str, nearest: str, where: str) -> None:
    fields: dict[str, Any] = {"skip": [pattern]} if where == "skip" else {"rules": [{"pattern": pattern, "bits": 8}]}
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(hfc.HFCompressError, match="HFC201") as caught:
        hfc.quantize(model, hfc.RTNQuantConfig(**INT4, **fields))
    assert pattern in str(caught.value)
    assert nearest in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_a4_a_mixture_of_experts_is_quantized_or_refused(family: str, tmp_path: Path) -> None:
    """Others: 10.3 % of the parameters, no warning."""
    model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(**INT4))
    found = rows(model)
    assert sum(row.parameters for row in found.values() if row.covered) >= 0.75 * sum(
        row.parameters for row in found.values()
    )
    assert plan_of(model).coverage >= 0.95  # type: ignore[union-attr] # asserted in `rows`
    model.save_pretrained(tmp_path / "out")
    tiny(family).save_pretrained(tmp_path / "dense")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("out", "dense")]
    assert sizes[0] < 0.5 * sizes[1]
    with pytest.raises(hfc.HFCompressError, match=r"HFC102.*experts"):
        hfc.plan(tiny(family), hfc.RTNQuantConfig(**INT4, skip=["experts"]))
    accepted = hfc.plan(tiny(family), hfc.RTNQuantConfig(**INT4, skip=["experts"], min_coverage=0.05))
    assert accepted.coverage < 0.5


def test_a5_gpt2_is_quantized_and_never_only_says_so(tmp_path: Path) -> None:
    """Others: 0.0 %, `is_quantized=True`."""
    model = hfc.quantize(tiny("gpt2"), hfc.RTNQuantConfig(**INT4))
    assert plan_of(model).coverage == 1.0  # type: ignore[union-attr] # quantized above
    assert model.is_quantized
    model.save_pretrained(tmp_path)
    words = [value for value in load_file(tmp_path / "hf_compress.safetensors").values() if value.dtype == torch.int32]
    assert len(words) == 8
    untouched = tiny("gpt2")
    with pytest.raises(hfc.HFCompressError, match="HFC101"):
        hfc.quantize(untouched, hfc.RTNQuantConfig(**INT4, skip=["transformer.h"], min_coverage=0.0))
    assert not vars(untouched).get("is_quantized", False)
    with pytest.raises(hfc.HFCompressError, match="HFC801"):
        hfc.plan(tiny("gpt2"), hfc.RTNQuantConfig(**INT4, format="compressed-tensors"))


@pytest.mark.parametrize(
    ("family", "heads"),
    [("bert-classifier", {"classifier"}), ("distilbert", {"classifier"}), ("vit", {"classifier"})],
)
@pytest.mark.parametrize(
    "config", [lambda: hfc.RTNQuantConfig(**INT4), hfc.Int8DynamicQuantConfig], ids=["int4", "w8a8"]
)
def test_a6_the_classifier_head_is_kept(family: str, heads: set[str], config: Any) -> None:
    found = rows(hfc.quantize(tiny(family), config()))
    kept = {name for name, row in found.items() if not row.covered and "head" in row.reason}
    assert kept == heads
