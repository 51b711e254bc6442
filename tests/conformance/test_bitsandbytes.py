"""Checkpoints in bitsandbytes' layout: stock transformers and bitsandbytes read what we wrote without the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

import hf_compress as hfc
from hf_compress.checkpoint.proof import prove
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import ProofError
from hf_compress.formats.bitsandbytes import FORWARD_LIMIT, INT8_FORWARD_LIMIT
from hf_compress.methods.codebook import CodebookQuantConfig
from tests._utils.tiny import FAMILIES, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    hashes,
    metadata,
    plan_of,
    quantized,
    reference_logits,
    relative,
    same_states,
    schemes,
    stock_logits,
    tensors_on_disk,
)


def int8(**changes: Any) -> Any:
    return hfc.RTNQuantConfig(**{"bits": 8, "group_size": "channel", "format": "bitsandbytes", **changes})


CONFIGS = {
    "nf4": CodebookQuantConfig,
    "fp4": lambda: CodebookQuantConfig(codebook="fp4", group_size=32),
    "int8": int8,
}
STRUCTURE = {
    "llama": (14, "lm_head"),
    "llama-tied": (14, "lm_head"),
    "bert-classifier": (13, "classifier"),
    "gpt2": (8, "lm_head"),
    "t5": (28, "lm_head"),
    "vit": (12, "classifier"),
    "distilbert": (13, "^classifier$"),
}
"""Weights quantized, and the head that stock must leave alone; DistilBERT's `pre_classifier` ends like its head."""
CASES = [(family, kind) for family in STRUCTURE for kind in ("nf4", "int8")] + [("llama", "fp4"), ("gpt2", "fp4")]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def blind() -> Iterator[CleanWorker]:
    """A clean process where bitsandbytes is not installed."""
    with CleanWorker(threads=torch.get_num_threads(), blocked=("bitsandbytes",)) as clean:
        yield clean


def changed(path: Path, key: str, factor: float) -> None:
    """Multiply the first value of a tensor on disk."""
    file = path / "model.safetensors"
    tensors, kept = load_file(file), metadata(file)
    name = sorted(name for name in tensors if name.endswith(key))[-1]
    tensors[name].view(-1)[0] *= factor
    save_file(tensors, file, metadata=kept)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_stock_reads_what_was_written(family: str, kind: str, worker: CleanWorker, tmp_path: Path) -> None:
    """The proof's two steps, stock's outputs, our own reader, and the structure."""
    count, head = STRUCTURE[family]
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[kind]())
    out = tmp_path / "out"
    proof = hfc.save(model, out, worker=worker)
    assert proof.level == "full"
    weights, *outputs = proof.checks
    assert (weights.name, weights.limit, weights.difference) == (f"{count} weights dequantized by stock", 0.0, 0.0)
    limit = INT8_FORWARD_LIMIT if kind == "int8" else FORWARD_LIMIT
    assert outputs
    assert all(check.limit == limit and check.relative <= limit / 3 for check in outputs)

    inputs = tiny_inputs(model)
    found, mine = stock_logits(worker, out, model, inputs), reference_logits(model, inputs)
    assert relative(found, mine) <= limit / 3
    loaded = hfc.load(out)
    assert torch.equal(reference_logits(loaded, inputs), mine)
    assert same_states(loaded, model)
    assert plan_of(loaded) == plan_of(model)
    label = {"nf4": "nf4-g64", "fp4": "fp4-g32", "int8": "int8-channel"}[kind]
    assert schemes(model)[label] == count
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["llm_int8_skip_modules"][-1] == head


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_half_precision(family: str, kind: str, dtype: torch.dtype, worker: CleanWorker, tmp_path: Path) -> None:
    model = quantized(family, tiny_dir(family, tmp_path, dtype=dtype), CONFIGS[kind]())
    proof = hfc.save(model, tmp_path / "out", worker=worker)
    assert proof.level == "full"
    assert proof.checks[0].difference == 0.0
    inputs = tiny_inputs(model)
    assert torch.equal(reference_logits(hfc.load(tmp_path / "out"), inputs), reference_logits(model, inputs))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama-tied", "bert-classifier", "gpt2", "t5", "vit")]
    + [("gpt2", dtype) for dtype in FLOATS[1:]],
    ids=str,
)
def test_nf4_checkpoint_is_the_one_that_stock_would_save(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Quantized and saved by transformers and bitsandbytes: the same config, tensors and bytes."""
    path = tiny_dir(family, tmp_path, dtype=dtype)
    quantized(family, path, CodebookQuantConfig()).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    )
    stock = getattr(transformers, FAMILIES[family][0]).from_pretrained(path, quantization_config=asked)
    stock.save_pretrained(tmp_path / "stock")
    assert config == json.loads((tmp_path / "stock" / "config.json").read_text())
    ours, theirs = tensors_on_disk(tmp_path / "ours"), tensors_on_disk(tmp_path / "stock")
    assert ours.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_int8_checkpoint_has_the_form_that_stock_would_save(family: str, tmp_path: Path) -> None:
    """The same config, names, types and shapes; its grid is absmax / 127 where ours is absmax / 127.5."""
    path = tiny_dir(family, tmp_path)
    quantized(family, path, int8()).save_pretrained(tmp_path / "ours")
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    stock = getattr(transformers, FAMILIES[family][0]).from_pretrained(path, quantization_config=asked)
    stock.save_pretrained(tmp_path / "stock")
    read = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock")]
    assert read[0] == read[1]

    def form(name: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {key: (value.dtype, value.shape) for key, value in tensors_on_disk(tmp_path / name).items()}

    assert form("ours") == form("stock")


@pytest.mark.parametrize(
    ("kind", "key"), [("nf4", ".absmax"), ("fp4", ".absmax"), ("int8", ".SCB"), ("int8", "up_proj.weight")]
)
def test_a_wrong_scale_fails_the_proof(kind: str, key: str, worker: CleanWorker, tmp_path: Path) -> None:
    """One value of one weight, a thousandth off: far within what the outputs alone would show."""
    model = quantized("llama", tiny_dir("llama", tmp_path), CONFIGS[kind]())
    out = tmp_path / "out"
    model.save_pretrained(out)
    changed(out, key, 1.001 if key != "up_proj.weight" else 0)
    with pytest.raises(ProofError, match="Stock reads other weights"):
        prove(out, plan_of(model), model, worker=worker)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_bitsandbytes_the_proof_is_our_own_readers(
    kind: str, blind: CleanWorker, worker: CleanWorker, tmp_path: Path
) -> None:
    model = quantized("llama", tiny_dir("llama", tmp_path), CONFIGS[kind]())
    out = tmp_path / "out"
    proof = hfc.save(model, out, worker=blind)
    assert proof.level == "own-reader"
    assert "'bitsandbytes' is not installed" in proof.reason
    assert all(check.difference == 0.0 for check in proof.checks)
    refused = blind.request("raises", path=out, architecture="LlamaForCausalLM")
    assert refused["exception"] == "ImportError"
    assert "bitsandbytes" in refused["message"]
    before = hashes(out, "*.safetensors")
    assert hfc.verify(out, worker=worker).level == "full"
    assert hashes(out, "*.safetensors") == before


@pytest.mark.parametrize(
    ("config", "skip"),
    [("nf4", ()), ("int8", ()), ("nf4", ("model.layers.5.mlp.up_proj",)), ("int4", ("model.layers.5.mlp.up_proj",))],
)
def test_truncated_proof(config: str, skip: tuple[str, ...], worker: CleanWorker, tmp_path: Path) -> None:
    """Names of kept layers move with their blocks, in every format's config."""
    options: dict[str, Any] = {"skip": skip, "min_coverage": 0.5}
    made = {
        "nf4": lambda: CodebookQuantConfig(**options),
        "int8": lambda: int8(**options),
        "int4": lambda: hfc.RTNQuantConfig(**options),
    }[config]()
    model = hfc.quantize(tiny("llama", num_hidden_layers=6), made)
    proof = hfc.save(model, tmp_path / "out", worker=worker, free_bytes=0)
    assert proof.level == "truncated"
    assert proof.checks[-1].name.endswith("tensors re-read")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saving_is_one_path(kind: str, worker: CleanWorker, tmp_path: Path) -> None:
    """A live model, an id and `from_pretrained`; `save` and `save_pretrained`, before and after a forward."""
    path = tiny_dir("gpt2", tmp_path)
    streamed = quantized("gpt2", path, CONFIGS[kind]())
    live = hfc.quantize(tiny("gpt2"), CONFIGS[kind]())
    assert same_states(live, streamed)
    hfc.save(streamed, tmp_path / "saved", worker=worker)
    reference_logits(streamed, tiny_inputs(streamed))
    streamed.save_pretrained(tmp_path / "plain")
    saved = hashes(tmp_path / "saved")
    assert saved.pop("hf_compress.json")
    assert hashes(tmp_path / "plain") == saved


def test_stock_says_nothing_about_the_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No weight is reported missing, unexpected, new or converted with trouble."""
    for kind in ("nf4", "int8"):
        quantized("llama", tiny_dir("llama", tmp_path / kind), CONFIGS[kind]()).save_pretrained(
            tmp_path / kind / "out"
        )
        capfd.readouterr()
        model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / kind / "out", output_loading_info=True)
        said = "".join(capfd.readouterr()).lower()
        assert not any(word in said for word in ("missing", "unexpected", "mismatch", "newly", "conversion", "warn"))
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        kinds = {type(module).__name__ for module in model.modules()}
        assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in kinds


def test_a_cast_of_the_live_model_is_refused() -> None:
    """transformers refuses it for bitsandbytes' models, and so for ours."""
    model = hfc.quantize(tiny("llama"), CodebookQuantConfig())
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.bfloat16)


def test_dequantize_gives_dense_layers_back() -> None:
    model = hfc.quantize(tiny("gpt2"), CodebookQuantConfig())
    inputs: dict[str, Tensor] = tiny_inputs(model)
    before = reference_logits(model, inputs)
    dense = model.dequantize()
    assert type(dense.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert torch.equal(reference_logits(dense, inputs), before)
