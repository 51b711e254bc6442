"""bitsandbytes' layouts against bitsandbytes itself, and everything they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress.apply.packing import pack_weight
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CorruptCheckpointError, FormatError
from hf_compress.core.fit import fit
from hf_compress.core.plan import DTYPES, Plan, PlanRow
from hf_compress.core.registry import Quantized
from hf_compress.formats.base import encode_model, format_of
from hf_compress.formats.bitsandbytes import BLOCK_SIZES, TABLES
from hf_compress.methods.codebook import CodebookQuantConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.packed import PackedTensor, layout_of, pack
from hf_compress.modules.swap import packed_modules, packed_tensor
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize
from tests._utils.tiny import tiny

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def int8(**changes: Any) -> QuantConfig:
    return RTNQuantConfig(**{"bits": 8, "group_size": "channel", "format": "bitsandbytes", **changes})


def four(codebook: str, **changes: Any) -> QuantConfig:
    return CodebookQuantConfig(codebook=codebook, **{"format": "bitsandbytes", **changes})


CASES: dict[str, tuple[str, QuantConfig]] = {
    "nf4": ("llama", four("nf4")),
    "fp4": ("llama", four("fp4", group_size=32)),
    "nf4 conv1d": ("gpt2", four("nf4", group_size=32)),
    "int8": ("llama", int8()),
    "int8 conv1d": ("gpt2", int8()),
}


def a_row(shape: tuple[int, int], config: QuantConfig, dtype: torch.dtype = torch.float32) -> PlanRow:
    """The row of a linear layer of some shape."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="meta")
    made = plan(torch.nn.Sequential(layer), type(config)(**{**config.fields.model_dump(), "format": "auto"}))
    asked = made.model_copy(update={"request": config.fields.model_dump()})
    return fit(asked, "bitsandbytes", 0.9).quantized[0]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def written(row: PlanRow, method: str, weight: Tensor) -> tuple[PackedTensor, dict[str, Tensor]]:
    packed, _ = pack_weight(row, weight, method)
    made = Plan(method=method, request={}, format="bitsandbytes", rows=(row,), small_parameters=0)
    return packed, format_of(made).encode(row, packed)


def same(first: PackedTensor, second: PackedTensor) -> bool:
    pairs = zip((first.codes, first.scale, first.codebook), (second.codes, second.scale, second.codebook), strict=True)
    return first.layout == second.layout and all(
        left is right or (left.dtype == right.dtype and torch.equal(left, right))
        for left, right in pairs
        if left is not None or right is not None
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decode_undoes_encode_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    family, config = CASES[case]
    model = quantize(tiny(family, dtype=dtype), config)
    made = model.hfc_plan
    layout = format_of(made)
    assert made.format == "bitsandbytes"
    state = encode_model(model, made, layout)
    modules = dict(packed_modules(model))
    names: set[str] = set()
    for row in made.quantized:
        packed = packed_tensor(modules[row.module], "weight")
        assert same(layout.decode(row, state), packed)
        assert packed.scale.dtype == dtype
        names |= set(layout.keys(row))
    assert layout.owned(state) == names
    assert all(state[name].is_contiguous() for name in names)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [32, 64, 256, 1024])  # from 2048 on it compiles its own fallback, for seconds
@pytest.mark.parametrize("codebook", TABLES)
def test_four_bits_dequantize_as_bitsandbytes_does(codebook: str, size: int, dtype: torch.dtype) -> None:
    """What we write, through its own classes; its values are ours, bit for bit, and the oracle's in float64."""
    assert size in BLOCK_SIZES
    row = a_row((32, max(size, 64)), four(codebook, group_size=size), dtype)
    weight = noise(*row.shape, dtype=dtype, seed=size)
    weight[0, :size] = 0
    packed, tensors = written(row, "codebook", weight)
    sides = {key.removeprefix(f"{row.name}.weight."): value for key, value in tensors.items()}
    data = sides.pop(f"{row.name}.weight")
    stock = bitsandbytes.nn.Params4bit.from_prequantized(data, dict(sides), device="cpu")
    found = bnb.dequantize_4bit(stock.data, stock.quant_state)
    assert found.dtype == dtype
    assert torch.equal(found, packed.dense())

    nibbles = [part for byte in data.flatten().tolist() for part in (byte >> 4, byte & 15)]
    table, absmax = torch.tensor(TABLES[codebook]).double(), sides["absmax"].double()
    oracle = table[torch.tensor(nibbles)].view(-1, size) * absmax.view(-1, 1)
    assert torch.equal(oracle.view(row.shape).float().to(dtype), found)
    assert stock.quant_state.as_dict(packed=True).keys() == sides.keys()
    assert all(torch.equal(value, sides[key]) for key, value in stock.quant_state.as_dict(packed=True).items())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nf4_tensors_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Its own layer, quantized by it, saves the same bytes."""
    row = a_row((64, 128), four("nf4"), dtype)
    weight = noise(64, 128, dtype=dtype)
    _, tensors = written(row, "codebook", weight)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(weight, compress_statistics=False, quant_type="nf4", module=layer)
    stock = layer.to("cpu").state_dict(prefix=f"{row.name}.")
    assert tensors.keys() == stock.keys()
    assert all(value.dtype == stock[key].dtype and torch.equal(value, stock[key]) for key, value in tensors.items())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_values_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Every code times scales over the whole range of the data type: bit-equal, to the oracle's in float64 too."""
    row = a_row((512, 256), int8(), dtype)
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(512, 256).contiguous()
    exponents = torch.linspace(-6, 2, 512) if dtype == torch.float16 else torch.linspace(-35, 34, 512)
    scale = (10 ** exponents.unsqueeze(1)).bfloat16().to(dtype)
    packed = pack(Quantized(codes, scale, None), layout_of(row))
    made = Plan(method="rtn", request={}, format="bitsandbytes", rows=(row,), small_parameters=0)
    weight, scb, order = format_of(made).encode(row, packed).values()
    assert (weight.dtype, scb.dtype, order.dtype, int(order)) == (torch.int8, torch.float32, torch.uint8, 0)
    found = bnb.int8_vectorwise_dequant(weight, scb)
    assert torch.equal(found.to(dtype), packed.dense())
    assert torch.equal(found.double(), codes.double() * scale.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiny_and_zero_rows_have_a_scale(dtype: torch.dtype) -> None:
    """In float16 a scale may vanish when it is rounded; its codes must not be what a division by zero gives."""
    weight = noise(32, 64, dtype=dtype)
    weight[0] = 0
    weight[1] = torch.finfo(dtype).tiny / 1024
    packed, _ = written(a_row((32, 64), int8(), dtype), "rtn", weight)
    assert bool((packed.scale > 0).all())
    assert not packed.codes[0].any()
    # Half a step, half a step that the scale's rounding may clip, and the rounding of the result.
    allowed = packed.scale[2:].double() * 1.01 + torch.finfo(dtype).eps * weight[2:].double().abs()
    assert bool(((packed.dense()[2:].double() - weight[2:].double()).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codebook", [*TABLES, None])
def test_config_is_what_transformers_would_write(codebook: str | None, dtype: torch.dtype) -> None:
    made = plan(tiny("bert-classifier", dtype=dtype), int8() if codebook is None else four(codebook))
    options: dict[str, Any] = {"load_in_8bit": True}
    if codebook is not None:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": codebook, "bnb_4bit_compute_dtype": dtype}
    stock = BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **options).to_dict()
    found = format_of(made).quantization_config(made)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(stock))


@pytest.mark.parametrize(
    ("family", "skip"),
    [
        ("llama", ("model.layers.1.mlp.up_proj",)),
        ("gpt2", ("transformer.h.1.attn.c_proj",)),
        ("distilbert", ()),
        ("t5", ()),
        ("bert", ()),
    ],
)
def test_stock_replaces_exactly_the_planned_modules(family: str, skip: tuple[str, ...]) -> None:
    """Its rule for skipped names also matches ends of names, such as DistilBERT's `classifier`."""
    model = tiny(family)
    made = plan(model, four("nf4", skip=skip, min_coverage=0.5))
    skipped = format_of(made).quantization_config(made)["llm_int8_skip_modules"]
    patterns = [*skipped, *(model._keep_in_fp32_modules or ())]
    linears = {row.module for row in made.rows if row.owner in ("Linear", "Conv1D")}
    replaced = {name for name in linears if should_convert_module(name, patterns)}
    assert replaced == {row.module for row in made.quantized}
    assert linears - replaced >= set(skip)


def test_what_stock_leaves_in_float32_is_left_out_and_out_of_scope() -> None:
    made = plan(tiny("t5"), four("nf4"))
    left = [row for row in made.rows if row.stays_float32]
    assert {row.module.rpartition(".")[2] for row in left} == {"wo"}
    assert all(row.quantization is None and not row.in_scope and "float32" in row.reason for row in left)
    assert made.coverage == 1.0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "embeddings": (lambda: plan(tiny("llama"), int8(embeddings="int8")), 'leave out embeddings="int8"'),
    "experts": (lambda: plan(tiny("qwen3-moe"), int8()), "RTNQuantConfig with compressed-tensors"),
    "conv": (
        lambda: plan(tiny("vit"), int8(rules=[{"pattern": "*patch_embeddings*", "keep": False}])),
        "nn.Linear and Conv1D, not Conv2d",
    ),
    "inputs": (lambda: plan(tiny("llama"), Int8DynamicQuantConfig(format="bitsandbytes")), "rounds inputs itself"),
    "int4": (lambda: plan(tiny("llama"), int8(bits=4)), r"its 4 bits are NF4: CodebookQuantConfig\(\)"),
    "groups of int8": (lambda: plan(tiny("llama"), int8(group_size=64)), 'group_size="channel"'),
    "asymmetric": (lambda: plan(tiny("llama"), int8(symmetric=False)), "INT8, symmetric, per channel"),
    "log": (lambda: plan(tiny("llama"), four("log")), "codebooks nf4 and fp4, not log"),
    "kmeans": (lambda: plan(tiny("llama"), four("kmeans")), "codebooks nf4 and fp4, not kmeans"),
    "block size": (lambda: plan(tiny("llama"), four("nf4", group_size=16)), "choose group_size=64"),
    "no blocks": (lambda: plan(tiny("llama"), four("nf4", group_size="channel")), "choose group_size=64"),
    "outputs": (lambda: a_row((48, 64), four("nf4")), "multiples of 32 outputs, not 48"),
    "two sizes": (
        lambda: plan(tiny("llama"), four("nf4", rules=[{"pattern": "*mlp*", "group_size": 32}])),
        "one scheme per model",
    ),
    "float64": (lambda: a_row((32, 64), four("nf4"), torch.float64), "not float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_use(case: str) -> None:
    provoke, words = REFUSED[case]
    with pytest.raises(FormatError, match=words) as caught:
        provoke()
    assert caught.value.fix


def test_int8_is_never_chosen_unasked() -> None:
    """Stock would round inputs, which nobody asked for: GPT-2 stays guarded."""
    assert plan(tiny("gpt2"), RTNQuantConfig(bits=8, group_size="channel")).format == "guarded"
    assert plan(tiny("gpt2"), CodebookQuantConfig()).format == "bitsandbytes"
    assert plan(tiny("llama"), RTNQuantConfig(bits=8, group_size="channel")).format == "compressed-tensors"


def test_two_data_types_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.raises(FormatError, match="computes in one data type"):
        plan(model, four("nf4"))


def replaced(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith(key))
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value

    return damage


def state_with(**changes: Any) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        return torch.tensor(list(json.dumps({**json.loads(bytes(value.tolist())), **changes}).encode())).byte()

    return change


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    **{
        f"no {key}": ("nf4", replaced(key, lambda value: None), "has no tensor")
        for key in (".weight", ".absmax", ".quant_map", "__nf4")
    },
    **{
        f"no {key}": ("int8", replaced(key, lambda value: None), "has no tensor")
        for key in ("weight", "SCB", "format")
    },
    "short weight": ("nf4", replaced(".weight", lambda value: value[:-1]), "the plan says torch.uint8"),
    "weight of another type": ("nf4", replaced(".weight", Tensor.char), "torch.int8"),
    "short absmax": ("nf4", replaced(".absmax", lambda value: value[:-1]), "absmax is torch.float32"),
    "absmax in bfloat16": ("nf4", replaced(".absmax", Tensor.bfloat16), "absmax is torch.bfloat16"),
    "absmax of NaN": ("nf4", replaced(".absmax", lambda value: value * float("nan")), "not finite"),
    "short table": ("nf4", replaced(".quant_map", lambda value: value[:8]), r"\(8,\)"),
    "another table": ("nf4", replaced(".quant_map", lambda value: value.flip(0)), "not the table of nf4"),
    "no JSON": ("nf4", replaced("__nf4", lambda value: value[:-1]), "can't be read"),
    "no bytes": ("nf4", replaced("__nf4", Tensor.float), "quant_state is torch.float32"),
    "no UTF-8": ("nf4", replaced("__nf4", lambda value: value | 128), "can't be read"),
    "no object": ("nf4", replaced("__nf4", lambda value: torch.tensor([49], dtype=torch.uint8)), "says 1, the plan"),
    "another block size": ("nf4", replaced("__nf4", state_with(blocksize=128)), "'blocksize': 128"),
    "another shape": ("nf4", replaced("__nf4", state_with(shape=[64, 64])), r"'shape': \[64, 64\]"),
    "another type": ("nf4", replaced("__nf4", state_with(dtype="float16")), "'dtype': 'float16'"),
    "short SCB": ("int8", replaced("SCB", lambda value: value[:-1]), "SCB is torch.float32"),
    "SCB of infinity": ("int8", replaced("SCB", lambda value: value / 0), "not finite"),
    "another order": ("int8", replaced("format", lambda value: value + 1), "weight_format is 1"),
    "INT8 of another shape": ("int8", replaced("weight", lambda value: value[:, 1:]), "the plan says torch.int8"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_corrupt(case: str) -> None:
    kind, damage, words = DAMAGE[case]
    row = a_row((32, 128), int8() if kind == "int8" else four(kind))
    _, tensors = written(row, "rtn" if kind == "int8" else "codebook", noise(32, 128))
    damage(tensors)
    made = Plan(method="rtn", request={}, format="bitsandbytes", rows=(row,), small_parameters=0)
    with pytest.raises(CorruptCheckpointError, match=words):
        format_of(made).decode(row, tensors)


def test_changed_scales_and_codebooks_are_not_written() -> None:
    row = a_row((32, 128), four("nf4"))
    packed, _ = written(row, "codebook", noise(32, 128))
    layout = format_of(Plan(method="codebook", request={}, format="bitsandbytes", rows=(row,), small_parameters=0))
    assert packed.codebook is not None
    for changed, words in (
        (replace(packed, scale=packed.scale.bfloat16()), "is torch.bfloat16 now"),
        (replace(packed, codebook=packed.codebook.bfloat16()), "another codebook"),
        (replace(packed, codebook=packed.codebook.flip(0)), "another codebook"),
    ):
        with pytest.raises(FormatError, match=words):
            layout.encode(row, changed)
    eight = a_row((32, 128), int8())
    packed, _ = written(eight, "rtn", noise(32, 128))
    with pytest.raises(FormatError, match="more than 8 significant bits"):
        layout.encode(eight, replace(packed, scale=packed.scale * 1.01))


def test_a_model_with_tensors_of_the_same_names_keeps_them() -> None:
    """Told by type and neighbours, not by names alone."""
    layout = format_of(Plan(method="rtn", request={}, format="bitsandbytes", rows=(), small_parameters=0))
    mine = {"a.weight": torch.zeros(4, dtype=torch.uint8), "b.weight": torch.zeros(4), "b.SCB": torch.zeros(1)}
    assert layout.owned(mine) == set()
    stock = {"c.weight": torch.zeros(4, dtype=torch.int8), "c.SCB": torch.zeros(4), "c.bias": torch.zeros(4)}
    assert layout.owned({**mine, **stock}) == {"c.weight", "c.SCB"}


def test_dtypes_by_name() -> None:
    """The state names the data type as bitsandbytes does."""
    assert all(str(DTYPES[name]).strip("torch.") == name for name in ("float32", "bfloat16", "float16"))


def test_no_package_is_needed(tmp_path: Path) -> None:
    """Our reader and writer never import it."""
    import ast

    import hf_compress.formats.bitsandbytes as module

    tree = ast.parse(Path(module.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not any(str(name).startswith("bitsandbytes") for name in imported)
