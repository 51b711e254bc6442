from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.core.errors import CalibrationError, ConfigError, TiedWeightsError, UnsupportedModelError
from hf_compress.methods.smoothquant import smooth_block, smooth_model
from hf_compress.methods.smoothquant.method import scales_of
from tests._utils.blocks import block_of
from tests._utils.tiny import output, tiny, tiny_inputs

FAMILIES = {
    "llama": 8,
    "gemma": 8,
    "bert": 2,
    "gpt2": 6,
    "opt": 8,
    "t5": 20,
    "bart": 6,
    "vit": 6,
    "qwen3-moe": 4,
    "albert": 1,
    "phi": 4,
    "switch": 22,
}
"""Number of groups that reach a linear layer."""


def data(model: PreTrainedModel) -> hfc.Calibration:
    return hfc.Calibration([dict(tiny_inputs(model, seed)) for seed in (1, 2)], min_rows=1, min_tokens=1)


def with_outliers(model: PreTrainedModel, factor: float = 40.0) -> PreTrainedModel:
    """Some channels of every norm are large, and what reads them is as much smaller: the function is as before."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[::13] *= factor
            for reader in readers:
                reader.weight.data[:, ::13] /= factor
    return model


def error(model: PreTrainedModel, base: Tensor, inputs: dict[str, Tensor]) -> float:
    return float((output(model, inputs) - base)[inputs["attention_mask"].bool()].square().mean().sqrt())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_of_a_family_stays(name: str) -> None:
    model = tiny(name)
    inputs = tiny_inputs(model)
    before, weights = output(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    assert hfc.smooth(model, data(model), strength=0.7) is model
    # Every weight and activation is rounded anew in float32, a dozen layers deep.
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-4, atol=2e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    assert any(key.endswith("weight") for key in changed)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in weights.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_all_groups_of_all_blocks_are_used(name: str) -> None:
    model = tiny(name)
    plan = plan_model(model, hfc.Int8DynamicQuantConfig(min_coverage=0.0, format="guarded"))
    groups = smooth_model(model, plan.quantized, [tiny_inputs(model)], 0.5)
    assert len(groups) == FAMILIES[name]


def test_ties_that_int8_could_not_keep_are_no_obstacle() -> None:
    """A layer that shares its weight with the head, which stays dense: quantizing it would be refused."""
    model = tiny("llama")
    gate = model.model.layers[0].mlp.gate_proj
    model.lm_head.weight = gate.weight
    inputs = tiny_inputs(model)
    before, shared = output(model, inputs), gate.weight.clone()
    with pytest.raises(TiedWeightsError):
        plan_model(model, hfc.Int8DynamicQuantConfig())
    hfc.smooth(model, data(model))
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-4, atol=2e-5)
    assert torch.equal(gate.weight, shared)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_keeps_the_function_up_to_its_rounding(name: str) -> None:
    model = tiny(name, dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    before = output(model, inputs).float()
    hfc.smooth(model, data(model))
    # bfloat16 rounds to 2^-9; so do the float model's own activations in each of a dozen products.
    assert float((output(model, inputs).float() - before).abs().max()) < 2**-5 * float(before.abs().max())


def test_scales_follow_the_equation() -> None:
    block = block_of(tiny("llama"), "model.layers.0")
    call = block.calls[0]
    seen: list[Tensor] = []
    names = ("q_proj", "k_proj", "v_proj")
    attention = block.module.get_submodule("self_attn")
    handle = attention.get_submodule("q_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        call.run(block.module)
    handle.remove()
    inputs = call.tokens(seen[0]).double().abs().amax(0)
    weights = torch.cat([attention.get_submodule(name).weight for name in names]).double().abs().amax(0)  # type: ignore[arg-type]
    before = block.module.get_parameter("input_layernorm.weight").detach().clone()
    groups = smooth_block(block, 0.3)
    assert groups[0].producer.name == "input_layernorm.weight"
    expected = inputs**0.3 / weights**0.7
    after = block.module.get_parameter("input_layernorm.weight").detach()
    torch.testing.assert_close((before / after).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(block.finished.changed["model.layers.0.input_layernorm.weight"], after)


def test_padding_does_not_count() -> None:
    model, results = tiny("llama"), []
    for fill in (3, 90):
        inputs = tiny_inputs(model)
        inputs["input_ids"][1, -3:] = fill
        made = tiny("llama")
        plan = plan_model(made, hfc.Int8DynamicQuantConfig(min_coverage=0.0))
        smooth_model(made, plan.quantized, [inputs], 0.5)
        results.append(made.model.layers[1].input_layernorm.weight)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_strength_moves_the_range_from_inputs_to_weights() -> None:
    inputs, weights = torch.tensor([8.0, 2.0, 0.0, 1.0]), torch.tensor([2.0, 2.0, 1.0, 0.0])
    assert torch.equal(scales_of(inputs, weights, 1.0)[:2], inputs[:2])
    assert torch.equal(scales_of(inputs, weights, 0.0)[:2], 1 / weights[:2])
    assert torch.equal(scales_of(inputs, weights, 0.5), torch.tensor([2.0, 1.0, 1.0, 1.0]))


def test_eight_bits_lose_less_where_activations_have_outliers() -> None:
    base = tiny("llama")
    inputs = tiny_inputs(base)
    expected = output(base, inputs)
    planted = with_outliers(tiny("llama"))
    torch.testing.assert_close(output(planted, inputs), expected, rtol=1e-4, atol=1e-5)
    plain = hfc.quantize(with_outliers(tiny("llama")), hfc.Int8DynamicQuantConfig())
    smooth = hfc.quantize(hfc.smooth(planted, data(base)), hfc.Int8DynamicQuantConfig())
    assert error(smooth, expected, inputs) < 0.5 * error(plain, expected, inputs)


def test_static_int8_loses_less_too() -> None:
    base = tiny("llama")
    inputs = tiny_inputs(base)
    expected = output(base, inputs)
    errors = [
        error(
            hfc.quantize(with_outliers(tiny("llama")), hfc.Int8StaticQuantConfig(smoothing=smoothing), data(base)),
            expected,
            inputs,
        )
        for smoothing in (None, 0.5)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_training_mode_is_kept() -> None:
    model = tiny("bert").train()
    hfc.smooth(model, data(model))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("strength", [-0.1, 1.5, "half", True])
def test_impossible_strengths_are_refused(strength: object) -> None:
    with pytest.raises(ConfigError, match="strength"):
        hfc.smooth(tiny("llama"), strength=strength)  # type: ignore[arg-type]


def test_only_live_models() -> None:
    with pytest.raises(UnsupportedModelError, match="str"):
        hfc.smooth("some/model")  # type: ignore[arg-type]


def test_bad_activations_are_named() -> None:
    block = block_of(tiny("llama"), "model.layers.0")
    assert block.calls[0].hidden is not None
    block.calls[0].hidden[1, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"mlp|self_attn"):
        smooth_block(block, 0.5)


def test_arguments_that_are_not_of_rows_are_no_obstacle() -> None:
    model = tiny("llama")
    inputs = {**tiny_inputs(model), "logits_to_keep": torch.tensor(1)}
    plan = plan_model(model, hfc.Int8DynamicQuantConfig(min_coverage=0.0))
    assert len(smooth_model(model, plan.quantized, [inputs], 0.5)) == FAMILIES["llama"]
