from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from hf_compress.core.build import build_plan
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import (
    ConfigError,
    CoverageError,
    FormatError,
    GroupSizeError,
    NothingToQuantizeError,
    PatternError,
    RuleError,
    TiedWeightsError,
)
from hf_compress.core.plan import Plan
from hf_compress.methods.cast import CastConfig
from hf_compress.methods.codebook import CodebookQuantConfig
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.pipeline.planning import plan
from tests._utils.tiny import FAMILIES, tiny, tiny_dir

QUANTIZABLE = [family for family in FAMILIES if family != "resnet"]

# Number of weights per scheme; counted from the architectures with two layers.
RTN = {
    "bert": {"int4-g64": 13, "kept": 3},
    "bert-classifier": {"int4-g64": 13, "kept": 4},
    "bert-mlm": {"int4-g64": 13, "kept": 4},
    "distilbert": {"int4-g64": 13, "kept": 3},
    "llama": {"int4-g64": 14, "kept": 2},
    "llama-tied": {"int4-g64": 14, "kept": 2},
    "gpt2": {"int4-g64": 8, "kept": 3},
    "qwen3-moe": {"int4-g64": 12, "kept": 4},
    "mixtral": {"int4-g64": 12, "kept": 4},
    "t5": {"int4-g64": 32, "kept": 6},
    "bart": {"int4-g64": 32, "kept": 6},
    "whisper": {"int4-g64": 32, "kept": 6},
    "vit": {"int4-g64": 12, "kept": 4},
}
# Poolers and classifiers' dense layers get 2-D inputs and stay weight-only, as do fused experts.
DYNAMIC = {
    "bert": {"w8a8-dynamic-token": 12, "int8-channel": 1, "kept": 3},
    "bert-classifier": {"w8a8-dynamic-token": 12, "int8-channel": 1, "kept": 4},
    "bert-mlm": {"w8a8-dynamic-token": 13, "kept": 4},
    "distilbert": {"w8a8-dynamic-token": 12, "int8-channel": 1, "kept": 3},
    "llama": {"w8a8-dynamic-token": 14, "kept": 2},
    "llama-tied": {"w8a8-dynamic-token": 14, "kept": 2},
    "gpt2": {"w8a8-dynamic-token": 8, "kept": 3},
    "qwen3-moe": {"w8a8-dynamic-token": 8, "int8-channel": 4, "kept": 4},
    "mixtral": {"w8a8-dynamic-token": 8, "int8-channel": 4, "kept": 4},
    "t5": {"w8a8-dynamic-token": 32, "kept": 6},
    "bart": {"w8a8-dynamic-token": 32, "kept": 6},
    "whisper": {"w8a8-dynamic-token": 32, "kept": 6},
    "vit": {"w8a8-dynamic-token": 12, "kept": 4},
}


def structure(made: Plan) -> dict[str, int]:
    return {label: entry["weights"] for label, entry in made.by_scheme().items()}


def row(made: Plan, name: str) -> Any:
    return next(row for row in made.rows if row.name == name)


@pytest.mark.parametrize("family", QUANTIZABLE)
def test_structure_rtn(family: str) -> None:
    made = plan(tiny(family), RTNQuantConfig())
    assert structure(made) == RTN[family]
    assert made.format == ("guarded" if family == "gpt2" else "compressed-tensors")
    assert made.stock_dequantize is (family == "t5")


@pytest.mark.parametrize("family", QUANTIZABLE)
def test_structure_int8_dynamic(family: str) -> None:
    assert structure(plan(tiny(family), Int8DynamicQuantConfig())) == DYNAMIC[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_cast(family: str) -> None:
    made = plan(tiny(family), CastConfig())
    assert set(structure(made)) == {"bfloat16"}
    assert made.format == "dense"
    assert made.coverage == 1.0
    assert sum(row.planned_bytes for row in made.rows) * 2 == sum(row.dense_bytes for row in made.rows)


@pytest.mark.parametrize("config", [RTNQuantConfig(), Int8DynamicQuantConfig(), CastConfig()], ids=repr)
@pytest.mark.parametrize("family", ["bert-classifier", "llama-tied", "gpt2", "qwen3-moe", "t5", "whisper", "vit"])
def test_directory_gives_the_plan_of_the_live_model(family: str, config: QuantConfig, tmp_path: Path) -> None:
    read, live = plan(tiny_dir(family, tmp_path), config), plan(tiny(family), config)
    assert read.model_copy(update={"notes": ()}) == live.model_copy(update={"notes": ()})  # notes measure speed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directory_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    made = plan(tiny_dir("llama", tmp_path, dtype=dtype), RTNQuantConfig())
    assert made == plan(tiny("llama", dtype=dtype), RTNQuantConfig())
    assert {row.dtype for row in made.rows} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("family", QUANTIZABLE)
def test_json_round_trip(family: str) -> None:
    made = plan(tiny(family), RTNQuantConfig(rules=[{"pattern": "*", "bits": 8, "group_size": "channel"}]))
    again = Plan.model_validate_json(made.model_dump_json())
    assert again == made
    assert again.model_dump_json() == made.model_dump_json()


def test_rows_by_hand() -> None:
    made = plan(tiny("llama-tied"), RTNQuantConfig())
    first = row(made, "model.layers.0.mlp.down_proj")
    assert (first.shape, first.parameters, first.dense_bytes) == ((64, 128), 8192, 32768)
    assert first.planned_bytes == 64 * 128 // 2 + 64 * 2 * 4
    assert (first.scheme, first.reason, first.in_scope, first.covered) == ("int4-g64", "in scope", True, True)
    assert first.key == "model.layers.0.mlp.down_proj.weight"
    head = row(made, "lm_head")
    assert (head.scheme, head.tied_to, head.parameters) == ("kept", "model.embed_tokens", 0)
    assert (head.in_scope, head.dense_bytes, head.planned_bytes) == (False, 0, 0)
    table = row(made, "model.embed_tokens")
    assert (table.parameters, table.planned_bytes, table.reason) == (8192, 32768, "default rule: embedding")


def test_coverage_by_hand() -> None:
    # vit: 65536 values in linears; convolution 3072, positions 17 * 64 and the class token 64 are kept.
    assert plan(tiny("vit"), RTNQuantConfig()).coverage == 65536 / (65536 + 3072 + 17 * 64 + 64)
    # qwen3-moe: all but two routers of 8 * 64.
    assert plan(tiny("qwen3-moe"), RTNQuantConfig()).coverage == 221184 / (221184 + 2 * 512)
    # Heads and embeddings are outside the denominator; a skipped layer is inside.
    assert plan(tiny("llama"), RTNQuantConfig()).coverage == 1.0
    made = plan(tiny("llama"), RTNQuantConfig(skip=["k_proj"], min_coverage=0.5))
    assert made.coverage == (73728 - 2 * 32 * 64) / 73728
    # ... unless they are quantized.
    made = plan(tiny("llama"), RTNQuantConfig(embeddings="int8", skip=["k_proj"]))
    assert made.coverage == (73728 - 4096 + 8192) / (73728 + 8192)


def test_min_coverage_stops_and_its_fix_works() -> None:
    model = tiny("llama")
    with pytest.raises(CoverageError, match=r"Only 88.9% of the weights in scope of LlamaForCausalLM") as caught:
        plan(model, RTNQuantConfig(skip=["q_proj"]))
    assert "q_proj (rule 'q_proj', 5.6%)" in str(caught.value)
    (fix,) = re.findall(r"min_coverage=([\d.]+) accepts", str(caught.value))
    assert structure(plan(model, RTNQuantConfig(skip=["q_proj"], min_coverage=float(fix)))) == {
        "int4-g64": 12,
        "kept": 4,
    }


@pytest.mark.parametrize("skip", [["mlp"], ["self_attn"], ["layers.0"], ["layers.0", "layers.1.mlp"]])
def test_fix_of_min_coverage_always_works(skip: list[str]) -> None:
    with pytest.raises(CoverageError) as caught:
        plan(tiny("llama"), RTNQuantConfig(skip=skip))
    (fix,) = re.findall(r"min_coverage=([\d.]+) accepts", caught.value.fix)
    plan(tiny("llama"), RTNQuantConfig(skip=skip, min_coverage=float(fix)))


@pytest.mark.parametrize("min_coverage", [0, 0.9])
def test_nothing_to_quantize(min_coverage: float) -> None:
    with pytest.raises(
        NothingToQuantizeError, match=r"0 of 1 weights of ConvTranspose1d.*output channels in the second"
    ):
        plan(nn.ConvTranspose1d(4, 4, 3, device="meta"), RTNQuantConfig(min_coverage=min_coverage))
    with pytest.raises(NothingToQuantizeError, match=r"rule '\*'"):
        plan(tiny("llama"), RTNQuantConfig(skip=["*"], min_coverage=min_coverage))
    with pytest.raises(NothingToQuantizeError, match="no weights"):
        plan(nn.Identity(), RTNQuantConfig(min_coverage=min_coverage))


def test_group_size_error_lists_options_that_work() -> None:
    model = tiny("llama", intermediate_size=96)
    with pytest.raises(
        GroupSizeError, match=r"does not divide the 96 inputs of model.layers.0.mlp.down_proj"
    ) as caught:
        plan(model, RTNQuantConfig(group_size=64))
    assert "2 weights: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in str(caught.value)
    options = re.findall(r'group_size=(\d+|"\w+")', caught.value.fix)
    assert options == ["32", '"channel"']
    for option in options:
        plan(model, RTNQuantConfig(group_size=ast.literal_eval(option)))


def test_group_size_error_s_skip_works_for_all_weights_that_are_concerned() -> None:
    model = tiny("llama", intermediate_size=96)
    with pytest.raises(GroupSizeError) as caught:
        plan(model, RTNQuantConfig(group_size=64, min_coverage=0))
    (skip,) = re.findall(r"skip=(\[.*?\])", caught.value.fix)
    plan(model, RTNQuantConfig(group_size=64, min_coverage=0, skip=ast.literal_eval(skip)))


def test_group_size_of_a_rule_is_checked() -> None:
    with pytest.raises(GroupSizeError, match="group_size=48 does not divide the 64 inputs"):
        plan(tiny("llama"), RTNQuantConfig(rules=[{"pattern": "k_proj", "group_size": 48}]))


def test_group_size_without_any_fitting_one() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 16))
    with pytest.raises(GroupSizeError) as caught:
        plan(model, RTNQuantConfig(group_size=8))
    assert caught.value.fix.startswith('group_size="channel"')
    assert structure(plan(model, RTNQuantConfig(group_size=-1))) == {"int4-channel": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"embeddings": "int8", "skip": ["lm_head"]},
        {"embeddings": "int8", "rules": [{"pattern": "lm_head", "keep": False}]},
        {"embeddings": "int8", "rules": [{"pattern": "lm_head", "keep": False, "bits": 6}]},
        {"rules": [{"pattern": "lm_head", "keep": False}]},
        {"default_rules": False, "skip": ["embed_tokens"]},
    ],
    ids=str,
)
def test_ties_are_not_torn(fields: dict[str, Any]) -> None:
    with pytest.raises(TiedWeightsError, match=r"lm_head shares its values with model.embed_tokens") as caught:
        plan(tiny("llama-tied"), RTNQuantConfig(**fields))
    (skip,) = re.findall(r"skip=(\[.*?\])", caught.value.fix)
    assert structure(plan(tiny("llama-tied"), RTNQuantConfig(skip=ast.literal_eval(skip)))) == RTN["llama"]


@pytest.mark.parametrize("fields", [{"embeddings": "int8"}, {"default_rules": False}], ids=str)
def test_a_tied_head_follows_its_embedding(fields: dict[str, Any]) -> None:
    made = plan(tiny("llama-tied"), RTNQuantConfig(**fields))
    assert structure(made) == {"int4-g64": 14, "int8-channel": 2}
    head, table = row(made, "lm_head"), row(made, "model.embed_tokens")
    assert head.quantization == table.quantization
    assert (head.reason, head.parameters, head.planned_bytes) == ("tied to model.embed_tokens", 0, 0)
    assert table.planned_bytes == 128 * 64 + 128 * 4
    assert made.coverage == 1.0
    assert made.format == "compressed-tensors"


def test_untied_embeddings_and_heads() -> None:
    made = plan(tiny("llama"), RTNQuantConfig(default_rules=False))
    assert structure(made) == {"int4-g64": 15, "int8-channel": 1}
    made = plan(tiny("llama"), RTNQuantConfig(embeddings="int8"))
    assert structure(made) == {"int4-g64": 14, "int8-channel": 1, "kept": 1}
    assert row(made, "model.embed_tokens").quantization.format == "int-quantized"


def test_rules_reach_the_schemes() -> None:
    rules = [
        {"pattern": "self_attn", "bits": 8, "group_size": "channel"},
        {"pattern": "down_proj", "group_size": 32},
        {"pattern": "lm_head", "keep": False, "bits": 6},
    ]
    made = plan(tiny("llama"), RTNQuantConfig(rules=rules))
    assert structure(made) == {"int8-channel": 8, "int4-g32": 2, "int4-g64": 4, "int6-g64": 1, "kept": 1}


def test_rule_with_a_setting_that_the_method_lacks() -> None:
    with pytest.raises(RuleError, match="sets bits, which the method 'int8_dynamic' does not have"):
        plan(tiny("llama"), Int8DynamicQuantConfig(rules=[{"pattern": "k_proj", "bits": 4}]))


def test_unmatched_pattern_stops_the_plan() -> None:
    with pytest.raises(PatternError, match="'k_proj'"):
        plan(tiny("llama"), RTNQuantConfig(skip=["k_porj"]))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_experts_of_odd_widths_need_the_guarded_format(bits: int) -> None:
    model = tiny("qwen3-moe")
    with pytest.raises(FormatError, match="experts can be 4 or 8 bits") as caught:
        plan(model, RTNQuantConfig(bits=bits))
    assert 'format="guarded"' in caught.value.fix
    made = plan(model, RTNQuantConfig(bits=bits, format="guarded"))
    assert made.format == "guarded"
    assert structure(made) == {f"int{bits}-g64": 12, "kept": 4}


def test_formats_that_refuse() -> None:
    with pytest.raises(FormatError, match=r"nn.Linear and nn.Embedding, not Conv1D"):
        plan(tiny("gpt2"), RTNQuantConfig(format="compressed-tensors"))
    with pytest.raises(FormatError, match="one zero point per tensor"):
        plan(tiny("llama"), RTNQuantConfig(symmetric=False, group_size="tensor"))
    with pytest.raises(FormatError, match="only one dense scheme"):
        plan(tiny("llama"), RTNQuantConfig(symmetric=False, rules=[{"pattern": "k_proj", "bits": 8}]))
    two = [{"pattern": "re:.*experts.gate_up", "bits": 8}]
    with pytest.raises(FormatError, match="all experts must have one scheme"):
        plan(tiny("qwen3-moe"), RTNQuantConfig(rules=two))
    assert plan(tiny("qwen3-moe"), RTNQuantConfig(rules=two, format="guarded")).format == "guarded"


def test_guarded_on_request() -> None:
    assert plan(tiny("llama"), RTNQuantConfig(format="guarded")).format == "guarded"
    assert plan(tiny("llama"), RTNQuantConfig(symmetric=False)).format == "compressed-tensors"


def test_input_ranks_decide_about_activations() -> None:
    model = tiny("llama")
    ranks = {path: {3} for path, _ in model.named_modules()}
    ranks["model.layers.0.self_attn.k_proj"] = {2}
    ranks["model.layers.0.self_attn.v_proj"] = {2, 3}
    ranks["model.layers.0.self_attn.q_proj"] = set()
    made = build_plan(model, Int8DynamicQuantConfig(), ranks)
    assert structure(made) == {"w8a8-dynamic-token": 11, "int8-channel": 3, "kept": 2}
    unknown = build_plan(model, Int8DynamicQuantConfig(), None)
    assert structure(unknown) == {"w8a8-dynamic-token": 14, "kept": 2}


def test_integer_weights_are_left_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    made = plan(model, RTNQuantConfig(min_coverage=0.5))
    assert row(made, "1").reason == "not a floating-point weight (int8)"


def test_plan_records_the_request() -> None:
    made = plan(tiny("llama"), RTNQuantConfig(bits=3, skip=["k_proj"], min_coverage=0))
    assert made.method == "rtn"
    assert (made.request["bits"], made.request["skip"]) == (3, ["k_proj"])
    assert RTNQuantConfig(**made.request).fields == RTNQuantConfig(bits=3, skip=["k_proj"], min_coverage=0).fields


def test_plan_changes_nothing() -> None:
    model, untouched = tiny("qwen3-moe"), tiny("qwen3-moe")
    plan(model, RTNQuantConfig())
    plan(model, Int8DynamicQuantConfig())
    state = model.state_dict()
    assert list(state) == list(untouched.state_dict())
    assert all(torch.equal(state[key], value) for key, value in untouched.state_dict().items())
    assert vars(model.config) == vars(untouched.config)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_plan_leaves_the_random_state_alone(tmp_path: Path) -> None:
    """Wav2Vec2 draws numbers even when it is built on meta."""
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        architectures=["Wav2Vec2ForCTC"],
    )
    with torch.random.fork_rng(devices=[]):
        model = Wav2Vec2ForCTC(config)
    config.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        before = torch.random.get_rng_state()
        plan(given, RTNQuantConfig(group_size=8, min_coverage=0))
        after = torch.random.get_rng_state()
        torch.random.set_rng_state(before)
        assert torch.equal(after, before)


def test_text() -> None:
    text = str(plan(tiny("llama"), RTNQuantConfig()))
    assert text.startswith("rtn: 14 of 16 weights, coverage 100.0%")
    assert "model.layers.0.mlp.down_proj  64×128  int4-g64  (in scope)" in text


def test_not_a_config() -> None:
    with pytest.raises((ConfigError, ValueError), match="Expected an hf_compress configuration, got dict"):
        plan(tiny("llama"), {"bits": 4})  # type: ignore[arg-type]


def test_unknown_input_ranks_leave_layers_outside_the_blocks_weight_only() -> None:
    """Bart's classification head gets (batch, features), and its forward can't be traced without values."""
    made = build_plan(tiny("bert-classifier"), Int8DynamicQuantConfig(), None)
    schemes = {row.name: row.scheme for row in made.rows}
    assert schemes["bert.pooler.dense"] == "int8-channel"
    assert schemes["bert.encoder.layer.0.intermediate.dense"] == "w8a8-dynamic-token"
    assert any("could not be traced" in note for note in made.notes)


def test_plain_modules_quantize_the_inputs_of_every_linear() -> None:
    """No stock reader runs them, and here a row's scale never spans others: their ranks need not be known."""
    with torch.device("meta"):
        model = nn.ModuleDict({"first": nn.Linear(64, 64), "stack": nn.Sequential(nn.Linear(64, 64))})
        alone = nn.ModuleDict({"lstm": nn.LSTM(64, 64), "conv": nn.Conv2d(16, 16, 3)})
    made = plan(model, Int8DynamicQuantConfig())
    assert structure(made) == {"w8a8-dynamic-token": 2}
    assert made.notes == plan(alone, Int8DynamicQuantConfig()).notes == ()


def test_the_note_on_input_shapes_needs_a_linear_that_depends_on_them() -> None:
    config = Int8DynamicQuantConfig(skip=["bert*"], default_rules=False, min_coverage=0.0)
    assert build_plan(tiny("bert-classifier"), config, None).notes != ()
    model = tiny("resnet")
    linears = [row.name for row in build_plan(model, config.__class__(), None).rows if row.kind.value == "linear"]
    skipping = Int8DynamicQuantConfig(skip=linears)
    assert build_plan(model, skipping, None).notes == ()


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2"])
def test_a_convolution_that_is_left_out_costs_no_other_weight_its_format(format: str) -> None:
    """Its one scale per channel is a second scheme, which refuses all the others while it is in the plan."""
    made = plan(tiny("vit"), RTNQuantConfig(symmetric=False, format=format))
    assert made.format == format
    assert {row.kind.value for row in made.quantized} == {"linear"}


def test_auto_is_guarded_where_only_layers_without_a_stock_format_are_in_the_way() -> None:
    """DETR's backbone is too large to leave out, and its scheme per channel is not that of its linear layers."""
    made = plan(tiny("detr"), RTNQuantConfig(bits=4, group_size=32, symmetric=False))
    assert made.format == "guarded"
    assert made.coverage == 1


def test_refusal_names_what_is_in_the_way_and_not_what_would_be_left_out() -> None:
    config = CodebookQuantConfig(codebook="nf4", group_size=64)
    with pytest.raises(FormatError, match=r"class_labels_classifier\.layers\.2 .*multiples of 32 outputs, not 4"):
        plan(tiny("yolos"), config)
    heads = ["class_labels_classifier", "bbox_predictor"]
    assert (
        plan(tiny("yolos"), CodebookQuantConfig(codebook="nf4", group_size=64, skip=heads, min_coverage=0.5)).format
        == "bitsandbytes"
    )
