"""Every family and scheme: the numbers of a stock reload, and what exactly was quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_compress as hfc
from hf_compress.checkpoint.inputs import example_inputs
from hf_compress.checkpoint.proof_worker import run_inputs
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import CoverageError
from hf_compress.modules.kernels.choose import reference_kernels
from tests._utils.tiny import tiny, tiny_dir, tiny_inputs
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


@dataclass(frozen=True)
class Other:
    """What 4-bit weights, and INT8 with dynamic inputs, come to in a further family.

    Attributes:
        int4: Weights per scheme with 4 bits per channel.
        int8: The same with `Int8DynamicQuantConfig`.
        format: Checkpoint format of both.
        options: Further fields of the configuration.
        inputs: Shapes of float inputs by name, where none can be made from the model's signature.
    """

    int4: dict[str, int]
    int8: dict[str, int]
    format: str = "compressed-tensors"
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def example(self) -> list[dict[str, torch.Tensor]] | None:
        """Inputs of these shapes; None where there are none."""
        generator = torch.Generator().manual_seed(3)
        made = {name: torch.randn(shape, generator=generator) for name, shape in self.inputs.items()}
        return [made] if made else None


def encoder(linears: int, weight_only: int, kept: int) -> Other:
    """Linear layers, of which some get other than 3-D inputs, and what stays."""
    int8 = {"int8-channel": weight_only, "kept": kept, "w8a8-dynamic-token": linears - weight_only}
    return Other({"int4-channel": linears, "kept": kept}, {name: count for name, count in int8.items() if count})


OTHERS = {
    "albert": encoder(8, 0, 4),  # one layer, run twice
    "deberta": encoder(13, 1, 4),
    "modernbert": encoder(9, 0, 2),
    "opt": encoder(12, 4, 3),
    "layoutlm": encoder(13, 1, 8),
    "clip": encoder(26, 2, 4),
    "smolvlm": encoder(27, 13, 4),
    "yolos": Other(
        {"int4-channel": 19, "kept": 4},
        {"kept": 4, "w8a8-dynamic-tensor": 1, "w8a8-dynamic-token": 18},
        "guarded",
    ),
    "mobilenet": Other(
        {"int4-channel": 52, "kept": 1}, {"int8-channel": 17, "kept": 1, "w8a8-dynamic-tensor": 35}, "guarded"
    ),
    "encodec": Other(
        {"int4-channel": 8, "kept": 40},
        {"kept": 40, "w8a8-dynamic-token": 8},
        "guarded",
        {"min_coverage": 0.5},
        {"input_values": (1, 1, 320)},
    ),
}
SLOW = {
    "roberta": encoder(13, 1, 4),
    "gemma": encoder(14, 0, 2),
    "phi": encoder(12, 0, 2),
    "qwen2": encoder(14, 0, 2),
    "deit": encoder(12, 0, 5),
    "blip": encoder(31, 11, 5),
    "llava": encoder(28, 14, 4),
    "detr": Other(
        {"int4-channel": 49, "kept": 1},
        {"kept": 1, "w8a8-dynamic-tensor": 13, "w8a8-dynamic-token": 36},
        "guarded",
    ),
    "efficientnet": Other(
        {"int4-channel": 36, "kept": 1}, {"int8-channel": 7, "kept": 1, "w8a8-dynamic-tensor": 29}, "guarded"
    ),
}
"""The same architectures as those above, as far as this package is concerned."""


def check_other(family: str, expected: Other, method: str, worker: CleanWorker, folder: Path) -> None:
    """Quantize, save with proof, and reload to the same outputs."""
    configs = {"int4": lambda **options: hfc.RTNQuantConfig(bits=4, group_size="channel", **options)}
    config = configs.get(method, hfc.Int8DynamicQuantConfig)(**expected.options)
    model = hfc.quantize(tiny(family), config)
    assert schemes(model) == getattr(expected, method)
    assert plan_of(model).format == expected.format
    proof = hfc.save(model, folder / "out", worker=worker, inputs=expected.example())
    assert proof.level == "full"
    assert proof.checks
    loaded, inputs = hfc.load(folder / "out"), expected.example() or example_inputs(model)
    with reference_kernels(model), reference_kernels(loaded):
        expected_outputs, outputs = run_inputs(model, inputs), run_inputs(loaded, inputs)
    assert outputs.keys() == expected_outputs.keys()
    assert all(torch.equal(outputs[name], value) for name, value in expected_outputs.items())


@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, method: str, worker: CleanWorker, tmp_path: Path) -> None:
    check_other(family, OTHERS[family], method, worker, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("family", SLOW)
def test_other_families_at_length(family: str, method: str, worker: CleanWorker, tmp_path: Path) -> None:
    check_other(family, SLOW[family], method, worker, tmp_path)


def test_parametrized_convolutions_are_named() -> None:
    """Weight normalisation in wav2vec 2.0: told before anything is read, with what would accept it."""
    with pytest.raises(CoverageError, match=r"original1 \(torch.nn.utils.parametrize computes") as caught:
        hfc.plan(tiny("wav2vec2"), hfc.RTNQuantConfig(bits=4, group_size="channel"))
    (minimum,) = re.findall(r"min_coverage=([\d.]+) accepts", caught.value.fix)
    hfc.plan(tiny("wav2vec2"), hfc.RTNQuantConfig(bits=4, group_size="channel", min_coverage=float(minimum)))


def test_embedding_with_a_tensor_of_its_own_stays_kept(worker: CleanWorker, tmp_path: Path) -> None:
    """Gemma's scaled embedding: readers of quantized tables lose its scale."""
    model = hfc.quantize(tiny("gemma"), hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8"))
    (row,) = (row for row in hfc.inspect(model).plan.rows if row.name == "model.embed_tokens")
    assert row.scheme == "kept"
    assert "embed_scale" in row.reason
    assert hfc.save(model, tmp_path / "out", worker=worker).level == "full"


def test_backbone_with_another_attention_than_the_whole(worker: CleanWorker, tmp_path: Path) -> None:
    """DETR runs sdpa on a ResNet that has eager only: the proof must not ask the same of both."""
    model = hfc.quantize(tiny("detr"), hfc.CastConfig())
    assert model.config._attn_implementation != model.config.backbone_config._attn_implementation
    assert hfc.save(model, tmp_path / "out", worker=worker).level == "full"
