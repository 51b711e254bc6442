from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_compress.checkpoint.save import load, save
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CorruptCheckpointError, FormatError
from hf_compress.core.plan import Plan, PlanRow
from hf_compress.formats.base import CheckpointFormat, encode_model, format_of
from hf_compress.methods.cast import CastConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.packed import PackedTensor
from hf_compress.modules.swap import packed_modules, packed_tensor
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import packed_of
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs

CASES: dict[str, tuple[str, QuantConfig]] = {
    **{f"int{bits}": ("llama", RTNQuantConfig(bits=bits)) for bits in range(2, 9)},
    "asymmetric": ("llama", RTNQuantConfig(symmetric=False)),
    "asymmetric 8": ("llama", RTNQuantConfig(bits=8, symmetric=False, group_size=-1)),
    "asymmetric 3": ("llama", RTNQuantConfig(bits=3, symmetric=False)),
    "tensor": ("llama", RTNQuantConfig(group_size="tensor")),
    "channel": ("llama", RTNQuantConfig(group_size="channel")),
    "embeddings": ("llama", RTNQuantConfig(embeddings="int8")),
    "w8a8": ("bert", Int8DynamicQuantConfig()),
    "experts 4": ("qwen3-moe", RTNQuantConfig(bits=4)),
    "experts 8": ("mixtral", RTNQuantConfig(bits=8, group_size="channel")),
    "experts w8a8": ("qwen3-moe", Int8DynamicQuantConfig()),
    "guarded": ("llama", RTNQuantConfig(bits=3, symmetric=False, group_size="tensor", format="guarded")),
    "guarded experts": ("qwen3-moe", RTNQuantConfig(bits=5, symmetric=False, format="guarded")),
    "guarded conv1d": ("gpt2", RTNQuantConfig(bits=6)),
    "guarded conv1d w8a8": ("gpt2", Int8DynamicQuantConfig()),
}


def planned(case: str) -> tuple[Plan, CheckpointFormat]:
    family, config = CASES[case]
    made = plan(tiny(family, num_hidden_layers=1) if family != "gpt2" else tiny(family, n_layer=1), config)
    return made, format_of(made)


def packed_row(row: PlanRow, seed: int = 0) -> PackedTensor:
    assert row.quantization is not None
    weights = row.quantization.weights
    assert weights is not None
    size: int | str = weights.group_size if weights.strategy == "group" else str(weights.strategy)
    made = packed_of(row.shape, weights.num_bits, size, weights.symmetric, transposed=row.transposed, seed=seed)
    layout = type(made.layout)(row.shape, row.quantization, row.transposed)
    return PackedTensor(layout, made.codes, made.scale, made.zero_point)


def same(first: PackedTensor, second: PackedTensor) -> bool:
    pairs = zip((first.codes, first.scale), (second.codes, second.scale), strict=True)
    if not all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs):
        return False
    if first.zero_point is None or second.zero_point is None:
        return first.zero_point is second.zero_point
    return first.zero_point.dtype == second.zero_point.dtype and torch.equal(first.zero_point, second.zero_point)


def distinct(made: Plan) -> list[PlanRow]:
    """One row per kind, scheme and shape."""
    return list({(row.kind, row.scheme, row.shape): row for row in made.quantized}.values())


@pytest.mark.parametrize("case", CASES)
def test_decode_undoes_encode(case: str) -> None:
    made, layout = planned(case)
    for row in distinct(made):
        packed = packed_row(row)
        tensors = layout.encode(row, packed)
        assert set(tensors) == set(layout.keys(row))
        again = layout.decode(row, tensors)
        assert same(again, packed)
        assert again.layout == packed.layout
        assert torch.equal(again.dense(), packed.dense())


@pytest.mark.parametrize("case", CASES)
def test_tensors_can_be_written(case: str) -> None:
    """safetensors wants contiguous tensors that share no memory."""
    made, layout = planned(case)
    for row in distinct(made):
        tensors = layout.encode(row, packed_row(row))
        assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("case", CASES)
def test_missing_tensor_is_corrupt(case: str) -> None:
    made, layout = planned(case)
    for row in distinct(made):
        tensors = layout.encode(row, packed_row(row))
        for key in list(layout.keys(row))[:8]:
            if key.endswith("weight_shape"):
                continue
            with pytest.raises(CorruptCheckpointError, match="has no tensor") as caught:
                layout.decode(row, {name: value for name, value in tensors.items() if name != key})
            assert key in str(caught.value)


def test_missing_or_wrong_weight_shape_is_corrupt() -> None:
    """Stock readers need it: without it, or with another, the checkpoint is of use to us alone."""
    made, layout = planned("int4")
    row = made.quantized[0]
    tensors = layout.encode(row, packed_row(row))
    key = f"{row.name}.weight_shape"
    with pytest.raises(CorruptCheckpointError):
        layout.decode(row, {**tensors, key: tensors[key] + 8})
    del tensors[key]
    with pytest.raises(CorruptCheckpointError):
        layout.decode(row, tensors)


def damaged(value: Tensor) -> dict[str, Tensor]:
    """The same values with one row less, one column less, and transposed where that differs."""
    made = {"row": value[:-1].contiguous(), "dimension": value.flatten()}
    if value.ndim > 1:
        made["column"] = value[..., :-1].contiguous()
        if value.shape[-1] != value.shape[-2]:
            made["transposed"] = value.transpose(-1, -2).contiguous()
    return {name: one for name, one in made.items() if one.shape != value.shape}


@pytest.mark.parametrize("suffix", ["packed", "weight", "scale", "zero_point"])
@pytest.mark.parametrize("case", CASES)
def test_wrong_shape_is_corrupt(case: str, suffix: str) -> None:
    made, layout = planned(case)
    for row in distinct(made):
        tensors = layout.encode(row, packed_row(row))
        key = next((key for key in layout.keys(row) if key.endswith(suffix)), None)
        if key is None:
            continue
        for name, value in damaged(tensors[key]).items():
            print(f"{key} ({name}): {tuple(value.shape)}")  # shown when it was accepted
            with pytest.raises(CorruptCheckpointError):
                layout.decode(row, {**tensors, key: value})


@pytest.mark.parametrize("case", ["int4", "int8", "w8a8", "guarded", "experts 4"])
def test_codes_of_another_type_are_corrupt(case: str) -> None:
    made, layout = planned(case)
    row = made.quantized[0]
    tensors = layout.encode(row, packed_row(row))
    key = next(key for key in layout.keys(row) if key.endswith(("packed", ".weight")))
    with pytest.raises(CorruptCheckpointError):
        layout.decode(row, {**tensors, key: tensors[key].to(torch.float32)})


def test_encode_model_replaces_packed_tensors_only() -> None:
    model = quantize(tiny("qwen3-moe", num_hidden_layers=1), RTNQuantConfig())
    made = model.hfc_plan
    layout = format_of(made)
    state = encode_model(model, made, layout)
    wanted = {key for row in made.quantized for key in layout.keys(row)}
    assert wanted <= set(state)
    dense = {name for name, _ in tiny("qwen3-moe", num_hidden_layers=1).named_parameters()}
    assert set(state) - wanted == dense - {row.key for row in made.quantized}
    rows = {(row.module, row.parameter): row for row in made.quantized}
    for path, module in packed_modules(model):
        for name in module.hfc_layouts:
            assert same(layout.decode(rows[path, name], state), packed_tensor(module, name))


def config_of(family: str, config: QuantConfig) -> tuple[dict[str, Any], Plan]:
    made = plan(tiny(family), config)
    return format_of(made).quantization_config(made), made


def test_single_scheme_targets_the_class() -> None:
    values, _ = config_of("llama", RTNQuantConfig())
    assert values["quant_method"] == "compressed-tensors"
    assert values["format"] == "pack-quantized"
    assert values["quantization_status"] == "compressed"
    assert list(values["config_groups"]) == ["group_0"]
    group = values["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 64)
    assert group["input_activations"] is None
    assert values["ignore"] == ["lm_head"]
    assert "dequantize" not in values


def test_kept_linears_are_ignored() -> None:
    values, _ = config_of("llama", RTNQuantConfig(skip=["k_proj"], min_coverage=0))
    assert values["ignore"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "lm_head",
    ]


def test_mixed_schemes_target_names() -> None:
    rules = [{"pattern": "self_attn", "bits": 8, "group_size": "channel"}]
    values, made = config_of("llama", RTNQuantConfig(rules=rules))
    groups = values["config_groups"]
    assert values["format"] == "pack-quantized"
    assert len(groups) == 2
    for group in groups.values():
        bits = group["weights"]["num_bits"]
        assert group["targets"] == [row.module for row in made.quantized if row.quantization.weights.num_bits == bits]
    targeted = [target for group in groups.values() for target in group["targets"]]
    assert sorted(targeted) == sorted(row.module for row in made.quantized)


def test_mixed_storages() -> None:
    values, _ = config_of("llama", RTNQuantConfig(embeddings="int8"))
    assert values["format"] == "mixed-precision"
    formats = {group["format"]: group["targets"] for group in values["config_groups"].values()}
    assert formats["int-quantized"] == ["model.embed_tokens"]
    assert len(formats["pack-quantized"]) == 14


def test_w8a8_groups() -> None:
    values, _ = config_of("bert", Int8DynamicQuantConfig())
    by_inputs = {bool(group["input_activations"]): group for group in values["config_groups"].values()}
    assert by_inputs[False]["targets"] == ["pooler.dense"]
    assert len(by_inputs[True]["targets"]) == 12
    inputs = by_inputs[True]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"], inputs["num_bits"]) == (True, "token", 8)


@pytest.mark.parametrize("config", [RTNQuantConfig(), Int8DynamicQuantConfig()], ids=repr)
def test_experts_have_their_own_group(config: QuantConfig) -> None:
    values, _ = config_of("qwen3-moe", config)
    groups = values["config_groups"]
    assert groups["experts"]["targets"] == ["re:.*experts.*"]
    assert groups["experts"]["input_activations"] is None
    assert groups["experts"]["format"] == "pack-quantized"
    assert groups["group_0"]["targets"] == ["Linear"]
    assert values["ignore"] == ["lm_head"]


@pytest.mark.parametrize(("family", "config"), [("llama", RTNQuantConfig(symmetric=False)), ("t5", RTNQuantConfig())])
def test_dequantize_where_stock_needs_it(family: str, config: QuantConfig) -> None:
    assert config_of(family, config)[0]["dequantize"] is True


def test_guard_has_no_method() -> None:
    values, made = config_of("gpt2", RTNQuantConfig())
    assert "quant_method" not in values
    assert "HFC901" in values["guard"]
    assert format_of(made).weights_file == "hf_compress.safetensors"
    assert format_of(made).stock_reader is None


def test_dense_holds_nothing_packed() -> None:
    values, made = config_of("llama", CastConfig())
    layout = format_of(made)
    assert (layout.name, values) == ("dense", {})
    packed = plan(tiny("llama"), RTNQuantConfig())
    row = packed.quantized[0]
    assert layout.refusal(row, packed) is not None
    assert layout.keys(row) == []
    with pytest.raises(ValueError, match="a dense checkpoint"):
        layout.encode(row, packed_row(row))
    with pytest.raises(ValueError, match="dense checkpoint"):
        layout.decode(row, {})


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_scales_of_another_format_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    """Scales that were made for compressed-tensors are float32; these layouts store float16."""
    model = quantize(tiny("llama"), RTNQuantConfig(bits=4, group_size=32))
    with pytest.raises(FormatError, match=f"{name!r} stores scales as float16") as caught:
        save(model, tmp_path / "out", format=name)
    assert f'format="{name}" in its configuration' in str(caught.value.fix)
    assert not list(tmp_path.iterdir())
    assert model.config.quantization_config.to_dict()["quant_method"] == "compressed-tensors"


def test_scales_that_fit_may_change_their_format(tmp_path: Path, worker: CleanWorker) -> None:
    """Those of bfloat16 models, as long as they are no smaller than float16's."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama", tmp_path / "dense"), dtype=torch.bfloat16)
    model = quantize(model, RTNQuantConfig(bits=4, group_size=32))
    save(model, tmp_path / "out", format="gptq_v2", worker=worker)
    inputs = tiny_inputs(model)
    assert torch.equal(output(load(tmp_path / "out"), inputs), output(model, inputs))


def test_an_unknown_format_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    model = quantize(tiny("llama"), RTNQuantConfig(bits=4, group_size=32))
    with pytest.raises(FormatError, match="no format 'nope'") as caught:
        save(model, tmp_path / "out", format="nope")
    assert all(repr(name) in str(caught.value.fix) for name in ("gptq_v2", "awq", "guarded", "compressed-tensors"))
    assert not list(tmp_path.iterdir())
