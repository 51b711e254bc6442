"""Every family and scheme: the numbers of a stock reload, and what exactly was quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from tests._utils.tiny import tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    plan_of,
    quantized,
    reference_logits,
    relative,
    schemes,
    stock_logits,
    tensors_on_disk,
)


@dataclass(frozen=True)
class Expected:
    """The structure of a family.

    Attributes:
        linears: Linear or Conv1D weights quantized.
        kept: Weights kept: heads, embeddings, routers, convolutions; a tied one each time.
        head: Name on disk of the output layer, or of what it is tied to.
        pooled: Linears with 2-D inputs, which W8A8 quantizes weight-only.
        experts: Fused expert weights quantized.
        expert_modules: Experts' modules on disk.
        outside: Weights in scope that nothing quantizes yet.
    """

    linears: int
    kept: int
    head: str
    pooled: int = 0
    experts: int = 0
    expert_modules: int = 0
    outside: tuple[str, ...] = ()


ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")

FAMILIES = {
    "bert-classifier": Expected(13, 4, "classifier.weight", pooled=1),
    "distilbert": Expected(13, 3, "classifier.weight", pooled=1),
    "llama": Expected(14, 2, "lm_head.weight"),
    "llama-tied": Expected(14, 2, "model.embed_tokens.weight"),
    "qwen3-moe": Expected(8, 4, "lm_head.weight", experts=4, expert_modules=2 * 8 * 3, outside=ROUTERS),
    "mixtral": Expected(8, 4, "lm_head.weight", experts=4, expert_modules=2 * 4 * 3, outside=ROUTERS),
    "t5": Expected(32, 6, "shared.weight"),
    "bart": Expected(32, 6, "model.shared.weight"),
    "whisper": Expected(
        32, 6, "model.decoder.embed_tokens.weight", outside=("model.encoder.conv1", "model.encoder.conv2")
    ),
    "vit": Expected(
        12,
        4,
        "classifier.weight",
        outside=(
            "vit.embeddings.cls_token",
            "vit.embeddings.patch_embeddings.projection",
            "vit.embeddings.position_embeddings",
        ),
    ),
}
"""GPT-2 is apart: no stock format holds its Conv1D."""

CONFIGS = {
    "int4-g32": lambda: hfc.RTNQuantConfig(bits=4, group_size=32),
    "int8-g32": lambda: hfc.RTNQuantConfig(bits=8, group_size=32),
    "w8a8-dynamic-token": hfc.Int8DynamicQuantConfig,
}
LIMITS = {"int4-g32": 0.0, "int8-g32": 0.0, "w8a8-dynamic-token": 1e-5}
SCHEMES = tuple(CONFIGS)


def structure(expected: Expected, scheme: str) -> dict[str, int]:
    """Weights per scheme."""
    if scheme != "w8a8-dynamic-token":
        return {scheme: expected.linears + expected.experts, "kept": expected.kept}
    weight_only = expected.pooled + expected.experts
    made = {"kept": expected.kept, scheme: expected.linears - expected.pooled}
    return {"int8-channel": weight_only, **made} if weight_only else made


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_reload_and_structure(family: str, scheme: str, worker: CleanWorker, tmp_path: Path) -> None:
    expected, limit = FAMILIES[family], LIMITS[scheme]
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[scheme]())
    out = tmp_path / "out"
    proof = hfc.save(model, out, worker=worker)
    assert proof.level == "full"
    assert proof.checks
    assert all(check.limit == limit and check.relative <= limit for check in proof.checks)

    inputs = tiny_inputs(model)
    found, mine = stock_logits(worker, out, model, inputs), reference_logits(model, inputs)
    assert found.isfinite().all()
    assert relative(found, mine) <= limit
    assert torch.equal(reference_logits(hfc.load(out), inputs), mine)

    assert schemes(model) == structure(expected, scheme)
    inspected = hfc.inspect(out)
    assert inspected.proof is not None
    assert inspected.proof.level == "full"
    assert {name: counts["weights"] for name, counts in inspected.by_scheme.items()} == schemes(model)
    rows = plan_of(model).rows
    assert tuple(sorted(row.name for row in rows if row.in_scope and not row.covered)) == expected.outside


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_on_disk(family: str, scheme: str, worker: CleanWorker, tmp_path: Path) -> None:
    """Counted in the files, not in the plan: packed and int8 modules, and a dense head."""
    expected = FAMILIES[family]
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[scheme]())
    model.save_pretrained(tmp_path / "out")
    tensors = tensors_on_disk(tmp_path / "out")
    packed = [name for name, value in tensors.items() if name.endswith("weight_packed")]
    plain = [name for name, value in tensors.items() if value.dtype == torch.int8]
    weight_only = expected.expert_modules + (expected.pooled if scheme == "w8a8-dynamic-token" else expected.linears)
    assert len(packed) == weight_only
    assert len(plain) == (expected.linears - expected.pooled if scheme == "w8a8-dynamic-token" else 0)
    assert tensors[expected.head].dtype == torch.float32
    assert not any("num_batches" in name or "hfc" in name for name in tensors)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gpt2_is_guarded(scheme: str, worker: CleanWorker, tmp_path: Path) -> None:
    model = quantized("gpt2", tiny_dir("gpt2", tmp_path), CONFIGS[scheme]())
    out = tmp_path / "out"
    proof = hfc.save(model, out, worker=worker)
    assert proof.level == "full"
    assert all(check.difference == 0.0 for check in proof.checks)
    refused = worker.request("raises", path=out, architecture="GPT2LMHeadModel")
    assert refused["exception"] in ("ValueError", "OSError")
    assert not list(out.glob("model*.safetensors"))

    inputs = tiny_inputs(model)
    assert torch.equal(reference_logits(hfc.load(out), inputs), reference_logits(model, inputs))
    assert schemes(model) == {scheme: 8, "kept": 3}
    assert plan_of(model).coverage >= 0.95
    tensors = tensors_on_disk(out)
    codes = [name for name, value in tensors.items() if value.dtype in (torch.int8, torch.int32)]
    assert len(codes) == 8
    assert tensors["transformer.wte.weight"].dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_are_quantized(family: str, scheme: str, tmp_path: Path) -> None:
    """Stock quantizers leave most of a mixture of experts dense without a word (users.md, A4)."""
    model = quantized(family, tiny_dir(family, tmp_path), CONFIGS[scheme]())
    experts = [row for row in plan_of(model).rows if "experts" in row.name]
    values = sum(row.parameters for row in experts)
    assert values > 0
    assert sum(row.parameters for row in experts if row.quantization is not None) >= 0.95 * values
    routers = [row for row in plan_of(model).rows if row.name.endswith((".gate", "router"))]
    assert len(routers) == 2
    assert all(row.quantization is None and "router" in row.reason for row in routers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "bert-classifier"])
def test_half_precision_model(family: str, dtype: torch.dtype, worker: CleanWorker, tmp_path: Path) -> None:
    """Scales and arithmetic in the model's own data type give the bits of a stock reload."""
    path = tiny_dir(family, tmp_path, dtype=dtype)
    for scheme in ("int4-g32", "w8a8-dynamic-token"):
        model = quantized(family, path, CONFIGS[scheme]())
        out = tmp_path / scheme
        assert hfc.save(model, out, worker=worker).level == "full"
        inputs = tiny_inputs(model)
        found = stock_logits(worker, out, model, inputs)
        assert found.dtype == dtype
        assert relative(found, reference_logits(model, inputs)) <= LIMITS[scheme]
