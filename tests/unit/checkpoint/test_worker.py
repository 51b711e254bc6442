"""The clean process: stock transformers, nothing of ours, and it survives everything but its own death."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_compress.checkpoint.proof_worker import HidingFinder, run_inputs
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import WorkerError

REPOSITORY = Path(__file__).parents[3]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
}


@pytest.fixture(scope="session")
def worker() -> Iterator[CleanWorker]:
    with CleanWorker() as clean:
        yield clean


def build(architecture: str) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if architecture.startswith("Bert"):
            config: transformers.PreTrainedConfig = transformers.BertConfig(**SMALL)
        else:
            config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
        model: transformers.PreTrainedModel = getattr(transformers, architecture)(config)
        return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    build("LlamaForCausalLM").save_pretrained(path)
    return path


def input_sets() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    sets = []
    for length in (9, 14):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, -3:] = 0
        ids = torch.randint(5, 120, (2, length), generator=generator)
        sets.append({"input_ids": ids, "attention_mask": mask})
    return sets


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def forward(worker: CleanWorker, path: Path, architecture: str, folder: Path, **options: Any) -> dict[str, Any]:
    named = {f"{index}.{name}": value for index, one in enumerate(input_sets()) for name, value in one.items()}
    save_file(named, folder / "inputs.safetensors")
    return worker.request(
        "forward",
        path=path,
        architecture=architecture,
        inputs=folder / "inputs.safetensors",
        output=folder / "outputs.safetensors",
        **options,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification", "LlamaForCausalLM"])
def test_forward_repeats_the_parent_exactly(
    worker: CleanWorker, tmp_path: Path, architecture: str, attention: str
) -> None:
    model = build(architecture)
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path / "model")
    answer = forward(worker, tmp_path / "model", architecture, tmp_path, attn_implementation=attention)
    assert answer["missing_keys"] == answer["unexpected_keys"] == answer["mismatched_keys"] == []
    expected = run_inputs(model, input_sets())
    outputs = load_file(tmp_path / "outputs.safetensors")
    assert sorted(outputs) == sorted(expected) == answer["outputs"]
    assert all((outputs[name] - expected[name]).abs().max() == 0.0 for name in expected)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert answer["resident_bytes_before"] == answer["resident_bytes_after"] == size
    assert answer["peak_bytes"] > size
    assert answer["versions"]["transformers"] == transformers.__version__


def test_forward_in_another_dtype(worker: CleanWorker, saved: Path, tmp_path: Path) -> None:
    forward(worker, saved, "LlamaForCausalLM", tmp_path, dtype="bfloat16")
    assert load_file(tmp_path / "outputs.safetensors")["0.logits"].dtype == torch.bfloat16


def test_worker_has_none_of_us(worker: CleanWorker) -> None:
    assert worker.request("has", package="hf_compress") == {"importable": False}
    assert worker.request("has", package="hf_compress.core.errors") == {"importable": False}
    assert worker.request("has", package="transformers") == {"importable": True}
    assert worker.request("modules") == {"hidden": []}


def test_hiding_finder_hides_modules_and_distributions() -> None:
    found = PathFinder.find_spec("hf_compress", [str(REPOSITORY)])
    assert found is not None
    hiding = HidingFinder(PathFinder, frozenset({"hf_compress", "safetensors"}))
    assert hiding.find_spec("hf_compress", [str(REPOSITORY)]) is None
    assert hiding.find_spec("hf_compress.core", [str(REPOSITORY)]) is None
    assert hiding.find_spec("transformers") is not None
    distributions = {found.metadata["Name"] for found in hiding.find_distributions()}
    assert "transformers" in distributions
    assert "safetensors" not in distributions


def test_unknown_quant_method_loads_and_its_missing_keys_are_told(
    worker: CleanWorker, saved: Path, tmp_path: Path
) -> None:
    """Stock transformers ignores a method it does not know, and fills the weights it can't find at random."""
    path = copy(saved, tmp_path / "unknown")
    change_config(path, quantization_config={"quant_method": "nobody_knows_this"})
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[f"{name}_packed"] = weights.pop(name).to(torch.int8)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    answer = forward(worker, path, "LlamaForCausalLM", tmp_path)
    assert answer["missing_keys"] == [name]
    assert answer["unexpected_keys"] == [f"{name}_packed"]
    assert worker.request("raises", path=path, architecture="LlamaForCausalLM") == {
        "exception": None,
        "message": None,
    }


def test_config_without_quant_method_raises(worker: CleanWorker, saved: Path, tmp_path: Path) -> None:
    path = copy(saved, tmp_path / "guarded")
    change_config(path, quantization_config={"guarded_by": "hf_compress"})
    answer = worker.request("raises", path=path, architecture="LlamaForCausalLM")
    assert answer["exception"] == "ValueError"
    assert "quant_method" in answer["message"]


def test_key_check_on_meta(worker: CleanWorker, saved: Path, tmp_path: Path) -> None:
    good = worker.request("keys", path=saved, architecture="LlamaForCausalLM")
    assert good["missing_keys"] == good["unexpected_keys"] == good["mismatched_keys"] == []
    path = copy(saved, tmp_path / "damaged")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["extra.weight"] = torch.zeros(3)
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    bad = worker.request("keys", path=path, architecture="LlamaForCausalLM")
    assert bad["missing_keys"] == ["model.layers.1.mlp.up_proj.weight"]
    assert bad["unexpected_keys"] == ["extra.weight"]
    (mismatched,) = bad["mismatched_keys"]
    assert "model.norm.weight" in mismatched


def save_compressed(path: Path) -> None:
    """A 4-bit compressed-tensors checkpoint, made with that library alone."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = build("LlamaForCausalLM")
    weights = QuantizationArgs(num_bits=4, group_size=32, symmetric=True, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        quantization_status="compressed",
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            parameter.data.fill_(0.01)
    ModelCompressor(quantization_config=config).compress_model(model)
    model.save_pretrained(path)
    native = json.loads(config.model_dump_json())
    change_config(path, quantization_config={**native, "quant_method": "compressed-tensors"})


def test_compressed_tensors_on_meta_and_its_growth_at_the_first_forward(worker: CleanWorker, tmp_path: Path) -> None:
    save_compressed(tmp_path / "model")
    keys = worker.request("keys", path=tmp_path / "model", architecture="LlamaForCausalLM")
    assert keys["missing_keys"] == keys["unexpected_keys"] == keys["mismatched_keys"] == []
    answer = forward(worker, tmp_path / "model", "LlamaForCausalLM", tmp_path)
    assert answer["missing_keys"] == answer["unexpected_keys"] == []
    assert answer["resident_bytes_after"] > answer["resident_bytes_before"]


def test_blocked_package_is_as_if_not_installed(tmp_path: Path) -> None:
    save_compressed(tmp_path / "model")
    with CleanWorker(blocked=("compressed_tensors",)) as blind:
        assert blind.request("has", package="compressed_tensors") == {"importable": False}
        answer = blind.request("raises", path=tmp_path / "model", architecture="LlamaForCausalLM")
        assert answer["exception"] == "ImportError"
        assert "compressed" in answer["message"]
        assert blind.request("modules") == {"hidden": []}


def test_failed_request_is_answered_and_the_worker_lives(worker: CleanWorker, tmp_path: Path) -> None:
    pid = worker.request("ping")["pid"]
    missing = forward(worker, tmp_path / "missing", "BertModel", tmp_path)
    assert missing["error"] == "OSError"
    assert "Traceback" in missing["traceback"]
    assert worker.request("forward", path="x", architecture="BertModel")["error"] == "TypeError"
    assert worker.request("keys", path="x", architecture="NoSuchModel")["error"] == "AttributeError"
    assert "Unknown operation 'fly'" in worker.request("fly")["message"]
    assert worker.request("ping")["pid"] == pid


def test_killed_worker_is_an_error_and_the_next_request_starts_another() -> None:
    with CleanWorker() as clean:
        first = clean.request("ping")["pid"]
        assert clean.pid == first
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerError, match="died during 'ping'"):
            clean.request("ping")
        assert clean.pid is None
        assert clean.request("ping")["pid"] != first


def test_timeout_is_an_error() -> None:
    with CleanWorker(timeout=0.2) as clean, pytest.raises(WorkerError, match=r"longer than 0\.2 s"):
        clean.request("has", package="torch")


def test_last_lines_of_stderr_are_in_the_error() -> None:
    with CleanWorker() as clean:
        clean.request("has", package="this")  # prints a poem, which must not be taken for an answer
        os.kill(clean.request("ping")["pid"], signal.SIGKILL)
        with pytest.raises(WorkerError, match="Namespaces are one honking great idea"):
            clean.request("ping")


def test_closed_worker_refuses_requests() -> None:
    clean = CleanWorker()
    clean.close()
    with pytest.raises(WorkerError, match="closed"):
        clean.request("ping")


def test_argument_that_is_no_json_is_a_type_error_and_sends_nothing(worker: CleanWorker) -> None:
    with pytest.raises(TypeError):
        worker.request("has", package=object())
    assert "pid" in worker.request("ping")
