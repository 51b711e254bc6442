"""GPTQ on blocks of models: closer than rounding, kinds of weights, experts, bad input, the same bytes again."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.experts import collect_experts
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass
from hf_compress.calibration.sources import LiveSource
from hf_compress.core.errors import CalibrationError, ConfigError, GroupSizeError, WeightValueError
from hf_compress.core.registry import METHODS
from hf_compress.methods.gptq.method import GPTQ, compressor
from hf_compress.methods.rtn.method import quantize_scheme
from hf_compress.modules.packed import layout_of, unpack_codes
from tests._utils.blocks import block_of
from tests._utils.tiny import tiny, tiny_inputs

BLOCKS = {
    "llama": "model.layers.0",
    "bert": "encoder.layer.0",
    "t5": "decoder.block.0",
    "gpt2": "transformer.h.0",
    "vit": "vit.layers.0",
    "qwen3-moe": "model.layers.0",
    "mixtral": "model.layers.0",
    "deberta": "deberta.encoder.layer.0",
}
WALKED = sorted(set(BLOCKS) - {"deberta"})  # whose query projection also projects relative positions


def config(**fields: object) -> hfc.GPTQQuantConfig:
    return hfc.GPTQQuantConfig(**{"group_size": 16, "min_coverage": 0.0, "format": "guarded", **fields})


def method(**fields: object) -> GPTQ:
    return compressor(config(**fields).fields)


def with_calls(family: str, count: int = 4, **fields: object) -> Block:
    blocks = [block_of(tiny(family), BLOCKS[family], config(**fields), seed=seed) for seed in range(count)]
    blocks[0].calls = [call for block in blocks for call in block.calls]
    return blocks[0]


def outputs(block: Block) -> list[Tensor]:
    """What the block gives for the tokens that count."""
    return [call.tokens(call.run(block.module)) for call in block.calls]


def error(block: Block, targets: list[Tensor]) -> float:
    pairs = zip(outputs(block), targets, strict=True)
    return sum(float((made - target).square().sum()) for made, target in pairs)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_outputs_are_closer_than_rounded_ones(family, bits):
    block = with_calls(family, bits=bits)
    nearest, ours = deepcopy(block), deepcopy(block)
    targets = outputs(block)
    for row in nearest.rows:
        nearest.install(row, quantize_scheme(nearest.weight(row), layout_of(row).scheme))
    method(bits=bits).compress(ours)
    assert set(ours.finished.packed) == {row.name for row in block.rows}
    assert ours.advanced == (family in WALKED)
    ours.calls = deepcopy(block.calls)
    assert error(ours, targets) < 0.6 * error(nearest, targets)


@torch.no_grad()
def test_one_walk_and_two_passes_are_about_as_good():
    walked = with_calls("llama")
    module = walked.module
    targets, calls = outputs(walked), deepcopy(walked.calls)
    two = deepcopy(walked)
    for call in two.calls:  # a block whose calls hold nothing between them is not walked through
        call.kwargs, call.name, call.hidden = {"hidden_states": call.hidden, **call.kwargs}, None, None
    method().compress(walked)
    method().compress(two)
    assert walked.advanced
    assert not two.advanced
    assert module is walked.module
    walked.calls = two.calls = calls
    assert error(walked, targets) == pytest.approx(error(two, targets), rel=0.2)


@pytest.mark.parametrize(
    "fields", [{"symmetric": False}, {"act_order": False}, {"group_size": "channel"}, {"bits": 8}]
)
@torch.no_grad()
def test_fields_reach_the_solver(fields):
    usual, other = with_calls("llama", **fields), with_calls("llama", **fields)
    method(**{**fields, "block_size": 1}).compress(usual)
    method(**fields).compress(other)
    for name, packed in other.finished.packed.items():
        assert (packed.zero_point is None) == fields.get("symmetric", True)
        # Only the order of float32 sums depends on the block size: here and there a code falls on the other side.
        assert (packed.dense() != usual.finished.packed[name].dense()).float().mean() < 0.01


@torch.no_grad()
def test_same_data_same_bytes():
    first, second = with_calls("llama"), with_calls("llama")
    for block in (first, second):
        method().compress(block)
    for name, packed in first.finished.packed.items():
        again = second.finished.packed[name].parts()
        assert all(torch.equal(value, again[part]) for part, value in packed.parts().items())


@pytest.mark.parametrize("policy", ["share", "round"])
@torch.no_grad()
def test_experts_without_tokens(policy, caplog):
    block = with_calls("qwen3-moe", 1, experts=policy)
    with caplog.at_level(logging.WARNING, "hf_compress"):
        method(experts=policy).compress(block)
    assert "experts of model.layers.0.mlp.experts.gate_up_proj are reached by fewer than 16 tokens" in caplog.text
    assert len(block.finished.packed) == len(block.rows)


@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_experts_to_round_are_rounded_to_nearest(symmetric, group_size):
    fields = {"experts": "round", "group_size": group_size, "symmetric": symmetric, "bits": 3}
    block = with_calls("qwen3-moe", 1, **fields)
    row = next(row for row in block.rows if row.parameter == "gate_up_proj")
    reached = collect_experts(block, block.rows)[row.module]
    poor = [expert for expert in range(8) if reached.tokens(expert) < 16]
    expected = quantize_scheme(block.weight(row), layout_of(row).scheme)
    method(**fields).compress(block)
    packed = block.finished.packed[row.name]
    assert poor
    assert torch.equal(unpack_codes(packed.codes, 3, row.shape[-1])[poor], expected.codes[poor])
    chosen = slice(None) if group_size == "tensor" else poor
    assert torch.equal(packed.scale[chosen], expected.scale[chosen])


@torch.no_grad()
def test_experts_without_tokens_raise_if_wanted():
    block = with_calls("qwen3-moe", 1)
    with pytest.raises(CalibrationError, match=r"of 8 experts of .*gate_up_proj.*Fix: .*experts=\"share\""):
        method(experts="error").compress(block)


@pytest.mark.parametrize("group_size", [16, "tensor"])
@torch.no_grad()
def test_experts_read_what_compressed_ones_give(group_size):
    """The second projection is solved for what the first one, compressed, makes of the tokens."""
    block = with_calls("mixtral", 6, group_size=group_size)
    targets = outputs(block)
    nearest = deepcopy(block)
    for row in nearest.rows:
        nearest.install(row, quantize_scheme(nearest.weight(row), layout_of(row).scheme))
    calls = deepcopy(block.calls)
    method(group_size=group_size).compress(block)
    block.calls = calls
    assert error(block, targets) < 0.7 * error(nearest, targets)


class Convolutions(nn.Module):
    """Convolutions with and without groups, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.recurrent = nn.LSTM(16, 8, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, value: Tensor) -> Tensor:
        made = self.grouped(self.deep(self.first(value)).relu())
        return self.last(self.recurrent(made.flatten(2).transpose(1, 2))[0])


@pytest.mark.parametrize("group_size", ["channel", "tensor"])
@torch.no_grad()
def test_convolutions_and_recurrent_layers(group_size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = Convolutions().eval()
    value = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    request = config(group_size=group_size, rules=[{"pattern": "*", "group_size": group_size}])
    block = Block(0, "", module, plan_model(module, request).quantized, [Call(value)])
    nearest, targets = deepcopy(block), outputs(block)
    for row in nearest.rows:
        nearest.install(row, quantize_scheme(nearest.weight(row), layout_of(row).scheme))
    compressor(request.fields).compress(block)
    assert len(block.finished.packed) == 6
    block.calls = nearest.calls = [Call(value)]
    assert error(block, targets) < 0.8 * error(nearest, targets)


@torch.no_grad()
def test_a_layer_that_no_token_reaches():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, value: Tensor) -> Tensor:
            return self.used(value)

    with torch.random.fork_rng(devices=[]):
        module = Unused().eval()
    block = Block(0, "", module, plan_model(module, config()).quantized, [Call(torch.ones(1, 2, 16))])
    with pytest.raises(CalibrationError, match=r"never reaches unused .*skip=\[\"unused\"\]"):
        method().compress(block)
    assert not block.finished.packed


@torch.no_grad()
def test_bad_weights_are_named():
    block = with_calls("llama", 1)
    block.module.get_parameter("mlp.up_proj.weight")[1, 2] = float("nan")
    with pytest.raises(WeightValueError, match=r"mlp\.up_proj holds 1 NaN"):
        method().compress(block)


def test_embedding_tables_are_rounded():
    model = tiny("llama", vocab_size=128)
    request = config(embeddings="int8")
    finished = Pass(
        LiveSource(model),
        plan_model(model, request),
        compressor(request.fields),
        [tiny_inputs(model)],
        MemoryResults(),
    ).run()
    table = finished.packed["model.embed_tokens"]
    expected = quantize_scheme(model.get_parameter("model.embed_tokens.weight").detach(), table.layout.scheme)
    assert torch.equal(table.codes, expected.codes)


def test_group_sizes_that_do_not_divide_are_refused_before_anything():
    with pytest.raises(GroupSizeError, match="does not divide the 64 inputs"):
        plan_model(tiny("llama"), config(group_size=48))


@pytest.mark.parametrize(
    "fields", [{"damping": 0}, {"damping": 2.0}, {"block_size": 0}, {"experts": "maybe"}, {"bits": 9}]
)
def test_impossible_values(fields):
    with pytest.raises(ConfigError):
        hfc.GPTQQuantConfig(**fields)


def test_fields_of_another_method():
    with pytest.raises(ConfigError, match="damping"):
        METHODS.get("gptq").compressor(hfc.RTNQuantConfig().fields)


def test_request_survives_json():
    request = config(experts="round", damping=0.05, act_order=False)
    assert hfc.QuantConfig.from_dict(request.to_dict()).fields == request.fields
    assert '"experts": "round"' in request.to_json_string()
