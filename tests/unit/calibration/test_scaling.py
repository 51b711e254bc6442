from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.scaling import ScaleGroup, apply, find_groups, survey, trial
from tests._utils.blocks import block_of
from tests._utils.tiny import tiny

_LLAMA = {
    "input_layernorm.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "post_attention_layernorm.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "self_attn.v_proj.weight": ["self_attn.o_proj.weight"],
    "mlp.up_proj.weight": ["mlp.down_proj.weight"],
}
_MOE = {
    **{name: _LLAMA[name] for name in ("input_layernorm.weight", "self_attn.v_proj.weight")},
    "post_attention_layernorm.weight": ["mlp.gate.weight", "mlp.experts.gate_up_proj"],
    "mlp.experts.gate_up_proj": ["mlp.experts.down_proj"],
}
_OPT = {
    "self_attn_layer_norm.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "self_attn.v_proj.weight": ["self_attn.out_proj.weight"],
    "final_layer_norm.weight": ["fc1.weight"],
    "fc1.weight": ["fc2.weight"],
}
_T5 = {
    "layer.0.layer_norm.weight": [f"layer.0.SelfAttention.{name}.weight" for name in "qkv"],
    "layer.0.SelfAttention.v.weight": ["layer.0.SelfAttention.o.weight"],
    "layer.1.layer_norm.weight": ["layer.1.EncDecAttention.q.weight"],
    "layer.1.EncDecAttention.v.weight": ["layer.1.EncDecAttention.o.weight"],
    "layer.2.layer_norm.weight": ["layer.2.DenseReluDense.wi.weight"],
    "layer.2.DenseReluDense.wi.weight": ["layer.2.DenseReluDense.wo.weight"],
}
_SWITCH = "layer.1.mlp.experts.expert"
FAMILIES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "llama": ("model.layers.1", _LLAMA),
    "gemma": ("model.layers.0", _LLAMA),
    "qwen3-moe": ("model.layers.0", _MOE),
    "mixtral": ("model.layers.0", _MOE),
    "bert": ("encoder.layer.0", {"attention.self.value.weight": ["attention.output.dense.weight"]}),
    "gpt2": (
        "transformer.h.0",
        {
            "ln_1.weight": ["attn.c_attn.weight"],
            "attn.c_attn.weight": ["attn.c_proj.weight"],
            "ln_2.weight": ["mlp.c_fc.weight"],
        },
    ),
    "opt": ("model.decoder.layers.0", _OPT),
    "bart": (
        "model.decoder.layers.0",
        {f"{name}.v_proj.weight": [f"{name}.out_proj.weight"] for name in ("self_attn", "encoder_attn")},
    ),
    "t5": ("decoder.block.1", _T5),
    "switch": (
        "encoder.block.1",
        {
            "layer.0.layer_norm.weight": [f"layer.0.SelfAttention.{name}.weight" for name in "qkv"],
            "layer.0.SelfAttention.v.weight": ["layer.0.SelfAttention.o.weight"],
            # The experts that the first row reaches; scaled trials route it elsewhere.
            **{f"{_SWITCH}_{n}.wi.weight": [f"{_SWITCH}_{n}.wo.weight"] for n in (0, 2, 3)},
        },
    ),
    "vit": (
        "vit.layers.0",
        {
            "layernorm_before.weight": [f"attention.{name}_proj.weight" for name in "qkv"],
            "attention.v_proj.weight": ["attention.o_proj.weight"],
            "layernorm_after.weight": ["mlp.fc1.weight"],
        },
    ),
    "modernbert": (
        "model.layers.1",
        {
            "attn_norm.weight": ["attn.Wqkv.weight"],
            "attn.Wqkv.weight": ["attn.Wo.weight"],
            "mlp_norm.weight": ["mlp.Wi.weight"],
            "mlp.Wi.weight": ["mlp.Wo.weight"],
        },
    ),
}


def by_producer(groups: list[ScaleGroup]) -> dict[str, list[str]]:
    return {group.producer.name: [part.name for part in group.consumers] for group in groups}


def uneven(group: ScaleGroup, seed: int = 3) -> Tensor:
    """Scales from 0.3 to 3 that are no powers of two."""
    return torch.empty(group.shape).uniform_(-1.2, 1.1, generator=torch.Generator().manual_seed(seed)).exp()


def one(block: Block, producer: str) -> ScaleGroup:
    return next(group for group in find_groups(block) if group.producer.name == producer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_of_a_family_are_found_and_leave_its_function_alone(name: str) -> None:
    path, expected = FAMILIES[name]
    block = block_of(tiny(name), path)
    before = {key: value.clone() for key, value in block.module.state_dict().items()}
    groups = find_groups(block)
    assert by_producer(groups) == expected
    assert all(torch.equal(value, before[key]) for key, value in block.module.state_dict().items())
    wide = block.module if "experts" in str(groups) else block.module.double()  # no grouped product in float64
    with torch.no_grad():
        call = _cast(block.calls[0], next(wide.parameters()).dtype)
        base = call.run(wide)
        for seed, group in enumerate(groups):
            apply(block, group, uneven(group, seed))
        # Scales are float32, and a norm's stored gain is divided out in float32; the same on both sides up to that.
        torch.testing.assert_close(call.run(wide), base, rtol=1e-5, atol=5e-6)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    assert call.hidden is not None
    return Call(call.hidden.to(dtype), call.name, _cast_value(call.args, dtype), _cast_value(call.kwargs, dtype))


def _cast_value(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast_value(part, dtype) for part in value)
    return {key: _cast_value(part, dtype) for key, part in value.items()} if isinstance(value, dict) else value


def test_grouped_query_heads_share_their_scales() -> None:
    group = one(block_of(tiny("llama"), "model.layers.0"), "self_attn.v_proj.weight")
    # Two heads of keys and values, 16 channels each; two heads of queries read each of them.
    channels = torch.arange(64)
    index = group.consumers[0].index
    assert group.shape == (32,)
    assert index is not None
    assert torch.equal(index, channels // 32 * 16 + channels % 16)


def test_only_the_value_rows_of_a_fused_layer_are_scaled() -> None:
    group = one(block_of(tiny("gpt2"), "transformer.h.0"), "attn.c_attn.weight")
    assert group.producer.transposed
    assert group.producer.index is not None
    assert torch.equal(group.producer.index, torch.arange(128, 192))
    assert group.biases == ("attn.c_attn.bias",)


def test_gemma_adds_one_to_its_norms() -> None:
    assert one(block_of(tiny("gemma"), "model.layers.0"), "input_layernorm.weight").offset == 1.0
    assert one(block_of(tiny("llama"), "model.layers.0"), "input_layernorm.weight").offset == 0.0


def test_experts_are_scaled_each_for_itself() -> None:
    group = one(block_of(tiny("qwen3-moe"), "model.layers.0"), "mlp.experts.gate_up_proj")
    assert group.shape == (8, 64)


@pytest.mark.parametrize(
    ("name", "path", "norm"),
    [
        ("bert", "encoder.layer.0", "attention.output.LayerNorm.weight"),
        ("bart", "model.encoder.layers.0", "self_attn_layer_norm.weight"),
    ],
)
def test_a_norm_that_feeds_the_residual_too_is_rejected_for_that(name: str, path: str, norm: str) -> None:
    block = block_of(tiny(name), path)
    rejected = {one.producer: one for one in survey(block).rejected}
    assert set(rejected) >= {norm}
    assert rejected[norm].reason.startswith("something else reads it too, such as a residual")


def test_gelu_keeps_rows_from_being_scaled_and_relu_does_not() -> None:
    assert "fc1.weight" not in by_producer(find_groups(block_of(tiny("bart"), "model.encoder.layers.0")))
    relu = tiny("bart", activation_function="relu")
    assert "fc1.weight" in by_producer(find_groups(block_of(relu, "model.encoder.layers.0")))


class _Leaky(nn.Module):
    """A norm whose output a layer reads, and a hundredth of it also bypasses the layer."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 16)
        self.leak = leak
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return self.first(normed) + self.leak * normed


class _Around(nn.Module):
    def __init__(self, leak: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.block = _Leaky(leak)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.block(hidden)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(("leak", "found"), [(0.0, ["norm.weight"]), (0.01, [])])
def test_a_small_leak_is_seen(leak: float, found: list[str], massive: bool, dtype: torch.dtype) -> None:
    model = _Around(leak)
    if massive:  # one channel of the output is larger than all that leaks into the others
        model.block.first.bias.data[3] = 3000.0
    model = model.to(dtype)
    rows = plan_model(model, hfc.RTNQuantConfig(group_size=16)).quantized
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    block = Block(0, "block", model.block, rows, [Call(hidden)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(by_producer(find_groups(block))) == found
    assert all(value.dtype == dtype for value in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_of_kept_parameters_are_part_of_the_result(dtype: torch.dtype) -> None:
    block = block_of(tiny("gemma", dtype=dtype), "model.layers.0")
    group = one(block, "input_layernorm.weight")
    weights = {row.name: block.weight(row).clone() for row in block.rows}
    gain = block.module.get_parameter(group.producer.name).detach().clone()
    applied = apply(block, group, uneven(group))
    assert set(block.finished.changed) == {"model.layers.0.input_layernorm.weight"}
    after = block.finished.changed["model.layers.0.input_layernorm.weight"]
    assert after.dtype == dtype
    assert torch.equal(after, block.module.get_parameter(group.producer.name))
    # What the consumers take is the ratio of the gains as they are stored, so that only their own rounding is left.
    torch.testing.assert_close(applied, (gain.float() + 1) / (after.float() + 1), rtol=1e-6, atol=0)
    for row in block.rows:
        scaled = row.module.endswith(("q_proj", "k_proj", "v_proj"))
        expected = (weights[row.name].float() * applied).to(dtype) if scaled else weights[row.name]
        assert torch.equal(block.weight(row), expected)


def test_a_trial_leaves_no_trace() -> None:
    block = block_of(tiny("qwen3-moe"), "model.layers.0")
    before = {key: value.clone() for key, value in block.module.state_dict().items()}
    groups = find_groups(block)
    router = block.module.get_parameter("mlp.gate.weight")
    with trial(block.module, [(group, uneven(group)) for group in groups]):
        assert not torch.equal(router, before["mlp.gate.weight"])
    assert all(torch.equal(value, before[key]) for key, value in block.module.state_dict().items())
    assert not block.finished.changed


def test_kept_layers_of_a_whole_model_are_left_alone() -> None:
    """They may belong to blocks that are finished."""
    model = tiny("llama")
    rows = plan_model(model, hfc.RTNQuantConfig(group_size=16)).quantized
    call = Call(None, kwargs={"input_ids": torch.arange(5, 17).view(2, 6), "use_cache": False})
    everything = by_producer(find_groups(Block(0, "", model, rows, [call])))
    assert len(everything) == 8
    some = tuple(row for row in rows if row.module.endswith(("q_proj", "down_proj")))
    assert not find_groups(Block(0, "", model, some, [call]))


def test_norms_that_round_too_coarsely_to_be_understood_are_rejected_for_that() -> None:
    """A whole model in 16 bits is run as it is, where 1 + weight is rounded to 2^-9."""
    model = tiny("gemma", dtype=torch.bfloat16)
    rows = plan_model(model, hfc.RTNQuantConfig(group_size=16)).quantized
    call = Call(None, kwargs={"input_ids": torch.arange(5, 17).view(2, 6), "use_cache": False})
    rejected = {one.producer: one for one in survey(Block(0, "", model, rows, [call])).rejected}
    norm = rejected["model.layers.0.post_attention_layernorm.weight"]
    assert norm.consumers == tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    assert "1 + weight" in norm.reason
    wide = Block(0, "", model.float(), rows, [call])
    assert norm.producer in by_producer(find_groups(wide))


def test_a_block_without_data_has_no_groups() -> None:
    block = block_of(tiny("llama"), "model.layers.0")
    block.calls.clear()
    assert not find_groups(block)
