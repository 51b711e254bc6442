from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AwqConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

import hf_compress as hfc
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.save import save, verify
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CorruptCheckpointError, FormatError
from hf_compress.core.plan import DTYPES, Plan, PlanRow
from hf_compress.formats.awq import AWQFormat
from hf_compress.formats.base import format_of
from hf_compress.methods.codebook import CodebookQuantConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.packed import Layout, PackedTensor, unpack_codes
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import packed_of
from tests._utils.tiny import output, tiny, tiny_inputs

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"group_size": 32}),
    "llama asymmetric": ("llama", {"symmetric": False, "group_size": 16}),
    "bert": ("bert", {"symmetric": False, "group_size": "channel"}),
    "some kept": ("bert", {"skip": ["*query"], "min_coverage": 0.5, "group_size": 32}),
}


def planned(family: str = "llama", **fields: Any) -> tuple[Plan, AWQFormat]:
    made = plan(tiny(family, num_hidden_layers=1), RTNQuantConfig(**{"format": "awq", **fields}))
    layout = format_of(made)
    assert isinstance(layout, AWQFormat)
    return made, layout


def packed_row(row: PlanRow) -> PackedTensor:
    """Random codes and zero points, scales that fit float16."""
    assert row.quantization is not None
    weights = row.quantization.weights
    assert weights is not None
    size: int | str = weights.group_size if weights.strategy == "group" else str(weights.strategy)
    made = packed_of(row.shape, 4, size, weights.symmetric)
    scale = made.scale.to(torch.float16).to(torch.bfloat16).to(DTYPES[row.dtype])
    return PackedTensor(Layout(row.shape, row.quantization, row.transposed), made.codes, scale, made.zero_point)


def slow_pack(rows: list[list[int]]) -> Tensor:
    """AutoAWQ's `WQLinear_GEMM.from_linear`: unsigned codes (inputs × outputs) to words, nibble by nibble."""
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    words = [[0] * (len(rows[0]) // 8) for _ in rows]
    for line, codes in enumerate(rows):
        for column in range(len(codes) // 8):
            for i in range(8):
                words[line][column] |= codes[column * 8 + order_map[i]] << (i * 4)
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def slow_unpack(word: int) -> list[int]:
    """llm-awq's dequantization of one word: eight unsigned codes in the order of the outputs."""
    nibbles = [(word >> (4 * i)) & 15 for i in range(8)]
    return [nibbles[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [16, "channel"])
def test_tensors_are_those_that_autoawq_packs(symmetric: bool, size: int | str) -> None:
    made, layout = planned(symmetric=symmetric, group_size=size)
    row = made.quantized[1]  # 32 outputs, 64 inputs
    packed = packed_row(row)
    codes = unpack_codes(packed.codes, 4, 64).to(torch.int64) + 8
    zeros = torch.full(packed.scale.shape, 8) if packed.zero_point is None else packed.zero_point.long() + 8
    tensors = layout.encode(row, packed)
    assert list(tensors) == layout.keys(row)
    assert torch.equal(tensors[f"{row.module}.qweight"], slow_pack(codes.t().tolist()))
    assert torch.equal(tensors[f"{row.module}.qzeros"], slow_pack(zeros.t().tolist()))
    assert tensors[f"{row.module}.scales"].dtype == torch.float16
    assert torch.equal(tensors[f"{row.module}.scales"].float(), packed.scale.t())


@pytest.mark.parametrize("symmetric", [True, False])
def test_awqs_arithmetic_gives_the_same_weights(symmetric: bool) -> None:
    """(code - zero) × scale in float64, which holds products of 4-bit and float16 numbers exactly."""
    made, layout = planned(symmetric=symmetric, group_size=16)
    row = made.quantized[1]
    packed = packed_row(row)
    qweight, qzeros, scales = (layout.encode(row, packed)[key] for key in layout.keys(row))
    dense = packed.dense()
    for line in range(0, 64, 7):
        codes = [code for word in qweight[line].tolist() for code in slow_unpack(word & 0xFFFFFFFF)]
        zeros = [zero for word in qzeros[line // 16].tolist() for zero in slow_unpack(word & 0xFFFFFFFF)]
        values = [
            (code - zero) * float(scale)
            for code, zero, scale in zip(codes, zeros, scales[line // 16].tolist(), strict=True)
        ]
        assert torch.equal(torch.tensor(values, dtype=torch.float64).float(), dense[:, line])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decode_undoes_encode(dtype: str, symmetric: bool) -> None:
    fields = {"format": "awq", "symmetric": symmetric, "group_size": 32}
    made = plan(tiny("llama", num_hidden_layers=1, dtype=DTYPES[dtype]), RTNQuantConfig(**fields))
    layout = format_of(made)
    for row in {row.shape: row for row in made.quantized}.values():
        packed = packed_row(row)
        tensors = layout.encode(row, packed)
        assert layout.owned({**tensors, "other.scales": torch.zeros(1)}) == set(tensors)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        again = layout.decode(row, tensors)
        assert torch.equal(again.codes, packed.codes)
        assert torch.equal(again.scale, packed.scale)
        assert again.scale.dtype == DTYPES[dtype]
        assert (again.zero_point is None) == symmetric
        assert torch.equal(again.dense(), packed.dense())


def test_scales_that_float16_can_not_hold_are_refused() -> None:
    made, layout = planned()
    row = made.quantized[0]
    packed = packed_row(row)
    with pytest.raises(FormatError, match=re.escape(f"Scales of {row.name} do not fit float16")):
        layout.encode(row, replace(packed, scale=packed.scale * (1 + 2**-20)))


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_or_wrong_tensors_are_corrupt(suffix: str) -> None:
    made, layout = planned(symmetric=False, group_size=16)
    row = made.quantized[0]
    tensors = layout.encode(row, packed_row(row))
    key = f"{row.module}.{suffix}"
    value = tensors[key]
    with pytest.raises(CorruptCheckpointError, match=f"no tensor '{key}'"):
        layout.decode(row, {name: tensor for name, tensor in tensors.items() if name != key})
    for wrong in (value.to(torch.int64), value.bfloat16(), value[:-1], value[None], torch.cat([value, value])):
        with pytest.raises(CorruptCheckpointError, match=f"{key} is .*the plan says"):
            layout.decode(row, {**tensors, key: wrong})


def test_wrong_values_are_corrupt() -> None:
    made, layout = planned(group_size=16)
    row = made.quantized[0]
    tensors = layout.encode(row, packed_row(row))
    scales = tensors[f"{row.module}.scales"].clone()
    scales[1, 3] = float("nan")
    with pytest.raises(CorruptCheckpointError, match="scales holds NaN or infinite"):
        layout.decode(row, {**tensors, f"{row.module}.scales": scales})
    zeros = tensors[f"{row.module}.qzeros"].clone()
    zeros[0, 0] ^= 1
    with pytest.raises(CorruptCheckpointError, match="not the middle of the grid, though the plan is symmetric"):
        layout.decode(row, {**tensors, f"{row.module}.qzeros": zeros})


REFUSED: dict[str, tuple[str, QuantConfig, str]] = {
    "8 bits": ("llama", RTNQuantConfig(bits=8, format="awq"), "4 bits, not 8"),
    "tensor": ("llama", RTNQuantConfig(group_size="tensor", format="awq"), "not per tensor"),
    "group of 8": ("llama", RTNQuantConfig(group_size=8, format="awq"), "groups of 16, 32, .* not 8"),
    "embeddings": ("llama", RTNQuantConfig(embeddings="int8", format="awq"), "nn.Linear, not Embedding"),
    "experts": ("qwen3-moe", RTNQuantConfig(format="awq"), "nn.Linear, not Qwen3MoeExperts"),
    "Conv1D": ("gpt2", RTNQuantConfig(format="awq"), "nn.Linear, not Conv1D"),
    "inputs": ("bert", Int8DynamicQuantConfig(format="awq"), "quantizes inputs as well"),
    "codebook": ("llama", CodebookQuantConfig(format="awq"), "uniform grids, not nf4"),
    "mixture": (
        "llama",
        RTNQuantConfig(format="awq", group_size=16, rules=[{"pattern": "*.down_proj", "group_size": 32}]),
        "one group size for all layers, and model.layers.0.self_attn.q_proj is int4-g16",
    ),
    "outputs": (
        "llama",
        RTNQuantConfig(format="awq", default_rules=False, skip=["model.embed_tokens"]),
        "multiple of 8, not 100",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_reason(case: str) -> None:
    family, config, reason = REFUSED[case]
    sizes = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    changes = {"vocab_size": 100} if case == "outputs" else {}
    with pytest.raises(FormatError, match=reason) as caught:
        plan(tiny(family, **sizes, **changes), config)
    assert "guarded" in str(caught.value.fix)


def test_refuses_what_stock_would_load_with_random_weights() -> None:
    """Stock keeps heads dense, and scales activations of some families by tensors that only AutoAWQ writes."""
    head = RTNQuantConfig(format="awq", default_rules=False, skip=["model.embed_tokens"])
    with pytest.raises(FormatError, match="stock transformers reads lm_head dense"):
        plan(tiny("llama", num_hidden_layers=1), head)
    config = GPTNeoXConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    with pytest.raises(FormatError, match="expects scaled activations in AWQ checkpoints of gpt_neox"):
        plan(model, RTNQuantConfig(format="awq"))


class Subclass(nn.Linear):
    """transformers would put a plain layer in its place."""


def test_refuses_layers_that_readers_do_not_replace() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.__class__ = Subclass
    with pytest.raises(FormatError, match="would drop what a subclass such as Subclass does"):
        plan(model, RTNQuantConfig(format="awq"))


def replaced(model: PreTrainedModel, values: dict[str, Any]) -> set[str]:
    """What `replace_with_awq_linear` replaces, by its source; it can't run without GPTQModel."""
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, values["modules_to_not_convert"], model._keep_in_fp32_modules, add_default_skips=True
    )
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name in linears if should_convert_module(name, skipped)}


SELECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "bert", "bert-classifier", "bart", "distilbert", "vit")},
    "one layer": ("llama", {"skip": ["*layers.1.mlp.down_proj"], "min_coverage": 0.1}),
    "attention": ("bert", {"skip": ["*output.dense", "pooler.dense"], "min_coverage": 0.1}),
    "experts kept": ("qwen3-moe", {"skip": ["*experts*"], "min_coverage": 0.01}),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_stock_replaces_the_planned_layers_and_no_others(case: str) -> None:
    family, fields = SELECTIONS[case]
    model = tiny(family)
    made = plan(model, RTNQuantConfig(**{"format": "awq", "group_size": 32, **fields}))
    values = format_of(made).quantization_config(made)
    assert replaced(model, values) == {row.module for row in made.quantized}
    names = {name for name, _ in model.base_model.named_modules()}
    inside = {row.module.removeprefix(f"{model.base_model_prefix}.") for row in made.quantized} & names
    assert replaced(model.base_model, values) == inside
    assert len(inside) >= len(made.quantized) - 1  # DistilBERT's head has one more


def test_config_is_one_that_transformers_reads() -> None:
    made, layout = planned(symmetric=False, group_size="channel")
    values = layout.quantization_config(made)
    assert json.loads(json.dumps(values)) == values
    config = AwqConfig.from_dict(values)
    assert (config.bits, config.group_size, config.zero_point, config.format) == (4, -1, True, "gemm")
    assert config.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize("case", PATHS)
def test_whole_path(case: str, tmp_path: Path, worker: CleanWorker) -> None:
    family, fields = PATHS[case]
    model = quantize(tiny(family), RTNQuantConfig(**{"format": "awq", **fields}))
    inputs = tiny_inputs(model)
    proof = save(model, tmp_path / "out", worker=worker)
    assert proof.level in ("own-reader", "full")
    assert verify(tmp_path / "out", worker=worker).level == proof.level
    loaded = hfc.load(tmp_path / "out")
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "awq"
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert set(first) == set(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_saves_in_another_format_and_stays_what_it_was(tmp_path: Path, worker: CleanWorker) -> None:
    model = quantize(tiny("llama"), RTNQuantConfig(format="awq", symmetric=False, group_size=32))
    inputs = tiny_inputs(model)
    for name in ("gptq_v2", "guarded"):
        save(model, tmp_path / name, format=name, worker=worker)
        again = hfc.load(tmp_path / name)
        assert torch.equal(output(again, inputs), output(model, inputs))
        saved, own = plan_of(again), plan_of(model)
        assert saved is not None
        assert own is not None
        assert (saved.format, own.format) == (name, "awq")
    assert model.config.quantization_config.to_dict()["quant_method"] == "awq"
    for name in ("bitsandbytes", "nonsense"):
        with pytest.raises(FormatError, match=name):
            save(model, tmp_path / "no", format=name, worker=worker)
    assert not (tmp_path / "no").exists()
