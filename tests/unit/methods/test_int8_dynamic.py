from __future__ import annotations

import pytest
import torch

from hf_compress.core.build import build_plan
from hf_compress.core.registry import METHODS
from hf_compress.core.scheme import token_args, weight_args
from hf_compress.core.weights import WeightKind, list_weights
from hf_compress.methods.int8_dynamic import Int8DynamicFields, Int8DynamicQuantConfig, scheme
from hf_compress.methods.rtn.method import quantize
from hf_compress.modules.swap import packed_modules, packed_tensor
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize as quantize_model
from tests._utils.tiny import tiny


@pytest.mark.parametrize(
    ("family", "kind", "activations"),
    [
        ("llama", WeightKind.LINEAR, True),
        ("gpt2", WeightKind.CONV1D, True),
        ("qwen3-moe", WeightKind.EXPERTS, False),
        ("llama", WeightKind.EMBEDDING, False),
    ],
)
def test_scheme_per_kind(family: str, kind: WeightKind, activations: bool) -> None:
    weight = next(weight for weight in list_weights(tiny(family)) if weight.kind is kind)
    made = scheme(Int8DynamicFields(), weight)
    assert made.weights == weight_args(8, "channel", True)
    assert made.input_activations == (token_args() if activations else None)
    assert made.format == ("int-quantized" if activations else "pack-quantized")


def test_declaration() -> None:
    method = METHODS.get("int8_dynamic")
    assert method.quantizes_activations
    assert not method.needs_data
    assert method.config is Int8DynamicQuantConfig


def test_pooler_is_weight_only() -> None:
    made = {row.name: row.scheme for row in plan(tiny("bert"), Int8DynamicQuantConfig()).rows}
    assert made["pooler.dense"] == "int8-channel"
    assert made["encoder.layer.0.attention.self.query"] == "w8a8-dynamic-token"


def test_rows_are_rounded_to_nearest() -> None:
    model, dense = quantize_model(tiny("llama"), Int8DynamicQuantConfig()), tiny("llama")
    for path, module in packed_modules(model):
        expected = quantize(dense.get_submodule(path).weight, weight_args(8, "channel", True))
        packed = packed_tensor(module, "weight")
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.scale, expected.scale)
        assert packed.zero_point is None


def test_noise_of_eight_bits() -> None:
    """8 bits per channel of normal weights: about 6.02 · 8 dB less the peak factor; far above 35 dB."""
    model = quantize_model(tiny("llama"), Int8DynamicQuantConfig())
    rows = [row for row in model.hfc_plan.rows if row.quantization is not None]
    assert all(row.sqnr_db is not None and 35 < row.sqnr_db < 60 for row in rows)


def test_plan_without_ranks_assumes_tokens_only_inside_the_blocks() -> None:
    made = build_plan(tiny("bert"), Int8DynamicQuantConfig())
    outside = {row.name for row in made.quantized if row.scheme != "w8a8-dynamic-token"}
    assert outside == {"pooler.dense"}
