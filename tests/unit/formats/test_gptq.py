from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.gptq.utils import get_layers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPTQConfig, PreTrainedModel
from typer.testing import CliRunner

import hf_compress as hfc
from hf_compress.checkpoint.save import save, verify
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.cli.main import app
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CorruptCheckpointError, FormatError
from hf_compress.core.plan import DTYPES, Plan, PlanRow
from hf_compress.formats.base import format_of
from hf_compress.formats.gptq import GPTQFormat
from hf_compress.methods.codebook import CodebookQuantConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.packed import Layout, PackedTensor, unpack_codes
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize
from tests._utils.packing import packed_of
from tests._utils.tiny import output, tiny, tiny_dir, tiny_inputs

GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
FORMATS = ["gptq", "gptq_v2"]
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"bits": 4, "symmetric": False, "format": "gptq_v2"}),
    "llama v1": ("llama", {"bits": 4, "format": "gptq", "group_size": 32}),
    "llama 3 bits": ("llama", {"bits": 3, "symmetric": False, "format": "gptq_v2", "group_size": 16}),
    "bert": ("bert", {"bits": 2, "symmetric": False, "format": "gptq_v2", "group_size": 32}),
    "bert v1": ("bert-classifier", {"bits": 8, "symmetric": False, "format": "gptq"}),
    "gpt2": ("gpt2", {"bits": 8, "symmetric": False, "format": "gptq_v2", "group_size": "channel"}),
    "gpt2 v1": ("gpt2", {"bits": 3, "format": "gptq"}),
}


def planned(family: str = "llama", **fields: Any) -> tuple[Plan, GPTQFormat]:
    small = {"gpt2": {"n_layer": 1}, "t5": {"num_layers": 1}, "vit": {}}.get(family, {"num_hidden_layers": 1})
    made = plan(tiny(family, **small), RTNQuantConfig(**{"format": "gptq", **fields}))
    layout = format_of(made)
    assert isinstance(layout, GPTQFormat)
    return made, layout


def packed_row(row: PlanRow, lowest: bool = True) -> PackedTensor:
    """Random codes, scales that fit float16, and zero points (`lowest`: also at the lowest code) for a row."""
    assert row.quantization is not None
    weights = row.quantization.weights
    assert weights is not None
    size: int | str = weights.group_size if weights.strategy == "group" else str(weights.strategy)
    made = packed_of(row.shape, weights.num_bits, size, weights.symmetric)
    scale = made.scale.to(torch.float16).to(torch.bfloat16).to(DTYPES[row.dtype])
    zeros, limit = made.zero_point, 1 << (weights.num_bits - 1)
    if zeros is not None:
        zeros.view(-1)[0], zeros.view(-1)[-1] = -limit, limit - 1
        zeros = zeros if lowest else zeros.clamp(min=1 - limit)
    return PackedTensor(Layout(row.shape, row.quantization, row.transposed), made.codes, scale, zeros)


def slow_pack(values: list[int], bits: int) -> list[int]:
    """AutoGPTQ's `QuantLinear.pack` for one column: unsigned codes to unsigned 32-bit words."""
    words = [0] * (len(values) * bits // 32)
    if bits != 3:
        for index, value in enumerate(values):
            words[index // (32 // bits)] |= value << (bits * (index % (32 // bits)))
        return words
    i = row = 0
    while row < len(words):
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i))
        i += 10
        words[row] |= (values[i] << 30) & 0xFFFFFFFF
        row += 1
        words[row] |= (values[i] >> 2) & 1
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 1)
        i += 10
        words[row] |= (values[i] << 31) & 0xFFFFFFFF
        row += 1
        words[row] |= (values[i] >> 1) & 0x3
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 2)
        i += 10
        row += 1
    return words


def slow_unpack(words: list[int], bits: int) -> list[int]:
    """AutoGPTQ's dequantization of one column: unsigned 32-bit words to unsigned codes, by their bits."""
    stream = "".join(f"{word:032b}"[::-1] for word in words)
    return [int(stream[start : start + bits][::-1], 2) for start in range(0, len(stream), bits)]


def signed(words: list[list[int]]) -> Tensor:
    """Unsigned words as int32."""
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def unsigned(words: Tensor) -> list[int]:
    return [int(word) & 0xFFFFFFFF for word in words.tolist()]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("size", [16, "channel"])
def test_tensors_are_those_that_autogptq_packs(name: str, bits: int, symmetric: bool, size: int | str) -> None:
    made, layout = planned(bits=bits, symmetric=symmetric, group_size=size, format=name)
    row = made.quantized[1]  # 32 outputs, 64 inputs
    packed = packed_row(row, lowest=name == "gptq_v2")
    middle = 1 << (bits - 1)
    codes = unpack_codes(packed.codes, bits, 64).to(torch.int64) + middle
    zeros = torch.full(packed.scale.shape, middle) if packed.zero_point is None else packed.zero_point.long() + middle
    stored = zeros - 1 if name == "gptq" else zeros

    tensors = layout.encode(row, packed)

    qweight = signed([slow_pack(codes[out].tolist(), bits) for out in range(32)]).t()
    qzeros = signed([slow_pack(stored[:, group].tolist(), bits) for group in range(stored.shape[1])])
    assert tensors[f"{row.module}.qweight"].dtype == tensors[f"{row.module}.qzeros"].dtype == torch.int32
    assert torch.equal(tensors[f"{row.module}.qweight"], qweight)
    assert torch.equal(tensors[f"{row.module}.qzeros"], qzeros)
    assert tensors[f"{row.module}.scales"].dtype == torch.float16
    assert torch.equal(tensors[f"{row.module}.scales"].float(), packed.scale.t())
    span = 64 if size == "channel" else size
    assert tensors[f"{row.module}.g_idx"].tolist() == [index // int(span) for index in range(64)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_autogptqs_arithmetic_gives_the_same_weights(name: str, bits: int, symmetric: bool) -> None:
    """scale × (code - zero), with scale and zero of the group that `g_idx` names, in float64."""
    made, layout = planned(bits=bits, symmetric=symmetric, group_size=16, format=name)
    row = made.quantized[1]
    packed = packed_row(row, lowest=name == "gptq_v2")
    qweight, qzeros, scales, g_idx = (layout.encode(row, packed)[key] for key in layout.keys(row))
    zeros = [slow_unpack(unsigned(words), bits) for words in qzeros]
    offset = 1 if name == "gptq" else 0
    for out in range(0, 32, 5):
        codes = slow_unpack(unsigned(qweight[:, out]), bits)
        groups = g_idx.tolist()
        dense = [
            float(scales[group, out]) * (code - zeros[group][out] - offset)
            for code, group in zip(codes, groups, strict=True)
        ]
        assert torch.equal(torch.tensor(dense, dtype=torch.float64).float(), packed.dense()[out])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decode_undoes_encode(family: str, name: str, bits: int, symmetric: bool) -> None:
    made, layout = planned(family, bits=bits, symmetric=symmetric, group_size=32, format=name)
    for row in {row.shape: row for row in made.quantized}.values():
        packed = packed_row(row, lowest=name == "gptq_v2")
        tensors = layout.encode(row, packed)
        assert list(tensors) == layout.keys(row)
        assert layout.owned({**tensors, "other.scales": torch.zeros(1)}) == set(tensors)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        again = layout.decode(row, tensors)
        assert again.layout == packed.layout
        assert torch.equal(again.codes, packed.codes)
        assert again.codes.dtype == packed.codes.dtype
        assert torch.equal(again.scale, packed.scale)
        assert again.scale.dtype == packed.scale.dtype
        assert (again.zero_point is None) == symmetric
        assert torch.equal(again.dense(), packed.dense())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scales_are_planned_to_survive_float16(dtype: str) -> None:
    made = plan(tiny("llama", dtype=DTYPES[dtype]), RTNQuantConfig(format="gptq"))
    row = made.quantized[0]
    assert row.quantization is not None
    assert row.quantization.weights is not None
    assert row.quantization.weights.scale_dtype == (None if dtype == "float16" else torch.float16)
    layout = format_of(made)
    packed = packed_row(row)
    tensors = layout.encode(row, packed)
    assert tensors[f"{row.module}.scales"].dtype == torch.float16
    again = layout.decode(row, tensors)
    assert again.scale.dtype == DTYPES[dtype]
    assert torch.equal(again.scale, packed.scale)


@pytest.mark.parametrize("factor", [1 + 2**-20, 1e6, 1e-6])
def test_scales_that_float16_can_not_hold_are_refused(factor: float) -> None:
    made, layout = planned()
    row = made.quantized[0]
    packed = packed_row(row)
    with pytest.raises(FormatError, match=re.escape(f"Scales of {row.name} do not fit float16")):
        layout.encode(row, replace(packed, scale=packed.scale * factor))


def test_a_model_cast_after_it_was_compressed_is_refused(tmp_path: Path) -> None:
    model = quantize(tiny("llama", num_hidden_layers=1), RTNQuantConfig(format="gptq"))
    for child in model.children():
        child.half()
    with pytest.raises(FormatError, match=r"was compressed in float32 and is torch\.float16 now"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def with_positive_layer() -> tuple[PreTrainedModel, str]:
    """A model with a weight whose values are all positive: its zero points are at the lowest code."""
    model = tiny("llama", num_hidden_layers=1)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    layer.weight.data.abs_().add_(0.1)
    return model, "model.layers.0.mlp.up_proj"


def test_v1_has_no_place_for_zero_points_at_the_lowest_code(tmp_path: Path) -> None:
    model, name = with_positive_layer()
    model = quantize(model, RTNQuantConfig(symmetric=False, format="gptq"))
    for write in (model.save_pretrained, lambda path: save(model, path)):
        with pytest.raises(FormatError, match=f"{name} has zero points at the lowest code \\(128 of 128\\)") as caught:
            write(tmp_path / "out")
        assert 'format="gptq_v2"' in str(caught.value.fix)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_v2_has_a_place_for_them(tmp_path: Path, worker: CleanWorker) -> None:
    model, name = with_positive_layer()
    model = quantize(model, RTNQuantConfig(symmetric=False, format="gptq_v2"))
    save(model, tmp_path / "out", worker=worker)
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{name}.qzeros"].count_nonzero() == 0
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(tmp_path / "out"), inputs), output(model, inputs))


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_or_wrong_tensors_are_corrupt(suffix: str) -> None:
    made, layout = planned(symmetric=False, format="gptq_v2", group_size=16)
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
    order = tensors[f"{row.module}.g_idx"].flip(0)
    with pytest.raises(CorruptCheckpointError, match="g_idx does not count the groups up, as the plan says"):
        layout.decode(row, {**tensors, f"{row.module}.g_idx": order})
    for bad in (float("nan"), float("inf")):
        scales = tensors[f"{row.module}.scales"].clone()
        scales[1, 3] = bad
        with pytest.raises(CorruptCheckpointError, match="scales holds NaN or infinite"):
            layout.decode(row, {**tensors, f"{row.module}.scales": scales})
    zeros = tensors[f"{row.module}.qzeros"].clone()
    zeros[0, 0] ^= 1
    with pytest.raises(CorruptCheckpointError, match="not the middle of the grid, though the plan is symmetric"):
        layout.decode(row, {**tensors, f"{row.module}.qzeros": zeros})
    zeros[0, 0] |= 15
    with pytest.raises(CorruptCheckpointError, match="qzeros holds 15, which 'gptq' never stores"):
        layout.decode(row, {**tensors, f"{row.module}.qzeros": zeros})


REFUSED: dict[str, tuple[str, QuantConfig, str]] = {
    "5 bits": ("llama", RTNQuantConfig(bits=5, format="gptq"), "2, 3, 4 or 8 bits, not 5"),
    "tensor": ("llama", RTNQuantConfig(group_size="tensor", format="gptq"), "not per tensor"),
    "group of 8": ("llama", RTNQuantConfig(group_size=8, format="gptq_v2"), "groups of 16, 32, .* not 8"),
    "embeddings": ("llama", RTNQuantConfig(embeddings="int8", format="gptq"), "not Embedding"),
    "experts": ("qwen3-moe", RTNQuantConfig(format="gptq"), "not Qwen3MoeExperts"),
    "inputs": ("bert", Int8DynamicQuantConfig(format="gptq"), "quantizes inputs as well"),
    "codebook": ("llama", CodebookQuantConfig(format="gptq"), "uniform grids, not nf4"),
    "mixture": (
        "llama",
        RTNQuantConfig(format="gptq", rules=[{"pattern": "*.down_proj", "bits": 8}]),
        "one bit width, group size and symmetry for all layers .*ignores GPTQModel's `dynamic`",
    ),
    "outputs": (
        "llama",
        RTNQuantConfig(bits=3, format="gptq", default_rules=False, skip=["model.embed_tokens"]),
        "3-bit inputs and outputs must be multiples of 32, not 64 and 100",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_reason(case: str) -> None:
    family, config, reason = REFUSED[case]
    changes = {"vocab_size": 100} if case == "outputs" else {}
    with pytest.raises(FormatError, match=reason) as caught:
        plan(tiny(family, num_hidden_layers=1, **changes), config)
    assert "guarded" in str(caught.value.fix)


def test_convolutions_are_left_out() -> None:
    made, layout = planned("vit")
    kinds = {str(row.kind) for row in made.quantized}
    assert kinds == {"linear"}
    assert layout.quantization_config(made)["group_size"] == 64


class Subclass(nn.Linear):
    """Not replaced: optimum looks for the class itself."""


def test_refuses_layers_that_readers_do_not_replace() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.__class__ = Subclass
    with pytest.raises(FormatError, match=r"plain nn\.Linear, not a subclass such as Subclass"):
        plan(model, RTNQuantConfig(format="gptq"))
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(FormatError, match=r"holds by number \(model.layers.0.mlp.up_proj.0\)"):
        plan(model, RTNQuantConfig(format="gptq"))


def test_refuses_layers_that_names_can_not_tell_apart() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].lm_head = nn.Linear(64, 64, device="meta")
    skip = ["model.embed_tokens", "model.layers.0.lm_head"]
    with pytest.raises(
        FormatError, match="by the end of their names, and a layer that is kept has the same"
    ) as caught:
        plan(model, RTNQuantConfig(format="gptq", default_rules=False, skip=skip))
    assert "can't hold lm_head " in str(caught.value)
    made = plan(model, RTNQuantConfig(format="gptq", default_rules=False, skip=["model.embed_tokens", "re:^lm_head$"]))
    assert "model.layers.0.lm_head" in {row.name for row in made.quantized}
    assert replaced(model, format_of(made).quantization_config(made)) == {row.name for row in made.quantized}


def replaced(model: PreTrainedModel, values: dict[str, Any]) -> set[str]:
    """What `optimum.gptq.GPTQQuantizer.convert_model` replaces, by its source; it can't run without GPTQModel."""
    found = get_layers(model, prefix=values["block_name_to_quantize"])
    endings = [ending for block in values["modules_in_block_to_quantize"] for ending in block]
    return {name for name in found if any(name.endswith(ending) for ending in endings)}


SELECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "bert", "bert-classifier", "gpt2", "t5", "bart", "distilbert")},
    "one layer": ("llama", {"skip": ["*layers.1.mlp.down_proj"], "min_coverage": 0.1}),
    "attention": ("bert", {"skip": ["*output.dense", "pooler.dense"], "min_coverage": 0.1}),
    "head": ("llama", {"default_rules": False, "skip": ["model.embed_tokens"]}),
    "classifier": ("bert-classifier", {"bits": 8, "default_rules": False, "skip": ["*embeddings*", "classifier"]}),
    "conv": ("vit", {}),
    "experts kept": ("qwen3-moe", {"skip": ["*experts*"], "min_coverage": 0.01}),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_stock_replaces_the_planned_layers_and_no_others(case: str) -> None:
    family, fields = SELECTIONS[case]
    model = tiny(family)
    made = plan(model, RTNQuantConfig(**{"format": "gptq", "group_size": 32, **fields}))
    values = format_of(made).quantization_config(made)
    assert replaced(model, values) == {row.module for row in made.quantized}
    if case != "head":  # without its head, a model has other names
        names = {name for name, _ in model.base_model.named_modules()}
        inside = {row.module.removeprefix(f"{model.base_model_prefix}.") for row in made.quantized} & names
        assert replaced(model.base_model, values) == inside
        assert len(inside) >= len(made.quantized) - 1  # DistilBERT's head has one more


@pytest.mark.parametrize("case", SELECTIONS)
def test_gptqmodels_own_loader_is_told_what_is_kept(case: str) -> None:
    """It replaces every linear layer of a block, but those that a pattern after `-:` matches."""
    family, fields = SELECTIONS[case]
    made = plan(tiny(family), RTNQuantConfig(**{"format": "gptq", "group_size": 32, **fields}))
    patterns = format_of(made).quantization_config(made).get("dynamic", {})
    assert all(pattern.startswith("-:") and value == {} for pattern, value in patterns.items())
    matched = {row.module for row in made.rows if any(re.match(pattern[2:], row.module) for pattern in patterns)}
    kept = (row for row in made.rows if row.quantization is None and row.kind in ("linear", "conv1d"))
    assert matched == {row.module for row in kept if re.search(r"\.\d+\.", row.module)}


def test_config_is_one_that_transformers_reads() -> None:
    made, layout = planned(bits=3, symmetric=False, group_size="channel", format="gptq_v2")
    values = layout.quantization_config(made)
    assert "dataset" not in values
    assert json.loads(json.dumps(values)) == values
    config = GPTQConfig.from_dict(values)
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (3, -1, False, False)
    assert config.format == "gptq_v2"
    assert config.dataset is None
    assert config.block_name_to_quantize == ""
    assert config.modules_in_block_to_quantize == values["modules_in_block_to_quantize"]


@pytest.mark.parametrize("case", PATHS)
def test_whole_path(case: str, tmp_path: Path, worker: CleanWorker) -> None:
    family, fields = PATHS[case]
    model = quantize(tiny(family), RTNQuantConfig(**fields))
    inputs = tiny_inputs(model)
    expected = output(model, inputs)
    if family == "gpt2":  # stock transformers can't read it; a proof by it would fail where GPTQModel is installed
        model.save_pretrained(tmp_path / "out")
    else:
        proof = save(model, tmp_path / "out", worker=worker)
        assert proof.level in ("own-reader", "full")
        assert verify(tmp_path / "out", worker=worker).level == proof.level
    loaded = hfc.load(tmp_path / "out")
    assert torch.equal(output(loaded, inputs), expected)
    assert loaded.config.quantization_config.to_dict()["quant_method"] == "gptq"
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert set(first) == set(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_without_gptqmodel_the_proof_is_our_own_and_stock_raises(tmp_path: Path, worker: CleanWorker) -> None:
    if worker.request("has", package="gptqmodel")["importable"]:
        pytest.skip("GPTQModel is installed")
    model = quantize(tiny("llama", num_hidden_layers=1), RTNQuantConfig(format="gptq"))
    proof = save(model, tmp_path / "out", worker=worker)
    assert proof.level == "own-reader"
    assert "'gptqmodel' is not installed" in proof.reason
    assert [check.relative for check in proof.checks] == [0.0] * len(proof.checks)
    answer = worker.request("raises", path=tmp_path / "out", architecture="LlamaForCausalLM")
    assert answer["exception"] in ("ImportError", "NameError", "RuntimeError"), answer


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_through_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_dir(family, tmp_path)
    kind = type(tiny(family))
    config = RTNQuantConfig(symmetric=False, group_size=32, format="gptq_v2")
    model = kind.from_pretrained(source, dtype=dtype, quantization_config=config).eval()
    model.save_pretrained(tmp_path / "out")
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(tmp_path / "out").eval(), inputs), output(model, inputs))


@pytest.mark.parametrize("name", FORMATS)
def test_stock_transformers_reads_it(name: str, tmp_path: Path, worker: CleanWorker) -> None:
    """With GPTQModel: every weight and the outputs, within float16's rounding; a model cut for memory as well."""
    pytest.importorskip("gptqmodel")
    for bits, symmetric, group in ((4, True, 32), (8, False, 64), (3, True, 16)):
        model = quantize(tiny("llama"), RTNQuantConfig(bits=bits, symmetric=symmetric, group_size=group, format=name))
        proof = save(model, tmp_path / f"{bits}", worker=worker)
        assert proof.level == "full"
        assert proof.checks[0].name == "14 weights dequantized by stock"
        assert proof.checks[0].relative < 2**-11
    proof = save(model, tmp_path / "cut", worker=worker, free_bytes=0)
    assert proof.level == "own-reader"
    assert "nothing on the meta device" in proof.reason


@pytest.mark.parametrize(("family", "reason"), [("gpt2", "initialisation"), ("t5", "initialisation"), ("vit", "text")])
def test_says_what_stock_transformers_refuses(family: str, reason: str) -> None:
    made, _ = planned(family)
    assert len(made.notes) == 1
    assert "stock transformers can't load" in made.notes[0]
    assert reason in made.notes[0]


def test_says_nothing_where_stock_reads_it() -> None:
    assert planned("llama")[0].notes == planned("bert")[0].notes == ()


def test_command_line(tmp_path: Path) -> None:
    source, out = tiny_dir("llama", tmp_path), tmp_path / "out"
    options = ["--method", "rtn", "--bits", "4", "--asymmetric", "--format", "gptq_v2"]
    result = CliRunner().invoke(app, ["quantize", str(source), str(out), *options])
    assert result.exit_code == 0, result.output
    assert f"saved  {out} (gptq_v2)" in result.stdout
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["checkpoint_format"], stored["sym"]) == ("gptq", "gptq_v2", False)
