from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_compress as hfc
from hf_compress.calibration.block import Block
from hf_compress.calibration.results import MemoryResults
from hf_compress.calibration.runner import Pass
from hf_compress.calibration.sources import LiveSource
from hf_compress.core.build import build_plan
from hf_compress.core.errors import CalibrationError, ConfigError, WeightValueError
from hf_compress.core.plan import Plan
from hf_compress.core.registry import METHODS, Quantized
from hf_compress.core.scheme import groups, weight_args
from hf_compress.methods.autoround.config import ITERATIONS, AutoRoundFields
from hf_compress.methods.autoround.method import AutoRound, compressor
from hf_compress.methods.autoround.rounding import LEAST, Rounding
from hf_compress.methods.rtn.method import quantize as round_to_nearest
from hf_compress.modules.packed import dequantize, unpack_codes
from tests._utils.tiny import output, tiny, tiny_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEARNS = {"iterations": 12, "batch_rows": 4}

Batches = list[dict[str, Tensor]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches_of(model: torch.nn.Module, count: int = 4) -> Batches:
    return [tiny_inputs(model, seed) for seed in range(count)]  # type: ignore[arg-type]


def plan_of(model: torch.nn.Module, **fields: Any) -> Plan:
    """A plan of uniform grids that any format may hold."""
    given = {"bits": 3, "group_size": 16, "min_coverage": 0.1, "format": "guarded", **fields}
    return build_plan(model, hfc.RTNQuantConfig(**given))


def compressed(
    model: torch.nn.Module, plan: Plan, batches: Batches, seed: int = 0, **fields: Any
) -> dict[str, dict[str, Tensor]]:
    """The parts of every packed weight."""
    method = AutoRound(AutoRoundFields(**fields))
    finished = Pass(LiveSource(model), plan, method, batches, MemoryResults(), seed).run()
    return {name: packed.parts() for name, packed in finished.packed.items()}


def with_results(model: torch.nn.Module, plan: Plan, batches: Batches, **fields: Any) -> torch.nn.Module:
    """A copy of the model with the compressed weights' values."""
    method = AutoRound(AutoRoundFields(**fields))
    finished = Pass(LiveSource(model), plan, method, batches, MemoryResults()).run()
    made = copy.deepcopy(model)
    for row in plan.quantized:
        if row.name in finished.packed:
            made.get_parameter(row.key).data.copy_(finished.packed[row.name].dense())
    return made


def error(model: torch.nn.Module, other: torch.nn.Module, batches: Batches) -> float:
    """The mean squared difference of the outputs, at tokens that count."""
    total, count = 0.0, 0
    for batch in batches:
        difference = (output(other, batch) - output(model, batch)).double()
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        if mask is not None and mask.shape == difference.shape[:2] and "decoder_input_ids" not in batch:
            difference = difference[mask.bool()]
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return total / count


def fake_quantized(
    rounding: Rounding, offset: Tensor, low: Tensor, high: Tensor, symmetric: bool, bits: int
) -> tuple[Tensor, Tensor]:
    """ŵ in float64 by the definition, rounding as the identity in the backward pass; and the scale."""

    def rounded(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    limit = 2 ** (bits - 1)
    weight = rounding.weight.double()
    least, most = weight.amin(-1, keepdim=True).clamp_max(0), weight.amax(-1, keepdim=True).clamp_min(0)
    if symmetric:
        scale = torch.where(most > -least, most, least) * high / -limit
        zero = torch.zeros_like(scale)
    else:
        scale = (most * high - least * low) / (2 * limit - 1)
        zero = rounded(-least * low / scale) - limit
    codes = (rounded(weight / scale + offset) + zero).clamp(-limit, limit - 1)
    return (codes - zero) * scale, scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_definition(symmetric: bool, bits: int) -> None:
    args = weight_args(bits, 16, symmetric)
    rounding = Rounding(normal(12, 64) + 0.1, args, torch.float32)
    offset = (normal(*rounding.weight.shape, seed=1) * 0.2).clamp(-0.5, 0.5)
    low, high = 1 - normal(48, 1, seed=2).abs() * 0.1, 1 - normal(48, 1, seed=3).abs() * 0.1
    rounding.offset, rounding.range_low, rounding.range_high = offset.clone(), low.clone(), high.clone()
    grad = normal(*rounding.weight.shape, seed=4)
    leaves = [value.double().requires_grad_() for value in (offset, low, high)]
    made, scale = fake_quantized(rounding, *leaves, symmetric, bits)
    made.backward(grad.double())
    by_offset, by_low, by_high = rounding.gradients(slice(None), grad.clone())
    # float32 sums of 16 products; a weight within float32's rounding of a border between codes would be off by more,
    # and with these seeds there is none
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(by_offset.double() * scale.detach().abs(), leaves[0].grad, **tolerance)
    torch.testing.assert_close(by_high.double(), leaves[2].grad, **tolerance)
    assert (by_low is None) == symmetric
    if by_low is not None:
        torch.testing.assert_close(by_low.double(), leaves[1].grad, **tolerance)
    assert float((made.detach() - dequantized(rounding)).abs().max()) < 1e-5


def dequantized(rounding: Rounding) -> Tensor:
    """The result in float64, groups × values."""
    made = rounding.result()
    codes = made.codes.double().view(rounding.weight.shape)
    zeros = 0 if made.zero_point is None else made.zero_point.double().reshape(-1, 1)
    return (codes - zeros) * made.scale.double().reshape(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_leaf_is_the_result(bits: int, symmetric: bool, group_size: int | str, dtype: torch.dtype) -> None:
    args = weight_args(bits, group_size, symmetric)
    rounding = Rounding(normal(12, 64, dtype=dtype), args, torch.float32)
    for step in range(5):
        rounding.leaf.grad = normal(12, 64, seed=step)
        assert rounding.step(0.1)
        assert rounding.leaf.grad is None
    assert float(rounding.offset.abs().max()) <= 0.5
    assert LEAST <= float(rounding.range_high.min()) <= float(rounding.range_high.max()) <= 1
    assert float(rounding.offset.abs().max()) > 0.3
    made = rounding.result()
    assert (made.codes.dtype, made.codes.shape, made.scale.dtype) == (torch.int8, (12, 64), dtype)
    assert made.scale.shape == groups((12, 64), args)
    assert -(2 ** (bits - 1)) <= int(made.codes.min()) <= int(made.codes.max()) < 2 ** (bits - 1)
    # one float32 product of the same two values on both sides
    torch.testing.assert_close(
        rounding.leaf.detach().double().view(rounding.weight.shape), dequantized(rounding), rtol=2e-7, atol=0
    )


def test_a_fresh_grid_reaches_from_the_largest_weight_on_the_side_with_more_levels() -> None:
    weight = normal(12, 64)
    rounding = Rounding(weight, weight_args(4, 16, True), torch.float32)
    made = rounding.result()
    groups_of = weight.unflatten(-1, (4, 16))
    largest = groups_of.gather(-1, groups_of.abs().argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(made.scale, largest / -8, rtol=1e-6, atol=0)  # one float32 division
    steps = groups_of.double() / made.scale.double().unsqueeze(-1)
    error = (steps - made.codes.double().unflatten(-1, (4, 16))).abs()
    assert float(error[steps <= 7.5].max()) <= 0.5 + 1e-6  # float32's rounding of the steps
    assert {float(value) for value in made.scale.sign().unique()} == {-1.0, 1.0}


def test_groups_of_zeros_stay_zero() -> None:
    rounding = Rounding(torch.zeros(4, 32), weight_args(4, 16, True), torch.float32)
    rounding.leaf.grad = normal(4, 32)
    rounding.step(0.4)
    assert bool(torch.isfinite(rounding.leaf).all())
    assert float(rounding.leaf.detach().abs().max()) < 1e-30


def test_a_weight_without_gradient_does_not_move() -> None:
    rounding = Rounding(normal(4, 32), weight_args(4, 16, True), torch.float32)
    before = rounding.leaf.detach().clone()
    assert not rounding.step(0.4)
    assert torch.equal(rounding.leaf, before)


def test_results_of_another_method_can_be_shown() -> None:
    for symmetric in (True, False):
        args = weight_args(4, 16, symmetric)
        rounding = Rounding(normal(8, 32), args, torch.float32)
        made: Quantized = round_to_nearest(normal(8, 32), args)
        rounding.show(made)
        zeros = 0 if made.zero_point is None else made.zero_point.float().unsqueeze(-1)
        expected = (made.codes.float().unflatten(-1, (2, 16)) - zeros) * made.scale.unsqueeze(-1)
        assert torch.equal(rounding.leaf.detach(), expected.flatten(-2))


def test_no_iterations_round_to_nearest() -> None:
    model = tiny("llama")
    plan = plan_of(model)
    made = compressed(model, plan, batches_of(model, 2), iterations=0)
    assert len(made) == len(plan.quantized)
    for row in plan.quantized:
        expected = round_to_nearest(model.get_parameter(row.key).data, weight_args(3, 16, True))
        codes = unpack_codes(made[row.name]["packed"], 3, row.shape[-1])
        assert torch.equal(codes, expected.codes)
        assert torch.equal(made[row.name]["scale"], expected.scale)
    assert not AutoRound(AutoRoundFields(iterations=0)).reference
    assert AutoRound(AutoRoundFields(iterations=1)).reference


@pytest.mark.parametrize(
    "name", ["llama", "bert", "gpt2", "qwen3-moe", "mixtral", "t5", "bart", "vit", "whisper", "resnet"]
)
def test_learns(name: str) -> None:
    model = tiny(name)
    plan, batches = plan_of(model), batches_of(model)
    nearest = error(model, with_results(model, plan, batches, iterations=0), batches)
    learned = error(model, with_results(model, plan, batches, **LEARNS), batches)
    assert learned < 0.5 * nearest


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_learns_on_every_grid(symmetric: bool, bits: int) -> None:
    model = tiny("llama")
    plan, batches = plan_of(model, bits=bits, symmetric=symmetric), batches_of(model)
    nearest = error(model, with_results(model, plan, batches, iterations=0), batches)
    assert error(model, with_results(model, plan, batches, **LEARNS), batches) < 0.7 * nearest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_learns_in_16_bits(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype=dtype)
    plan, batches = plan_of(model), batches_of(model)
    nearest = error(model, with_results(model, plan, batches, iterations=0), batches)
    made = with_results(model, plan, batches, **LEARNS)
    assert {value.dtype for value in made.parameters()} == {dtype}
    assert error(model, made, batches) < 0.5 * nearest


def test_never_worse_than_to_nearest() -> None:
    # with one step of the largest rate every offset and range jumps to its limit, which is worse
    model = tiny("llama")
    plan, batches = plan_of(model, bits=8), batches_of(model, 2)
    made, nearest = (compressed(model, plan, batches, iterations=count) for count in (1, 0))
    assert made.keys() == nearest.keys()
    for name, parts in nearest.items():
        assert all(torch.equal(made[name][part], value) for part, value in parts.items())


def test_same_seed_same_bytes() -> None:
    model = tiny("llama")
    plan, batches = plan_of(model), batches_of(model)
    first, again, other = (compressed(model, plan, batches, seed, iterations=4) for seed in (3, 3, 4))
    assert all(torch.equal(first[name][part], value) for name in again for part, value in again[name].items())
    assert any(not torch.equal(first[name][part], value) for name in other for part, value in other[name].items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_padded_has_no_influence(side: str, attention: str) -> None:
    model = tiny("llama", attn_implementation=attention)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, -5:] = 0
    mask[3, -2:] = 0
    ids = torch.randint(5, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    if side == "left":
        mask, ids = mask.flip(1), ids.flip(1)
    noise = torch.randint(5, 128, (4, 12), generator=torch.Generator().manual_seed(1))
    made = [
        compressed(model, plan_of(model), [{"input_ids": batch, "attention_mask": mask}], **LEARNS)
        for batch in (ids, torch.where(mask.bool(), ids, noise))
    ]
    for name, parts in made[0].items():
        assert all(torch.equal(made[1][name][part], value) for part, value in parts.items())


def test_embeddings_round_to_nearest_beside_learned_weights() -> None:
    model = tiny("llama")
    plan, batches = plan_of(model, embeddings="int8"), batches_of(model, 2)
    made, nearest = compressed(model, plan, batches, **LEARNS), compressed(model, plan, batches, iterations=0)
    name = "model.embed_tokens"
    assert all(torch.equal(made[name][part], value) for part, value in nearest[name].items())
    learned = [row.name for row in plan.quantized if row.name != name]
    assert all(not torch.equal(made[each]["packed"], nearest[each]["packed"]) for each in learned)


def test_a_model_without_a_stack_is_one_block() -> None:
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=index))
    plan, data = plan_of(model, format="auto"), [normal(16, 16, seed=seed) for seed in range(4)]
    before = copy.deepcopy(model.state_dict())

    def loss(**fields: Any) -> float:
        method = AutoRound(AutoRoundFields(**fields))
        parts = Pass(LiveSource(model), plan, method, [{"input": value} for value in data], MemoryResults()).run()
        made = copy.deepcopy(model)
        for row in plan.quantized:
            made.get_parameter(row.key).data.copy_(dequantize(parts.packed[row.name]))
        return sum(float((made(value) - model(value)).square().sum().detach()) for value in data)

    assert loss(iterations=30) < 0.7 * loss(iterations=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_is_advanced_by_what_it_became() -> None:
    model = tiny("llama")
    plan, batches = plan_of(model, bits=8), batches_of(model, 2)
    seen: list[Block] = []

    class Watched(AutoRound):
        def compress(self, block: Block) -> None:
            given = [call.hidden for call in block.calls]
            super().compress(block)
            assert block.advanced
            for call, hidden in zip(block.calls, given, strict=True):
                # beyond 4 bits everything is float32, so both run the same operations
                torch.testing.assert_close(call.hidden, call.run(block.module, hidden), rtol=1e-5, atol=1e-5)
            seen.append(block)

    Pass(LiveSource(model), plan, Watched(AutoRoundFields(iterations=2)), batches, MemoryResults()).run()
    assert len(seen) == 2


class Parts(torch.nn.Module):
    """One layer that is called, one whose output goes nowhere, one that only lends its weight, and one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.pooled, self.lent, self.unused = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.nn.functional.linear(self.called(value).tanh(), self.lent.weight)
        return made, self.pooled(made)


def test_weights_that_no_data_reaches_are_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        model = Parts().eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=index))
    plan, data = plan_of(model, format="auto"), [{"value": normal(16, 16, seed=seed)} for seed in range(4)]
    names = {row.name for row in plan.quantized}
    assert names == {"called", "pooled", "lent", "unused"}
    with pytest.raises(CalibrationError, match=r"never reaches unused \(1 weights\).*skip=\[\"unused\"\]"):
        compressed(model, plan, data, iterations=2)  # type: ignore[arg-type]
    assert set(compressed(model, plan, data, iterations=0)) == names  # type: ignore[arg-type]
    rest = plan_of(model, format="auto", skip=["unused"])
    assert set(compressed(model, rest, data, iterations=2)) == names - {"unused"}  # type: ignore[arg-type]


def test_a_block_without_calls_is_refused() -> None:
    model = tiny("llama")
    block = Block(0, "", model, tuple(plan_of(model).quantized), [])
    with pytest.raises(CalibrationError, match="never reaches"):
        AutoRound(AutoRoundFields()).compress(block)


def test_experts_without_tokens_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("qwen3-moe")
    plan = plan_of(model)
    few = [{"input_ids": torch.tensor([[5, 6]])}]  # of two tokens, each goes to two of eight experts
    with caplog.at_level(logging.WARNING, "hf_compress"):
        compressed(model, plan, few, iterations=2)
    for layer in range(2):
        message = rf"No token reaches experts [\d, ]+ of model\.layers\.{layer}\.mlp\.experts\.gate_up_proj"
        (found,) = re.findall(message, caplog.text)
        assert 4 <= len(re.findall(r"(?<=[ ,])\d", found)) < 8
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_compress"):
        compressed(model, plan, batches_of(model, 8), iterations=8)
    assert "No token" not in caplog.text


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny("llama")
    row = plan_of(model).quantized[0]
    block = Block(0, "", model, (row,), [])
    model.get_parameter(row.key).data[0, 0] = torch.nan
    with pytest.raises(WeightValueError, match=row.name):
        AutoRound(AutoRoundFields()).compress(block)


def test_presets_and_overrides() -> None:
    assert [AutoRoundFields(preset=name).steps for name in ("fast", "balanced", "best")] == list(ITERATIONS.values())
    assert AutoRoundFields(preset="best", iterations=7).steps == 7
    assert AutoRoundFields(iterations=0).steps == 0
    config = hfc.AutoRoundQuantConfig(bits=3, preset="balanced")
    assert (config.bits, config.preset, config.to_diff_dict()["method"]) == (3, "balanced", "autoround")
    for wrong in ({"preset": "slow"}, {"iterations": -1}, {"iterations": True}, {"batch_rows": 0}, {"lr": 0.1}):
        with pytest.raises(ConfigError):
            hfc.AutoRoundQuantConfig(**wrong)


def test_it_is_registered_with_its_compressor() -> None:
    method = METHODS.get("autoround")
    assert method.needs_data
    assert method.compressor is compressor
    assert isinstance(compressor(AutoRoundFields()), AutoRound)
    with pytest.raises(ConfigError, match="RTNFields"):
        compressor(hfc.RTNQuantConfig().fields)
