from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Block, Call
from hf_compress.calibration.experts import ExpertPolicy, collect_experts
from hf_compress.calibration.gram import collect
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass
from hf_compress.calibration.scaling import find_groups
from hf_compress.calibration.sources import LiveSource
from hf_compress.core.errors import CalibrationError, ConfigError, WeightValueError
from hf_compress.core.registry import METHODS, Quantized
from hf_compress.core.scheme import weight_args
from hf_compress.methods.awq.method import AWQ, _Work, compressor
from hf_compress.methods.awq.search import (
    Clipping,
    Consumer,
    best_scales,
    candidates,
    channel_share,
    clipped_ranges,
    quantize_ranges,
    ranges,
    scaled_error,
)
from hf_compress.methods.rtn.method import quantize as round_to_nearest
from hf_compress.methods.rtn.method import quantize_scheme
from hf_compress.modules.packed import unpack_codes
from tests._utils.blocks import block_of
from tests._utils.tiny import tiny, tiny_inputs

GRIDS = [(4, 8, True), (4, 8, False), (3, "channel", True), (2, 16, False)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(columns: int, seed: int = 1) -> Tensor:
    """Of correlated inputs with some large channels."""
    inputs = normal(200, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    inputs[:, ::7] *= 6
    return inputs.T @ inputs


def dense(made: Quantized) -> Tensor:
    """Dequantized in float64."""
    cells = made.codes.double().unflatten(-1, (made.scale.shape[-1], -1))
    zeros = 0.0 if made.zero_point is None else made.zero_point.double().unsqueeze(-1)
    return ((cells - zeros) * made.scale.double().unsqueeze(-1)).flatten(-2)


def output_error(made: Quantized, weight: Tensor, gram: Tensor, scales: Tensor | None = None) -> float:
    """tr(ΔW G ΔWᵀ), float64."""
    columns = torch.ones(weight.shape[-1]).double() if scales is None else scales.double()
    error = dense(made) / columns - weight.double()
    return float(torch.trace(error @ gram.double() @ error.T))


def awq(**fields: object) -> AWQ:
    return compressor(hfc.AWQQuantConfig(**{"group_size": 16, **fields}).fields)


def rounded(block: Block) -> None:
    for row in block.rows:
        assert row.quantization is not None
        block.install(row, quantize_scheme(block.weight(row), row.quantization))


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_whole_ranges_round_to_nearest(bits: int, group_size: int | str, symmetric: bool) -> None:
    weight, args = normal(24, 48) + 0.1, weight_args(bits, group_size, symmetric)
    made, expected = quantize_ranges(weight, *ranges(weight, args), args), round_to_nearest(weight, args)
    assert torch.equal(made.codes, expected.codes)
    assert torch.equal(made.scale, expected.scale)
    assert (made.zero_point is None) == symmetric
    if made.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(made.zero_point, expected.zero_point)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_the_scale_search_is_a_search_of_the_whole_grid(bits: int, group_size: int | str, symmetric: bool) -> None:
    args, gram = weight_args(bits, group_size, symmetric), gram_of(48)
    weights = [normal(24, 48, seed=2), 3 * normal(12, 48, seed=3)]
    consumers = [Consumer(weight, gram, args) for weight in weights]
    activation = gram.diagonal().sqrt()
    tried = candidates(activation, channel_share(consumers, 48), 10)
    errors = [
        sum(output_error(round_to_nearest(weight * scales, args), weight, gram, scales) for weight in weights)
        for scales in tried
    ]
    for scales, error in zip(tried, errors, strict=True):
        # Sums of 48 × 48 products in float32, of errors that cancel little.
        assert sum(scaled_error(one, scales) for one in consumers) == pytest.approx(error, rel=1e-4)
    best, gain = best_scales(consumers, activation, 10, clip=False)
    assert torch.equal(best, tried[min(range(len(errors)), key=errors.__getitem__)])
    assert gain == pytest.approx(min(errors) / errors[0], rel=1e-4)
    assert gain < 1


def test_candidates_are_powers_of_activations_and_weights() -> None:
    activation, share = normal(6).abs() + 0.1, normal(6, seed=1).abs() + 0.1
    tried = candidates(activation, share, 4)
    assert len(tried) == 9
    assert torch.equal(tried[0], torch.ones(6))
    for number, scales in enumerate(tried[1:5], start=1):
        raw = activation.double() ** (number / 4)
        torch.testing.assert_close(scales.double(), raw / (raw.min() * raw.max()).sqrt(), rtol=1e-5, atol=0)
    for number, scales in enumerate(tried[5:]):
        raw = activation.double() ** (number / 4) / share.double() ** (1 - number / 4)
        torch.testing.assert_close(scales.double(), raw / (raw.min() * raw.max()).sqrt(), rtol=1e-5, atol=0)


def test_channels_that_feed_several_columns_share_a_scale() -> None:
    index = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    one = Consumer(normal(4, 8), gram_of(8), weight_args(4, 8, True), index)
    share = channel_share([one], 4)
    size = one.weight.abs() / one.weight.abs().amax(-1, keepdim=True)
    expected = torch.stack([size[:, index == channel].mean() for channel in range(4)])
    torch.testing.assert_close(share, expected)
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0])
    wide = Consumer(one.weight, one.gram, one.args)
    assert scaled_error(one, scales) == scaled_error(wide, scales[index])


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_the_clip_search_tries_all_fractions(bits: int, group_size: int | str, symmetric: bool) -> None:
    """Against a slow search, row by row and group by group in float64."""
    weight, args, gram = normal(6, 48), weight_args(bits, group_size, symmetric), gram_of(48)
    fractions = [1.05, 0.9, 0.7, 0.5]
    search = Clipping(weight, gram, args, torch.float32)
    search.run(fractions, 2)
    full = ranges(weight, args)
    low, high = (value.clone() for value in full)
    for _ in range(2):
        for group in range(low.shape[1]):
            for row in range(len(weight)):
                losses = {}
                for fraction in [None, *fractions]:
                    lower, upper = low[row : row + 1].clone(), high[row : row + 1].clone()
                    if fraction is not None:
                        lower[0, group] = full[0][row, group] * fraction
                        upper[0, group] = full[1][row, group] * fraction
                    made = quantize_ranges(weight[row : row + 1], lower, upper, args)
                    losses[output_error(made, weight[row : row + 1], gram)] = lower, upper
                low[row], high[row] = (value[0] for value in losses[min(losses)])
    assert torch.equal(search.low, low)
    assert torch.equal(search.high, high)
    # The error that the search carries along is the one of the grids that it found.
    made = quantize_ranges(weight, search.low, search.high, args)
    torch.testing.assert_close(search.error.double(), dense(made) - weight.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_no_row_is_worse_than_rounded_to_nearest(bits: int, group_size: int | str, symmetric: bool) -> None:
    weight, args, gram = normal(32, 48), weight_args(bits, group_size, symmetric), gram_of(48)
    made = quantize_ranges(weight, *clipped_ranges(weight, gram, args), args)
    before = round_to_nearest(weight, args)
    for row in range(len(weight)):
        one = Quantized(made.codes[row : row + 1], made.scale[row : row + 1], _row(made.zero_point, row))
        other = Quantized(before.codes[row : row + 1], before.scale[row : row + 1], _row(before.zero_point, row))
        part = weight[row : row + 1]
        assert output_error(one, part, gram) <= output_error(other, part, gram) * (1 + 1e-4)
    assert output_error(made, weight, gram) < 0.8 * output_error(before, weight, gram)


def _row(value: Tensor | None, row: int) -> Tensor | None:
    return None if value is None else value[row : row + 1]


CASES = [
    ("llama", "model.layers.0"),
    ("gpt2", "transformer.h.0"),
    ("bert", "encoder.layer.0"),
    ("opt", "model.decoder.layers.0"),
    ("t5", "decoder.block.0"),
    ("vit", "vit.layers.0"),
    ("qwen3-moe", "model.layers.0"),
    ("gemma", "model.layers.0"),
]


@pytest.mark.parametrize(("name", "path"), CASES)
def test_blocks_come_closer_to_their_output_than_rounded_to_nearest(name: str, path: str) -> None:
    model, errors = tiny(name), []
    for compress in (rounded, awq().compress):
        block = block_of(model, path)
        call = block.calls[0]
        with torch.no_grad():
            before = call.tokens(call.run(block.module))
        compress(block)
        assert set(block.finished.packed) == {row.name for row in block.rows}
        with torch.no_grad():
            errors.append(float((call.tokens(call.run(block.module)) - before).square().sum()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "fields", [{"symmetric": False}, {"group_size": "channel"}, {"group_size": "tensor"}, {"clip": False}]
)
def test_every_grid_gains(fields: dict[str, object]) -> None:
    errors = []
    config = {"group_size": 16, **{key: value for key, value in fields.items() if key != "clip"}}
    for compress in (rounded, awq(**fields).compress):
        block = block_of(tiny("llama"), "model.layers.0", hfc.RTNQuantConfig(min_coverage=0.0, **config))
        call = block.calls[0]
        with torch.no_grad():
            before = call.tokens(call.run(block.module))
            compress(block)
            errors.append(float((call.tokens(call.run(block.module)) - before).square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_the_same_data_gives_the_same_bytes(name: str) -> None:
    results = []
    for _ in range(2):
        block = block_of(tiny(name), "model.layers.0")
        awq().compress(block)
        results.append(block.finished)
    for row, packed in results[0].packed.items():
        other = results[1].packed[row].parts()
        assert all(torch.equal(value, other[part]) for part, value in packed.parts().items())
    assert results[0].changed.keys() == results[1].changed.keys() != set()
    assert all(torch.equal(value, results[1].changed[key]) for key, value in results[0].changed.items())


def test_weights_without_a_group_are_named(caplog: pytest.LogCaptureFixture) -> None:
    block = block_of(tiny("bert"), "encoder.layer.0")
    with caplog.at_level(logging.INFO, "hf_compress"):
        awq().compress(block)
    assert "encoder.layer.0: no layer before 5 of 6 weights can take scales" in caplog.text
    assert "encoder.layer.0.output.dense" in caplog.text


def test_experts_on_one_grid_follow_the_policy_too() -> None:
    request = hfc.AWQQuantConfig(group_size="tensor", experts="error", format="guarded", min_coverage=0.0)
    with pytest.raises(CalibrationError, match=r"experts of model\.layers\.0\.mlp\.experts\..* are reached by fewer"):
        compressor(request.fields).compress(block_of(tiny("qwen3-moe"), "model.layers.0", request))


def gpt_oss() -> GptOssForCausalLM:
    """A model whose experts clamp between their projections, so that no scales can be moved across."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        model = GptOssForCausalLM(GptOssConfig(vocab_size=128, **shape, **experts)).eval()
    for seed, parameter in enumerate(model.parameters()):
        value = normal(*parameter.shape, seed=seed)
        parameter.data.copy_(value * 0.2 if parameter.ndim > 1 else value.abs() + 0.1)
    return model


@torch.no_grad()
def test_scales_before_experts_do_not_change_what_their_second_projection_reads() -> None:
    request = hfc.AWQQuantConfig(bits=8, group_size=32, format="guarded", min_coverage=0.0)
    block = block_of(gpt_oss(), "model.layers.0", request)
    experts = collect_experts(block, block.rows)
    first, second = (row for row in block.rows if row.kind == "experts")
    assert second.parameter == "down_proj"
    work = _Work(block, request.fields, collect(block), experts)  # type: ignore[arg-type]

    def grams() -> list[Tensor]:
        return [one.gram for one in experts[second.module].each(second, ExpertPolicy.SHARE) if one is not None]

    before = grams()
    for group in find_groups(block):
        work.scale(group)
    assert float(work.scaled[first.name].max() / work.scaled[first.name].min()) > 1.5
    assert second.name not in work.scaled
    for ours, expected in zip(grams(), before, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-5  # float32 products and divisions
    work.finish(first)
    for ours, expected in zip(grams(), before, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 0.05  # 8 bits leave about 1 % of the first one


def test_experts_with_few_tokens_follow_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CalibrationError, match=r"experts of model\.layers\.0\.mlp\.experts\..* are reached by fewer"):
        awq(experts="error").compress(block_of(tiny("qwen3-moe"), "model.layers.0"))
    block = block_of(tiny("qwen3-moe"), "model.layers.0")
    weight = block.weight(next(row for row in block.rows if row.parameter == "down_proj")).clone()
    awq(experts=ExpertPolicy.ROUND).compress(block)
    assert 'experts="round" decides' in caplog.text
    # 15 tokens, two experts each: no expert has the 16 that its 64 columns ask for.
    expected = round_to_nearest(weight, weight_args(4, 16, True))
    packed = block.finished.packed["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(packed.scale, expected.scale)


def test_convolutions_are_clipped() -> None:
    model = tiny("resnet")
    config = hfc.AWQQuantConfig(bits=3, group_size="channel", format="guarded", min_coverage=0.0)
    plan, inputs = plan_model(model, config), tiny_inputs(model)
    done = Pass(LiveSource(model), plan, compressor(config.fields), [inputs], MemoryResults()).run()
    kinds = {row.kind for row in plan.quantized}
    assert "conv" in kinds
    with torch.no_grad():
        base = model(**inputs).logits
        errors = []
        for result in (None, done.packed):
            other = tiny("resnet")
            for row in plan.quantized:
                target = other.get_parameter(row.key)
                assert row.quantization is not None
                made = round_to_nearest(target.data.reshape(row.shape), row.quantization.weights)  # type: ignore[arg-type]
                target.data.copy_(dense(made).reshape(target.shape) if result is None else result[row.name].dense())
            errors.append(float((other(**inputs).logits - base).square().sum()))
    assert errors[1] < errors[0]


def test_grouped_convolutions_on_one_grid_are_rounded_to_nearest() -> None:
    with torch.random.fork_rng(devices=[]):
        module = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, groups=2)).eval()
    module[0].weight.data.copy_(normal(16, 4, 3, 3))
    rules = [{"pattern": "*", "group_size": "tensor"}]
    request = hfc.AWQQuantConfig(format="guarded", rules=rules)
    block = Block(0, "", module, plan_model(module, request).quantized, [Call(normal(2, 8, 6, 6))])
    (row,) = block.rows
    expected = round_to_nearest(block.weight(row), weight_args(4, "tensor", True))
    compressor(request.fields).compress(block)
    packed = block.finished.packed[row.name]
    assert torch.equal(packed.scale, expected.scale)
    assert torch.equal(unpack_codes(packed.codes, 4, row.shape[-1]), expected.codes)


def test_a_live_model_is_scaled_where_it_stays_dense() -> None:
    model = tiny("llama")
    before = model.model.layers[1].input_layernorm.weight.detach().clone()
    config = hfc.AWQQuantConfig(group_size=16)
    inputs = tiny_inputs(model)
    made = hfc.quantize(model, config, calibration=hfc.Calibration([dict(inputs)], min_rows=1, min_tokens=1))
    assert not torch.equal(made.model.layers[1].input_layernorm.weight, before)
    with torch.no_grad():
        difference = made(**inputs).logits - tiny("llama")(**inputs).logits
        plain = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(group_size=16))(**inputs).logits
    assert difference.square().sum() < (plain - tiny("llama")(**inputs).logits).square().sum()


@pytest.mark.parametrize("fields", [{"grid": 0}, {"grid": 2.5}, {"clip": "yes"}, {"experts": "drop"}, {"damping": 1}])
def test_impossible_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        hfc.AWQQuantConfig(**fields)


def test_another_methods_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="RTNFields"):
        METHODS.get("awq").compressor(hfc.RTNQuantConfig().fields)  # type: ignore[misc]


def test_bad_values_are_refused() -> None:
    block = block_of(tiny("llama"), "model.layers.0")
    block.module.get_parameter("mlp.down_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(WeightValueError, match=r"mlp\.down_proj"):
        awq().compress(block)
    block = block_of(tiny("llama"), "model.layers.0")
    assert block.calls[0].hidden is not None
    block.calls[0].hidden[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        awq().compress(block)
    block = block_of(tiny("llama"), "model.layers.0")
    block.calls.clear()
    with pytest.raises(CalibrationError, match="never reaches"):
        awq().compress(block)


def test_scaled_columns_are_judged_by_the_input_before() -> None:
    """Clipping W·s for inputs x / s is clipping it by G / (s sᵀ)."""
    weight, gram, args = normal(12, 32), gram_of(32), weight_args(4, 8, True)
    columns = normal(32, seed=5).exp()
    divided = gram.double() / columns.double().unsqueeze(0) / columns.double().unsqueeze(1)
    ours = clipped_ranges(weight * columns, gram, args, columns)
    expected = clipped_ranges(weight * columns, divided.float(), args)
    # Both in float32, where nearly equal fractions may change places.
    assert float((ours[1] == expected[1]).float().mean()) > 0.95
    made, other = (quantize_ranges(weight * columns, *found, args) for found in (ours, expected))
    errors = [output_error(one, weight * columns, divided.double()) for one in (made, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
