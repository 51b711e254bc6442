"""Schemes on one family: every bit width and strategy, zero points, mixed bits, embeddings, casts, W8A8 kernels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.modules.kernels.int_mm import IntMatmul
from hf_compress.modules.swap import PackedModule, packed_modules
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs
from tests.conformance.helpers import (
    plan_of,
    quantized,
    reference_logits,
    relative,
    schemes,
    stock_logits,
    tensors_on_disk,
)


def check_stock(family: str, config: Any, worker: CleanWorker, folder: Path, **overrides: Any) -> Any:
    """Quantize, save, and compare bits with a stock reload; the model."""
    model = quantized(family, tiny_dir(family, folder, **overrides), config)
    assert hfc.save(model, folder / "out", worker=worker).level == "full"
    inputs = tiny_inputs(model)
    assert torch.equal(stock_logits(worker, folder / "out", model, inputs), reference_logits(model, inputs))
    return model


@pytest.mark.parametrize(
    ("bits", "group_size"),
    [
        *((bits, 32) for bits in range(2, 9)),
        *((bits, span) for bits in (2, 3, 4, 8) for span in ("channel", "tensor")),
    ],
)
def test_bits_and_strategies(bits: int, group_size: int | str, worker: CleanWorker, tmp_path: Path) -> None:
    config = hfc.RTNQuantConfig(bits=bits, group_size=group_size)
    model = check_stock("llama", config, worker, tmp_path, num_hidden_layers=1)
    span = f"g{group_size}" if isinstance(group_size, int) else group_size
    assert schemes(model) == {f"int{bits}-{span}": 7, "kept": 2}
    words = tensors_on_disk(tmp_path / "out")["model.layers.0.mlp.down_proj.weight_packed"]
    assert words.dtype == torch.int32
    assert words.shape == (64, -(-128 * bits // 32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_more_bits_are_closer(bits: int) -> None:
    """6 dB a bit: what a uniform grid promises."""
    model = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=bits, group_size=32))
    noise = [row.sqnr_db for row in plan_of(model).quantized]
    mean = sum(noise) / len(noise)
    assert abs(mean - (6.02 * bits - 3.2)) < 2.5, f"{bits} bits: {mean:.1f} dB"


@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("family", ["llama", "bert-classifier", "t5"])
def test_asymmetric(family: str, group_size: int | str, worker: CleanWorker, tmp_path: Path) -> None:
    """Stock reads zero points by dequantizing while it loads; config.json asks for that."""
    config = hfc.RTNQuantConfig(bits=4, group_size=group_size, symmetric=False)
    model = check_stock(family, config, worker, tmp_path)
    assert all(name.endswith("-asym") for name in schemes(model) if name != "kept")
    native = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert native["quant_method"] == "compressed-tensors"
    assert native["dequantize"] is True
    tensors = tensors_on_disk(tmp_path / "out")
    assert sum(name.endswith("weight_zero_point") for name in tensors) == len(plan_of(model).quantized)


def test_asymmetric_per_tensor_is_refused_before_anything_is_written() -> None:
    with pytest.raises(hfc.HFCompressError, match="HFC801") as caught:
        hfc.plan(tiny("llama"), hfc.RTNQuantConfig(bits=4, group_size="tensor", symmetric=False))
    assert "zero point per tensor" in str(caught.value)


@pytest.mark.parametrize("method", ["int4", "w8a8"])
@pytest.mark.parametrize(("family", "tables"), [("llama", 1), ("bert-classifier", 3)])
def test_embeddings_int8(family: str, tables: int, method: str, worker: CleanWorker, tmp_path: Path) -> None:
    configs = {
        "int4": lambda: hfc.RTNQuantConfig(bits=4, group_size=32, embeddings="int8"),
        "w8a8": lambda: hfc.Int8DynamicQuantConfig(embeddings="int8"),
    }
    model = quantized(family, tiny_dir(family, tmp_path), configs[method]())
    assert hfc.save(model, tmp_path / "out", worker=worker).level == "full"
    inputs = tiny_inputs(model)
    found, mine = stock_logits(worker, tmp_path / "out", model, inputs), reference_logits(model, inputs)
    assert relative(found, mine) <= (1e-5 if method == "w8a8" else 0.0)
    packed = [row for row in plan_of(model).quantized if row.kind == "embedding"]
    assert len(packed) == tables
    assert {row.scheme for row in packed} == {"int8-channel"}
    tensors = tensors_on_disk(tmp_path / "out")
    assert all(tensors[f"{row.name}.weight"].dtype == torch.int8 for row in packed)


def test_mixed_bits_by_rules(worker: CleanWorker, tmp_path: Path) -> None:
    config = hfc.RTNQuantConfig(
        bits=4,
        group_size=32,
        rules=[
            hfc.Rule(pattern="down_proj", bits=8, group_size="channel"),
            hfc.Rule(pattern="re:model.layers.1.self_attn", bits=3),
            hfc.Rule(pattern="model.layers.1.self_attn.v_proj", keep=True),
            hfc.Rule(pattern="lm_head", keep=False, bits=6, group_size=16),
        ],
    )
    model = check_stock("llama", config, worker, tmp_path)
    assert schemes(model) == {"int3-g32": 3, "int4-g32": 8, "int6-g16": 1, "int8-channel": 2, "kept": 2}
    kept = {row.name: row.reason for row in plan_of(model).rows if not row.covered}
    assert kept.keys() == {"model.embed_tokens", "model.layers.1.self_attn.v_proj"}
    assert "rule" in kept["model.layers.1.self_attn.v_proj"]
    loaded = hfc.load(tmp_path / "out")
    assert plan_of(loaded) == plan_of(model)
    inputs = tiny_inputs(model)
    assert torch.equal(reference_logits(loaded, inputs), reference_logits(model, inputs))


def test_heads_and_everything_on_request(worker: CleanWorker, tmp_path: Path) -> None:
    config = hfc.RTNQuantConfig(bits=8, group_size=32, default_rules=False)
    model = check_stock("llama", config, worker, tmp_path)
    assert schemes(model)["int8-g32"] == 15
    assert not [row for row in plan_of(model).rows if not row.covered]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["bert-classifier", "llama-tied", "t5", "gpt2", "qwen3-moe", "vit"])
def test_cast(family: str, dtype: str, worker: CleanWorker, tmp_path: Path) -> None:
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = quantized(family, tiny_dir(family, tmp_path), hfc.CastConfig(dtype=dtype))
    out = tmp_path / "out"
    assert hfc.save(model, out, worker=worker).level == "full"
    inputs = tiny_inputs(model)
    found = stock_logits(worker, out, model, inputs)
    assert found.dtype == target
    assert torch.equal(found, output(model, inputs))
    assert torch.equal(output(hfc.load(out), inputs), found)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(target).removeprefix("torch.")
    assert "quantization_config" not in config
    assert plan_of(model).coverage == 1.0
    on_disk = {value.dtype for value in tensors_on_disk(out).values()}
    assert on_disk == {value.dtype for value in model.parameters()}
    assert on_disk == {target} or (family, dtype) == ("t5", "fp16")  # transformers keeps T5's `wo` in float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["bert-classifier", "llama", "t5", "gpt2", "qwen3-moe"])
def test_cast_plan_says_what_every_weight_is(family: str, dtype: str, tmp_path: Path) -> None:
    """T5 in float16: transformers keeps `wo` in float32 (`_keep_in_fp32_modules`)."""
    model = quantized(family, tiny_dir(family, tmp_path), hfc.CastConfig(dtype=dtype))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    actual = {row.name: str(parameters[row.key].dtype).removeprefix("torch.") for row in plan_of(model).rows}
    assert {row.name: row.cast or row.dtype for row in plan_of(model).rows} == actual


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["bert-classifier", "llama", "t5", "gpt2", "qwen3-moe"])
def test_cast_of_a_live_model_is_the_same_and_can_be_saved(
    family: str, dtype: str, worker: CleanWorker, tmp_path: Path
) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies, stay in float32 as in a reload."""
    loaded = quantized(family, tiny_dir(family, tmp_path), hfc.CastConfig(dtype=dtype))
    live = hfc.quantize(tiny(family), hfc.CastConfig(dtype=dtype))
    inputs = tiny_inputs(loaded)
    assert {name: value.dtype for name, value in live.named_buffers()} == {
        name: value.dtype for name, value in loaded.named_buffers()
    }
    assert torch.equal(output(live, inputs), output(loaded, inputs))
    assert hfc.save(live, tmp_path / "out", worker=worker).level == "full"


def layer_errors(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Per packed module with a kernel: relative difference of the kernel to the reference, on the same input."""
    errors: dict[str, float] = {}

    def hook_for(path: str) -> Any:
        def hook(module: PackedModule, args: tuple[Any, ...], result: torch.Tensor) -> None:
            kernel, module.hfc_kernel = module.hfc_kernel, None
            try:
                errors[path] = relative(result, module.forward(*args))
            finally:
                module.hfc_kernel = kernel

        return hook

    handles = [
        module.register_forward_hook(hook_for(path))
        for path, module in packed_modules(model)
        if module.hfc_kernel is not None
    ]
    try:
        output(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return errors


@pytest.fixture
def with_kernel() -> Any:
    """Give the integer kernel to every module it supports, whether or not it is faster on this busy machine."""

    def use(model: nn.Module) -> int:
        kernel = IntMatmul()
        count = 0
        for _, module in packed_modules(model):
            layout = module.hfc_layouts.get("weight")
            if layout is not None and kernel.refusal(module, layout) is None:
                module.hfc_kernel = kernel
                count += 1
        return count

    return use


def exact_here() -> bool:
    """Whether this processor multiplies int8 exactly."""
    codes = torch.full((16, 512), -128, dtype=torch.int8)
    values = torch.full((128, 512), 127, dtype=torch.int8)
    return bool((torch._int_mm(values, codes.t()) == -128 * 127 * 512).all())


@pytest.mark.skipif(not exact_here(), reason="torch._int_mm saturates on this processor (no VNNI)")
@pytest.mark.parametrize(
    ("family", "linears"), [("bert-classifier", 12), ("llama", 14), ("t5", 32), ("vit", 12), ("whisper", 32)]
)
def test_w8a8_kernel_agrees_with_the_reference_layer_by_layer(
    family: str, linears: int, with_kernel: Any, worker: CleanWorker, tmp_path: Path
) -> None:
    """On the model that was quantized and on its reload; through whole models rounding amplifies, so per layer."""
    model = quantized(family, tiny_dir(family, tmp_path), hfc.Int8DynamicQuantConfig())
    hfc.save(model, tmp_path / "out", worker=worker)
    for one in (model, hfc.load(tmp_path / "out")):
        assert with_kernel(one) == linears
        errors = layer_errors(one, tiny_inputs(one))
        assert len(errors) == linears
        assert max(errors.values()) <= IntMatmul.tolerance, errors
        assert IntMatmul.tolerance <= 1e-4


def test_kernels_are_chosen_alike_everywhere(worker: CleanWorker, tmp_path: Path) -> None:
    """The probe is measured once per process: quantizing, loading and optimizing give the same kernels."""
    model = quantized("llama", tiny_dir("llama", tmp_path), hfc.Int8DynamicQuantConfig())
    hfc.save(model, tmp_path / "out", worker=worker)
    counts = hfc.inspect(model).kernels
    assert counts is not None
    assert sum(counts.values()) == 14
    assert hfc.inspect(hfc.load(tmp_path / "out")).kernels == counts
    assert hfc.inspect(hfc.optimize_for_inference(model)).kernels == counts
    weight_only = quantized("llama", tmp_path / "llama", hfc.RTNQuantConfig(bits=8, group_size="channel"))
    assert hfc.inspect(weight_only).kernels == {"reference": 14}


def test_w8a8_keeps_the_pooler_weight_only() -> None:
    """Its input is (batch, features): a scale per token would span the batch."""
    model = hfc.quantize(tiny("bert-classifier"), hfc.Int8DynamicQuantConfig())
    rows = {row.name: row for row in plan_of(model).rows}
    pooler = rows["bert.pooler.dense"]
    assert pooler.scheme == "int8-channel"
    assert pooler.quantization.input_activations is None
    others = Counter(row.scheme for row in rows.values() if row.name != "bert.pooler.dense")
    assert others == {"w8a8-dynamic-token": 12, "kept": 4}


def test_w8a8_rows_do_not_influence_each_other() -> None:
    """A scale per token: an outlier in one row of the batch changes no other row."""
    model = hfc.quantize(tiny("bert-classifier"), hfc.Int8DynamicQuantConfig())
    inputs = tiny_inputs(model)
    alone = {name: value[:1] for name, value in inputs.items()}
    assert relative(reference_logits(model, alone), reference_logits(model, inputs)[:1]) <= 1e-5
