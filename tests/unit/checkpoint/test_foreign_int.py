from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.checkpoint.foreign_settings import foreign_settings
from hf_compress.checkpoint.handover import plan_of
from hf_compress.checkpoint.save import save
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatError,
    HFCompressError,
    TiedWeightsError,
    UnsupportedModelError,
)
from hf_compress.core.plan import Plan
from hf_compress.formats.base import format_of
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.packed import PackedTensor
from hf_compress.modules.swap import packed_modules, packed_tensor
from hf_compress.pipeline.inspect import inspect
from hf_compress.pipeline.quantize import quantize
from tests._utils.tiny import output, tiny, tiny_inputs

FIXTURES = Path(__file__).parents[2] / "_utils" / "fixtures" / "gptqmodel"
WRITTEN = ("gptq", "gptq-act", "awq")
HALF = torch.finfo(torch.float16).eps
LIMIT = 8 * HALF
"""GPTQModel multiplies codes and scales in float16 and sums in another order (see `formats/integers.py`). A zero point
that is off by one shows as more than 0.1."""

Tensors = dict[str, Tensor]
Settings = dict[str, Any]


def plan_for(model: object) -> Plan:
    plan = plan_of(model)
    assert plan is not None
    return plan


def copied(name: str, folder: Path, **config: Any) -> Path:
    """A copy of a fixture with other values in its config."""
    path = Path(shutil.copytree(FIXTURES / name, folder / name))
    edit_config(path, lambda values: values.update(config))
    return path


def edit_config(path: Path, change: Callable[[Settings], Any]) -> None:
    values = json.loads((path / "config.json").read_text())
    change(values)
    (path / "config.json").write_text(json.dumps(values))


def stripped(model: PreTrainedModel, path: Path) -> Path:
    """What another tool would have written of a model: no record, and GPTQModel's settings only."""
    model.save_pretrained(path)
    (path / "hf_compress.json").unlink(missing_ok=True)
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors", metadata={"format": "pt"})
    drop = ("block_name_to_quantize", "modules_in_block_to_quantize", "dynamic", "modules_to_not_convert")

    def plain(values: Settings) -> None:
        for name in drop:
            values["quantization_config"].pop(name, None)

    edit_config(path, plain)
    return path


def edit_tensors(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")


@pytest.mark.parametrize("name", WRITTEN)
def test_gptqmodels_checkpoints_give_its_logits(name: str, tmp_path: Path) -> None:
    example = load_file(FIXTURES / name / "example.safetensors")
    expected = example.pop("logits")
    model = hfc.load(copied(name, tmp_path, dtype="float32"))
    seen = output(model, example)
    assert float((seen - expected).abs().max()) <= LIMIT * float(expected.abs().max())
    plan = plan_for(model)
    assert plan.format == plan.method == name.removesuffix("-act")
    assert {row.scheme for row in plan.quantized} == {"int4-g32-act" if name == "gptq-act" else "int4-g32"}
    assert plan.notes == ()
    tool = "an AWQ" if name == "awq" else "a GPTQ"
    assert {row.reason for row in plan.quantized} == {f"read from {tool} checkpoint of gptqmodel 7.7.0"}


def test_the_limit_would_show_a_zero_point_that_is_off_by_one(tmp_path: Path) -> None:
    example = load_file(FIXTURES / "gptq" / "example.safetensors")
    expected = example.pop("logits")
    path = copied("gptq", tmp_path, dtype="float32")
    edit_config(path, lambda values: values["quantization_config"].update(checkpoint_format="gptq_v2"))
    seen = output(hfc.load(path), example)
    assert float((seen - expected).abs().max()) > 10 * LIMIT * float(expected.abs().max())


def test_the_configs_data_type_is_used_and_its_rounding_told() -> None:
    example = load_file(FIXTURES / "gptq" / "example.safetensors")
    expected = example.pop("logits")
    model = hfc.load(FIXTURES / "gptq")
    assert model.dtype == torch.bfloat16
    assert "scales of 7 weights are float16 and were rounded to bfloat16" in plan_for(model).notes[0]
    limit = 8 * torch.finfo(torch.bfloat16).eps
    assert float((output(model, example).float() - expected).abs().max()) <= limit * float(expected.abs().max())


@pytest.mark.parametrize("name", WRITTEN)
def test_inspect_tells_what_it_is(name: str) -> None:
    found = inspect(FIXTURES / name)
    loaded = plan_for(hfc.load(FIXTURES / name))
    assert found.plan == loaded
    assert found.coverage == 1.0
    assert found.proof is None
    assert found.notes[0] == "not written by hf_compress, and not proven"


@pytest.mark.parametrize("name", WRITTEN)
def test_saving_again_writes_the_same_tensors(name: str, tmp_path: Path, worker: CleanWorker) -> None:
    """Stock transformers writes other zero points than it read from `gptq`."""
    source = copied(name, tmp_path, dtype="float32")
    model = hfc.load(source)
    save(model, tmp_path / "again", worker=worker)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value.float(), after[key].float()), key
        assert value.dtype == after[key].dtype or value.dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", ["gptq", "gptq_v2", "awq", "guarded", "compressed-tensors"])
@pytest.mark.parametrize("name", WRITTEN)
def test_saves_in_every_format_that_holds_it(name: str, wanted: str, tmp_path: Path, worker: CleanWorker) -> None:
    model = hfc.load(FIXTURES / name)
    if name == "gptq-act" and wanted in ("awq", "compressed-tensors"):
        with pytest.raises(FormatError, match="consecutive"):
            save(model, tmp_path / "out", format=wanted, worker=worker)
        return
    save(model, tmp_path / "out", format=wanted, worker=worker)
    again = hfc.load(tmp_path / "out")
    inputs = tiny_inputs(model)
    assert plan_for(again).format == wanted
    assert torch.equal(output(again, inputs), output(model, inputs))


@pytest.mark.parametrize("name", WRITTEN)
def test_verify_says_how_to_prove_one(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="checkpoint of another tool") as caught:
        hfc.verify(FIXTURES / name)
    assert "hf_compress.load" in caught.value.fix
    assert "hf_compress.save" in caught.value.fix


def test_loads_into_fast_kernels_and_back_to_dense() -> None:
    model = hfc.optimize_for_inference(hfc.load(FIXTURES / "gptq-act"))
    inputs = tiny_inputs(model)
    expected = output(model, inputs)
    assert torch.equal(output(model.dequantize(), inputs), expected)
    assert not list(packed_modules(model))


GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(
    ("family", "name"), [("llama", "gptq"), ("llama", "gptq_v2"), ("gpt2", "gptq_v2"), ("bert", "awq")]
)
def test_reads_every_width(family: str, name: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    if name == "awq" and bits != 4:
        pytest.skip("AWQ has 4 bits")
    size: int | str = "channel" if bits == 8 else 32
    request = RTNQuantConfig(bits=bits, symmetric=symmetric, group_size=size, format=name)
    model = quantize(tiny(family), request)
    again = hfc.load(stripped(model, tmp_path / "out"))
    inputs = tiny_inputs(model)
    assert torch.equal(output(again, inputs), output(model, inputs))
    ours, theirs = plan_for(model), plan_for(again)
    assert theirs.format == name
    assert [row.scheme for row in theirs.rows] == [row.scheme for row in ours.rows]


def test_reads_settings_beside_an_older_config(tmp_path: Path) -> None:
    """AutoGPTQ's files: settings apart, another name for the weights, biases of zeros, no `g_idx`."""
    model = quantize(tiny("llama"), RTNQuantConfig(format="gptq", group_size=32))
    path = stripped(model, tmp_path / "out")
    edit_config(path, lambda values: values.pop("quantization_config"))
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "is_marlin_format": False}
    (path / "quantize_config.json").write_text(json.dumps(settings))

    def older(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(".g_idx")]:
            tensors[key.replace("g_idx", "bias")] = torch.zeros(tensors.pop(key).shape[0], dtype=torch.float16)

    edit_tensors(path, older)
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(path), inputs), output(model, inputs))


def test_reads_autoawqs_settings(tmp_path: Path) -> None:
    model = quantize(tiny("llama"), RTNQuantConfig(format="awq", group_size=32, symmetric=False))
    path = stripped(model, tmp_path / "out")
    edit_config(path, lambda values: values.pop("quantization_config"))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (path / "quant_config.json").write_text(json.dumps(settings))
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(path), inputs), output(model, inputs))


def test_reads_layers_of_other_widths(tmp_path: Path, worker: CleanWorker) -> None:
    """GPTQModel's `dynamic`. No stock format holds such a mixture of GPTQ layers, so a save is guarded."""
    four, eight = (quantize(tiny("llama"), RTNQuantConfig(bits=bits, format="gptq", group_size=32)) for bits in (4, 8))
    path, other = stripped(four, tmp_path / "four"), stripped(eight, tmp_path / "eight")
    wide = load_file(other / "model.safetensors")
    edit_tensors(path, lambda tensors: tensors.update({k: v for k, v in wide.items() if "down_proj" in k}))
    dynamic = {"-:.*lm_head": {}, r"+:.*\.down_proj": {"bits": 8}}
    edit_config(path, lambda values: values["quantization_config"].update(dynamic=dynamic))
    model = hfc.load(path)
    assert {row.name.endswith("down_proj"): row.scheme for row in plan_for(model).quantized} == {
        False: "int4-g32",
        True: "int8-g32",
    }
    for name, module in packed_modules(model):
        source = (eight if name.endswith("down_proj") else four).get_submodule(name)
        assert torch.equal(packed_tensor(module, "weight").dense(), packed_tensor(source, "weight").dense())
    assert plan_for(model).format == "guarded"
    save(model, tmp_path / "out", worker=worker)
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(tmp_path / "out"), inputs), output(model, inputs))


@pytest.mark.parametrize("symmetric", [True, False])
def test_reads_experts_one_by_one(symmetric: bool, tmp_path: Path) -> None:
    """Others store one layer per expert; transformers fuses them."""
    request = RTNQuantConfig(group_size=32, symmetric=symmetric, format="guarded")
    model = quantize(tiny("mixtral"), request)
    layout = format_of(plan_for(quantize(tiny("llama"), RTNQuantConfig(format="gptq_v2", symmetric=symmetric))))
    model.save_pretrained(tmp_path / "guarded")
    state = {
        key: value
        for key, value in load_file(tmp_path / "guarded" / "hf_compress.safetensors").items()
        if key.rpartition("_")[2] not in ("packed", "scale", "point")
    }
    for row in plan_for(model).quantized:
        packed = packed_tensor(model.get_submodule(row.module), row.parameter)
        if not row.parts:
            state |= layout.encode(row.model_copy(update={"dtype": "float32"}), half_scaled(packed))
            continue
        height = row.shape[1] // len(row.parts)
        for expert in range(row.shape[0]):
            for index, name in enumerate(row.parts):
                part = half_scaled(packed.part(expert).part(slice(index * height, (index + 1) * height)))
                one = row.model_copy(update={"module": name.format(expert), "transposed": False, "parts": ()})
                state |= layout.encode(one.model_copy(update={"shape": part.layout.shape}), part)
    path = Path(shutil.copytree(tmp_path / "guarded", tmp_path / "theirs"))
    (path / "hf_compress.safetensors").unlink()
    save_file({key: value.contiguous() for key, value in state.items()}, path / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    edit_config(path, lambda values: values.update(quantization_config=settings))
    again = hfc.load(path)
    assert [row.scheme for row in plan_for(again).rows] == [row.scheme for row in plan_for(model).rows]
    for name, module in packed_modules(again):
        for parameter in module.hfc_layouts:
            expected = half_scaled(packed_tensor(model.get_submodule(name), parameter))
            assert torch.equal(packed_tensor(module, parameter).dense(), expected.dense())


def half_scaled(packed: PackedTensor) -> PackedTensor:
    """A packed weight whose scales fit float16."""
    return replace(packed, scale=packed.scale.half().float())


def quantization(**values: Any) -> Callable[[Path], None]:
    return lambda path: edit_config(path, lambda config: config["quantization_config"].update(values))


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Change, or with None drop, one tensor of the first `q_proj`."""
    key = f"model.layers.0.self_attn.q_proj.{name}"

    def edit(tensors: Tensors) -> None:
        value = change(tensors.pop(key))
        if value is not None:
            tensors[key] = value

    return lambda path: edit_tensors(path, edit)


def added(**tensors: Tensor) -> Callable[[Path], None]:
    named = {f"model.layers.0.{key.replace('__', '.')}": value for key, value in tensors.items()}
    return lambda path: edit_tensors(path, lambda state: state.update(named))


def without_packed(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.endswith(".qweight")]:
        del tensors[key]


def nan(value: Tensor) -> Tensor:
    value[0, 0] = float("nan")
    return value


BAD: dict[str, tuple[str, Callable[[Path], Any], type[HFCompressError], str]] = {
    "5 bits": ("gptq", quantization(bits=5), FormatError, "GPTQ weights of 5 bits; read are 2, 3, 4, 8"),
    "absurd bits": ("gptq", quantization(bits=10**9), FormatError, "of 1000000000 bits"),
    "bits as text": ("gptq", quantization(bits="4"), CorruptCheckpointError, "damaged at bits"),
    "bits and shapes": ("gptq", quantization(bits=8), CorruptCheckpointError, r"qzeros is torch\.int32 \(2, 8\)"),
    "AWQ of 8 bits": ("awq", quantization(bits=8), FormatError, "AWQ weights of 8 bits; read are 4"),
    "group and shapes": ("gptq", quantization(group_size=16), CorruptCheckpointError, "the plan says"),
    "group of 0": ("gptq", quantization(group_size=0), CorruptCheckpointError, "The group size of .* is 0"),
    "group of 48": ("awq", quantization(group_size=48), FormatError, "groups of 48 of .* do not divide its 64"),
    "marlin": ("gptq", quantization(checkpoint_format="marlin"), FormatError, "GPTQ layout 'marlin'"),
    "marlin flag": ("gptq", quantization(is_marlin_format=True), FormatError, "GPTQ layout 'marlin'"),
    "gemv": ("awq", quantization(checkpoint_format="gemv"), FormatError, "AWQ layout 'gemv'"),
    "exllama": ("awq", quantization(checkpoint_format="exllama"), FormatError, "AWQ layout 'exllama'"),
    "llm-awq": ("awq", quantization(backend="llm-awq"), FormatError, "AWQ layout 'llm-awq'"),
    "dynamic": (
        "gptq",
        quantization(dynamic={".*": {"bits": "many"}}),
        CorruptCheckpointError,
        "dynamic says bits='many'",
    ),
    "pattern": (
        "gptq",
        quantization(dynamic={"[": {"bits": 4}}),
        CorruptCheckpointError,
        r"config\.json is damaged at dynamic: .*'\[' is no regular expression",
    ),
    "integers for data type": (
        "gptq",
        lambda path: edit_config(path, lambda values: values.update(dtype="int8")),
        CorruptCheckpointError,
        "config.json has the data type int8",
    ),
    "dense and packed": (
        "gptq",
        added(self_attn__q_proj__weight=torch.zeros(64, 64)),
        CorruptCheckpointError,
        r"holds model\.layers\.0\.self_attn\.q_proj both packed and dense",
    ),
    "no zeros": ("gptq", tensor("qzeros", lambda value: None), CorruptCheckpointError, "no tensor .*q_proj.qzeros"),
    "no scales": ("awq", tensor("scales", lambda value: None), CorruptCheckpointError, "no tensor .*q_proj.scales"),
    "no order": ("gptq-act", tensor("g_idx", lambda value: None), CorruptCheckpointError, "q_proj.g_idx is missing"),
    "order out of range": (
        "gptq-act",
        tensor("g_idx", lambda value: value + 1),
        CorruptCheckpointError,
        "names group 2; there are 2",
    ),
    "negative order": ("gptq", tensor("g_idx", lambda value: value - 1), CorruptCheckpointError, "names group -1"),
    "short order": ("gptq-act", tensor("g_idx", lambda value: value[:-1]), CorruptCheckpointError, r"\(63,\)"),
    "NaN": ("awq", tensor("scales", nan), CorruptCheckpointError, "scales holds NaN or infinite"),
    "integer scales": ("gptq", tensor("scales", torch.Tensor.int), CorruptCheckpointError, "expected floating-point"),
    "wide words": ("gptq", tensor("qweight", torch.Tensor.long), FormatError, "torch.int64; packing into int32"),
    "short words": ("gptq", tensor("qweight", lambda value: value[:-1]), CorruptCheckpointError, "the plan says"),
    "zero point 15": (
        "gptq",
        tensor("qzeros", lambda value: torch.full_like(value, -1)),
        CorruptCheckpointError,
        "qzeros holds 15, which 'gptq' never stores",
    ),
    "bias": (
        "gptq",
        added(mlp__up_proj__bias=torch.ones(128)),
        UnsupportedModelError,
        r"has a bias for model\.layers\.0\.mlp\.up_proj",
    ),
    "activation scales": ("awq", added(mlp__act_fn__scales=torch.ones(128)), CorruptCheckpointError, "has no place"),
    "a layer too many": (
        "gptq",
        added(mlp__gate__qweight=torch.zeros(8, 8, dtype=torch.int32)),
        UnsupportedModelError,
        r"packed weights for model\.layers\.0\.mlp\.gate, where LlamaForCausalLM has no linear",
    ),
    "nothing packed": (
        "gptq",
        lambda path: edit_tensors(path, without_packed),
        CorruptCheckpointError,
        "has no packed tensor",
    ),
    "no weights": (
        "gptq",
        lambda path: [file.unlink() for file in path.glob("*.safetensors")],
        CorruptCheckpointError,
        "pickled weights are never read",
    ),
    "cut file": (
        "awq",
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:4000]),
        CorruptCheckpointError,
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused(case: str, tmp_path: Path) -> None:
    name, damage, kind, message = BAD[case]
    path = copied(name, tmp_path)
    damage(path)
    with pytest.raises(kind, match=message) as caught:
        hfc.load(path)
    assert caught.value.fix
    if kind is CorruptCheckpointError and case != "cut file":  # nothing tells who wrote that one
        assert "save" not in caught.value.fix, "another tool wrote it"


def test_a_packed_head_that_its_config_ties_is_refused(tmp_path: Path) -> None:
    request = RTNQuantConfig(format="gptq", group_size=32, default_rules=False, skip=["model.embed_tokens"])
    model = quantize(tiny("llama"), request)
    path = stripped(model, tmp_path / "out")
    inputs = tiny_inputs(model)
    assert torch.equal(output(hfc.load(path), inputs), output(model, inputs))
    edit_config(path, lambda values: values.update(tie_word_embeddings=True))
    with pytest.raises(TiedWeightsError, match=r"has a packed lm_head, and its config ties it"):
        hfc.load(path)


def test_a_packed_awq_head_is_read_and_saved_guarded(tmp_path: Path) -> None:
    """Stock transformers always has a dense head in AWQ models."""
    request = RTNQuantConfig(format="gptq", group_size=32, default_rules=False, skip=["model.embed_tokens"])
    model = quantize(tiny("llama"), request)
    path = stripped(model, tmp_path / "out")
    layout = format_of(plan_for(quantize(tiny("llama"), RTNQuantConfig(format="awq"))))
    plan = plan_for(model)

    def convert(tensors: Mapping[str, Tensor]) -> Tensors:
        made = {key: value for key, value in tensors.items() if not key.endswith(".g_idx")}
        for row in plan.quantized:
            made |= layout.encode(row, packed_tensor(model.get_submodule(row.module), "weight"))
        return made

    save_file(convert(load_file(path / "model.safetensors")), path / "model.safetensors")
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    edit_config(path, lambda values: values.update(quantization_config=settings))
    again = hfc.load(path)
    inputs = tiny_inputs(model)
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert plan_for(again).format == "guarded"


def test_other_directories_are_not_taken_for_foreign_checkpoints(tmp_path: Path) -> None:
    model = quantize(tiny("llama"), RTNQuantConfig(format="gptq"))
    model.save_pretrained(tmp_path / "ours")
    assert foreign_settings(tmp_path / "ours") is None
    tiny("llama").save_pretrained(tmp_path / "dense")
    assert foreign_settings(tmp_path / "dense") is None
    assert foreign_settings(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointNotFoundError, match="not written by hf_compress"):
        hfc.load(tmp_path / "dense")
    path = copied("gptq", tmp_path)
    edit_config(path, lambda values: values.pop("quantization_config"))
    for method in (["gptq"], {"gptq": 4}, None, 4):
        edit_config(path, lambda values, method=method: values.update(quantization_config={"quant_method": method}))
        assert foreign_settings(path) is None
    edit_config(path, lambda values: values.pop("quantization_config"))
    (path / "quantize_config.json").write_text("[4, 32]")
    with pytest.raises(CorruptCheckpointError, match="holds no object"):
        hfc.load(path)
    (path / "quantize_config.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match="can't be read"):
        inspect(path)
