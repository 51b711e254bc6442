"""Checkpoints of the right names and shapes whose tensors or record are not those that were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import CorruptCheckpointError
from tests._utils.tiny import tiny
from tests.conformance.helpers import metadata, same_states
from tests.unit.checkpoint.test_tensor_check import rewrite

CONFIGS = {
    "compressed-tensors": hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8"),
    "guarded": hfc.RTNQuantConfig(bits=4, group_size=32, symmetric=False, format="guarded"),
    "kmeans": hfc.CodebookQuantConfig(codebook="kmeans", group_size=32),
}
QUERY = "model.layers.0.self_attn.q_proj.weight"


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: to(tensors[name])})


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    """A copy whose last value is another one."""

    def made(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        copied.view(-1)[-1] = value
        return copied

    return made


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "scale type": ("compressed-tensors", change(f"{QUERY}_scale", Tensor.half), "float16"),
    "guarded scale type": ("guarded", change(f"{QUERY}_scale", Tensor.half), "float16"),
    "scale nan": ("compressed-tensors", change(f"{QUERY}_scale", spoilt(float("nan"))), "NaN or infinite"),
    "scale inf": ("kmeans", change(f"{QUERY}_scale", spoilt(float("inf"))), "NaN or infinite"),
    "codebook nan": ("kmeans", change(f"{QUERY}_codebook", spoilt(float("nan"))), "NaN or infinite"),
    "codebook type": ("kmeans", change(f"{QUERY}_codebook", Tensor.half), "expected torch.float32"),
    "zero point type": ("guarded", change(f"{QUERY}_zero_point", Tensor.long), "expected torch.int8"),
    "tied scale": ("compressed-tensors", change("lm_head.weight_scale", spoilt(7.0)), "is tied"),
    "tied scale type": ("compressed-tensors", change("lm_head.weight_scale", Tensor.half), "is tied"),
    "tied scale missing": ("compressed-tensors", lambda tensors: tensors.pop("lm_head.weight_scale"), "no tensor"),
    "codes of nothing": (
        "compressed-tensors",
        lambda tensors: tensors.update({"model.added_packed": torch.zeros(3, dtype=torch.int32)}),
        "no use for",
    ),
    "scale of a layer that has none": (
        "guarded",
        lambda tensors: tensors.update({f"{QUERY}_codebook": torch.zeros(16)}),
        "no use for",
    ),
    "dense of nothing": ("kmeans", lambda tensors: tensors.update({"added.weight": torch.zeros(3)}), "no place"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors_are_refused(case: str, tmp_path: Path) -> None:
    config, damage, message = DAMAGE[case]
    hfc.quantize(tiny("llama-tied"), CONFIGS[config]).save_pretrained(tmp_path / "out")
    hfc.load(tmp_path / "out")
    rewrite(tmp_path / "out", damage)
    with pytest.raises(CorruptCheckpointError, match=message):
        hfc.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_model_moved_to_another_type_reloads(config: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The record names the type at the time of saving, not that of packing."""
    model = hfc.quantize(tiny("llama-tied"), CONFIGS[config]).to(dtype)
    model.save_pretrained(tmp_path / "out")
    loaded = hfc.load(tmp_path / "out")
    assert loaded.dtype == dtype
    assert same_states(loaded, model)
    tables = {name: value for name, value in loaded.state_dict().items() if name.endswith("_codebook")}
    original = hfc.quantize(tiny("llama-tied"), CONFIGS[config]).state_dict()
    assert all(torch.equal(table, original[name]) for name, table in tables.items())
    assert bool(tables) == (config == "kmeans")


def test_moved_module_reloads(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, skeleton, another = (nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(3))
    config = hfc.RTNQuantConfig(bits=4, group_size=32)
    model = hfc.quantize(model, config).to(torch.bfloat16)
    hfc.save(model, tmp_path / "out")
    inputs = torch.ones(1, 32, dtype=torch.bfloat16)
    assert torch.equal(hfc.load(tmp_path / "out", model=skeleton)(inputs), model(inputs))
    rewrite(tmp_path / "out", change("1.weight_scale", Tensor.half))
    with pytest.raises(CorruptCheckpointError, match="float16"):
        hfc.load(tmp_path / "out", model=another)


@pytest.mark.parametrize("change", ["codebook", "kernel"])
def test_record_that_did_not_write_the_weights_is_refused(change: str, tmp_path: Path) -> None:
    hfc.quantize(tiny("llama"), CONFIGS["kmeans"]).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "hf_compress.safetensors"
    record = json.loads(metadata(file)["hf_compress"])
    for row in record["plan"]["rows"]:
        if row["quantization"] is not None:
            if change == "codebook":
                row["quantization"]["codebook"] = None
            else:
                row["kernel"] = [row["shape"][1]]
    (tmp_path / "out" / "hf_compress.json").write_text(json.dumps(record))
    with pytest.raises(CorruptCheckpointError, match="not the one that the weights were written by"):
        hfc.load(tmp_path / "out")


@pytest.mark.parametrize("family", ["bert-classifier", "gpt2"])
def test_model_with_norms_in_float32_reloads(family: str, worker: CleanWorker, tmp_path: Path) -> None:
    """Moved to 16 bits after packing, but for its norms: two types in one checkpoint. transformers loads one."""
    model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(bits=4, group_size=32)).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    assert hfc.save(model, tmp_path / "out", worker=worker).level == "full"
    assert {row.dtype for row in hfc.inspect(tmp_path / "out").plan.quantized} == {"bfloat16"}
    states = [dict(one.state_dict()) for one in (hfc.load(tmp_path / "out"), model)]
    scales = [{name: value for name, value in one.items() if name.endswith("_scale")} for one in states]
    assert scales[0].keys() == scales[1].keys() != set()
    assert all(torch.equal(value, scales[1][name]) for name, value in scales[0].items())


def test_half_moved_module_reloads(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, skeleton = (nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))
    hfc.quantize(model, hfc.RTNQuantConfig(bits=4, group_size=32))[0].to(torch.bfloat16)
    hfc.save(model, tmp_path / "out")
    assert same_states(hfc.load(tmp_path / "out", model=skeleton), model)


@pytest.mark.parametrize(("layers", "level"), [(6, "truncated"), (2, "own-reader")])
def test_cast_model_that_does_not_fit_twice_is_saved(
    layers: int, level: str, worker: CleanWorker, tmp_path: Path
) -> None:
    model = hfc.quantize(tiny("bert-mlm", num_hidden_layers=layers), hfc.CastConfig())
    assert hfc.save(model, tmp_path / "out", free_bytes=0, worker=worker).level == level
    assert same_states(hfc.load(tmp_path / "out"), model)
