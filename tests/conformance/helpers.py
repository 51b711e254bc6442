"""What the tests of numbers share: stock reloads in the clean process, and reading checkpoints without us."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.modules.kernels.choose import reference_kernels
from hf_compress.modules.packed import PackedTensor
from hf_compress.modules.swap import packed_modules, packed_tensor
from tests._utils.tiny import FAMILIES, output


def quantized(family: str, path: Path, config: Any) -> PreTrainedModel:
    """A saved dense model through `from_pretrained(quantization_config=...)`."""
    kind = getattr(transformers, FAMILIES[family][0])
    model: PreTrainedModel = kind.from_pretrained(path, quantization_config=config)
    return model.eval()


def stock_logits(worker: CleanWorker, path: Path, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a stock reload in the process without us; no key may be missing, unexpected or of another shape."""
    given, result = path.parent / "inputs.safetensors", path.parent / "outputs.safetensors"
    save_file({f"0.{name}": value.contiguous() for name, value in inputs.items()}, given)
    answer = worker.request(
        "forward",
        path=path,
        architecture=type(model).__name__,
        inputs=given,
        output=result,
        attn_implementation=model.config._attn_implementation,
    )
    assert "error" not in answer, f"{answer.get('error')}: {answer.get('message')}"
    assert answer["missing_keys"] == answer["unexpected_keys"] == answer["mismatched_keys"] == []
    return load_file(result)["0.logits"]


def reference_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits without kernels."""
    with reference_kernels(model):
        return output(model, dict(inputs))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def tensors_on_disk(path: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def hashes(path: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of the files of a directory, by name."""
    files = sorted(file for file in path.rglob(pattern) if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def schemes(model: PreTrainedModel) -> dict[str, int]:
    """How many weights are planned per scheme, `kept` included."""
    return dict(sorted(Counter(row.scheme for row in plan_of(model).rows).items()))


def plan_of(model: PreTrainedModel) -> Any:
    """The plan that a model carries."""
    from hf_compress.checkpoint.handover import plan_of as find

    found = find(model)
    assert found is not None
    return found


def packed_weights(model: PreTrainedModel) -> Iterator[tuple[str, PackedTensor]]:
    """Names and packed weights of a model."""
    for path, module in packed_modules(model):
        for name in module.hfc_layouts:
            yield f"{path}.{name}", packed_tensor(module, name)


def same_states(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    """Whether two models have the same state dict: names, data types and bytes."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
