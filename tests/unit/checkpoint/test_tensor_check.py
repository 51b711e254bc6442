"""The proof's comparison of every tensor, also of architectures that transformers stores under other names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hf_compress as hfc
from hf_compress.checkpoint.proof import prove
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import ProofError
from tests._utils.tiny import tiny
from tests.conformance.helpers import plan_of, tensors_on_disk

RENAMED = {
    "llava gptq": ("llava", hfc.RTNQuantConfig(bits=4, group_size=32, format="gptq")),
    "llava": ("llava", hfc.RTNQuantConfig(bits=4, group_size=32)),
    "llava nf4": ("llava", hfc.CodebookQuantConfig()),
    "llava guarded": ("llava", hfc.RTNQuantConfig(bits=4, group_size=32, format="guarded")),
    "mixtral": ("mixtral", hfc.RTNQuantConfig(bits=4, group_size=32)),
    "mixtral dense experts": (
        "mixtral",
        hfc.RTNQuantConfig(bits=4, group_size=32, skip=["*.experts*"], min_coverage=0.0, format="guarded"),
    ),
    "tied": ("llama-tied", hfc.RTNQuantConfig(bits=4, group_size=32)),
}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one file; its metadata stays."""
    (file,) = path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = tensors_on_disk(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)


@pytest.mark.parametrize("case", RENAMED)
def test_every_tensor_is_compared(case: str, worker: CleanWorker, tmp_path: Path) -> None:
    family, config = RENAMED[case]
    proof = hfc.save(hfc.quantize(tiny(family), config), tmp_path / "out", worker=worker, free_bytes=1)
    assert f"{len(tensors_on_disk(tmp_path / 'out'))} tensors re-read" in [check.name for check in proof.checks]
    loaded = hfc.load(tmp_path / "out")
    again = prove(tmp_path / "out", plan_of(loaded), loaded, worker=worker, free_bytes=1)
    assert again.checks == proof.checks


def test_names_of_the_model_itself(worker: CleanWorker, tmp_path: Path) -> None:
    model = hfc.quantize(tiny("mixtral"), RENAMED["mixtral"][1])
    model.save_pretrained(tmp_path / "out", save_original_format=False)
    assert "model.layers.0.mlp.gate.weight" in tensors_on_disk(tmp_path / "out")
    proof = prove(tmp_path / "out", plan_of(model), model, worker=worker, free_bytes=1)
    assert f"{len(tensors_on_disk(tmp_path / 'out'))} tensors re-read" in [check.name for check in proof.checks]


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("mixtral", "block_sparse_moe.gate.weight"),
        ("mixtral", "weight_scale"),
        ("llava", "norm.weight"),
        ("llava gptq", "scales"),
        ("llava guarded", "weight_packed"),
    ],
)
def test_one_bit_is_seen(case: str, part: str, worker: CleanWorker, tmp_path: Path) -> None:
    """Also of dense tensors that lie on disk under other names than the model's."""
    family, config = RENAMED[case]
    model = hfc.quantize(tiny(family), config)
    model.save_pretrained(tmp_path / "out")
    prove(tmp_path / "out", plan_of(model), model, worker=worker, free_bytes=1)

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1

    rewrite(tmp_path / "out", change)
    with pytest.raises(ProofError, match="Tensors differ on disk"):
        prove(tmp_path / "out", plan_of(model), model, worker=worker, free_bytes=1)
