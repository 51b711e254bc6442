"""Fake quantization in models: equal to packing without training, invisible to whatever looks at parameters."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer

import hf_compress as hfc
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.observers import MovingAverage
from hf_compress.checkpoint.handover import training_plan_of
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import CalibrationError, ConfigError, UnsupportedModelError, WeightValueError
from hf_compress.methods.rtn import RTNFields
from hf_compress.modules.kernels.choose import reference_kernels
from hf_compress.modules.packed import Layout, dequantize, pack
from hf_compress.training.qat import QATConfig
from hf_compress.training.qat.modules import (
    FakeQuantized,
    commit_ranges,
    fake_modules,
    insert_fake_quant,
    quantized,
    remove_fake_quant,
    set_phase,
)
from tests._utils.tiny import output, tiny, tiny_inputs

W4: dict[str, Any] = {"bits": 4, "group_size": 32}
W3_ASYMMETRIC: dict[str, Any] = {"bits": 3, "group_size": "channel", "symmetric": False, "format": "guarded"}
STATIC: dict[str, Any] = {"activation_bits": 8, "activation_strategy": "tensor"}


def prepared(model: Any, **fields: Any) -> Any:
    config = QATConfig(**fields)
    insert_fake_quant(model, plan_model(model, config), config.fields)
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make().eval()


def linear(**fields: Any) -> Any:
    return prepared(build(lambda: nn.Linear(64, 8)), **fields)


def packed_output(model: Any, config: QuantConfig, inputs: dict[str, Tensor]) -> Tensor:
    hfc.quantize(model, config)
    with reference_kernels(model):
        return output(model, inputs)


def without_dropout(family: str) -> PreTrainedModel:
    model = tiny(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


FAMILIES = ["bert-classifier", "llama", "gpt2", "qwen3-moe", "mixtral", "t5", "vit", "resnet"]


@pytest.mark.parametrize("fields", [W4, W3_ASYMMETRIC], ids=["int4", "int3 asymmetric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_rounding_to_nearest(family: str, fields: dict[str, Any]) -> None:
    model = prepared(tiny(family), **fields)
    inputs = tiny_inputs(model)
    expected = packed_output(tiny(family), hfc.RTNQuantConfig(**fields), inputs)
    assert torch.equal(output(model, inputs), expected)
    assert not torch.equal(output(tiny(family), inputs), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_in_bfloat16(family: str) -> None:
    model = prepared(tiny(family, dtype=torch.bfloat16), **W4)
    inputs = tiny_inputs(model)
    expected = packed_output(tiny(family, dtype=torch.bfloat16), hfc.RTNQuantConfig(**W4), inputs)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("family", ["bert-classifier", "llama", "gpt2", "resnet"])
def test_outputs_are_those_of_dynamic_int8(family: str) -> None:
    model = prepared(tiny(family), activation_bits=8)
    inputs = tiny_inputs(model)
    expected = packed_output(tiny(family), hfc.Int8DynamicQuantConfig(), inputs)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_are_those_of_static_int8(family: str, symmetric: bool) -> None:
    """One step in floating point shows the ranges that calibration with the same batch would see."""
    model = prepared(without_dropout(family), **STATIC, symmetric_inputs=symmetric)
    inputs = {"input_ids": torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(1))}
    set_phase(model, quantize=False, observe=True)
    output(model.train(), inputs)
    commit_ranges(model)
    set_phase(model.eval(), quantize=True, observe=False)
    config = hfc.Int8StaticQuantConfig(
        observer="minmax",
        symmetric_inputs=symmetric,
        calibration=hfc.Calibration([inputs], min_rows=1, min_tokens=1),
    )
    expected = packed_output(tiny(family), config, inputs)
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("fields", [W4, {"embeddings": "int8", **W4}, {**W4, "learn_scales": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3-moe", "resnet"])
def test_what_others_see_of_a_model(family: str, fields: dict[str, Any]) -> None:
    """Parameters are the same objects under the same names, and what is new is called `hfc_*`."""
    model = tiny(family)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    prepared(model, **fields)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in parameters.items())
    extra = set(model.state_dict()) - set(keys)
    assert all(name.rpartition(".")[2].startswith("hfc_") for name in {*extra, *after} - set(keys))
    assert bool(extra) == ("learn_scales" in fields)
    swapped = dict(fake_modules(model))
    assert swapped
    for path, module in swapped.items():
        assert isinstance(module, classes[path])
        assert type(module).__name__ == classes[path].__name__
        for name in module.hfc_layouts:
            assert getattr(module, name) is module.get_parameter(name)

    plan = remove_fake_quant(model)
    assert plan.method == "qat"
    assert training_plan_of(model) is None
    assert list(model.state_dict()) == keys
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("hfc_")]
    assert torch.equal(output(model, tiny_inputs(model)), output(tiny(family), tiny_inputs(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe", "resnet"])
def test_gradients_are_those_at_the_rounded_weights(family: str) -> None:
    """Straight through: of a dense model with the dequantized weights, for the same loss.

    GPT-2's weights have another memory layout there, so sums have another order: 1e-5 of the largest value.
    """
    model, dense = prepared(tiny(family), **W4), tiny(family)
    inputs = tiny_inputs(model)
    for path, module in fake_modules(model):
        for name, layout in module.hfc_layouts.items():
            made = pack(quantized(module, name), layout).dense()
            dense.get_submodule(path).get_parameter(name).data.copy_(made)
    for one in (model, dense):
        one(**inputs).logits.square().mean().backward()
    expected = {name: value.grad for name, value in dense.named_parameters()}
    for name, value in model.named_parameters():
        assert (value.grad is None) == (expected[name] is None), name
        if value.grad is not None:
            assert float((value.grad - expected[name]).abs().max()) <= 1e-5 * float(expected[name].abs().max()), name


@pytest.mark.parametrize("learn_scales", [False, True])
def test_training_finds_weights_that_round_well(learn_scales: bool) -> None:
    """Inputs of eight directions leave 64 weights the room to make up for each other's rounding to 2 bits."""
    value, solution = random(256, 8) @ random(8, 64, seed=2), random(8, 64, seed=1)
    module = build(lambda: nn.Linear(64, 8))
    module.weight.data.copy_(solution)
    target = module(value).detach()
    prepared(module, bits=2, group_size=32, learn_scales=learn_scales)
    before = module.weight
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = functional.mse_loss(module(value), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert module.weight is before
    assert not torch.equal(module.weight, solution)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_parameters_outside_of_the_own_forward() -> None:
    """Also after an error in it."""
    module = linear(**W4)
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    module(random(2, 64))
    with pytest.raises(RuntimeError):
        module(random(2, 63))
    assert all(value is module.get_parameter("weight") for value in (*seen, module.weight))
    module.weight = nn.Parameter(torch.zeros(8, 64))
    assert float(module(random(2, 64)).sub(module.bias).abs().max()) == 0.0


def test_phases() -> None:
    model = prepared(tiny("llama"), **W4, start=5)
    inputs = tiny_inputs(model)
    dense = output(tiny("llama"), inputs)
    assert torch.equal(output(model, inputs), dense)
    set_phase(model, quantize=True, observe=True)
    rounded = output(model, inputs)
    assert not torch.equal(rounded, dense)
    set_phase(model, quantize=False, observe=True)
    assert torch.equal(output(model, inputs), dense)
    assert torch.equal(output(prepared(tiny("llama"), **W4), inputs), rounded)


CONVOLUTIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv1d(6, 8, 3, padding=1),
    lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=(1, 0)),
    lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False, padding=1, padding_mode="circular"),
    lambda: nn.Conv2d(6, 12, 3, groups=6),
]


@pytest.mark.parametrize("make", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("fields", "config"),
    [({"bits": 4}, hfc.RTNQuantConfig(bits=4)), ({"activation_bits": 8}, hfc.Int8DynamicQuantConfig())],
    ids=["int4", "dynamic"],
)
@torch.no_grad()
def test_convolutions(fields: dict[str, Any], config: QuantConfig, make: Callable[[], nn.Module]) -> None:
    value = random(2, 6, 9) if isinstance(build(make), nn.Conv1d) else random(2, 6, 7, 8)
    expected = hfc.quantize(build(make), config)
    with reference_kernels(expected):
        assert torch.equal(prepared(build(make), **fields)(value), expected(value))


def test_convolution_with_fixed_range_and_batch_normalisation() -> None:
    """Batch normalisation stays as it is; the range is that of the convolution's input."""
    model = prepared(build(lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())), **STATIC)
    value = random(2, 6, 7, 8)
    assert [path for path, _ in fake_modules(model)] == ["0"]
    assert type(model[1]) is nn.BatchNorm2d
    model.train()(value)
    commit_ranges(model)
    assert model[0].hfc_input_low.item() == value.min().item()
    assert model[0].hfc_input_high.item() == value.max().item()
    made = quantized(model[0], "weight")
    assert made.input_scale is not None
    assert made.input_zero_point is not None
    assert made.input_scale.item() == pytest.approx((value.max() - value.min()).item() / 255, rel=1e-6)


RECURRENT: list[Callable[[], nn.Module]] = [
    lambda: nn.LSTM(16, 32, num_layers=2, bidirectional=True, proj_size=16),
    lambda: nn.GRU(16, 32, batch_first=True, bias=False),
    lambda: nn.RNN(16, 32),
]


@pytest.mark.parametrize("make", RECURRENT)
@pytest.mark.parametrize("fields", [{"bits": 4, "group_size": 16}, STATIC], ids=["int4", "static"])
def test_recurrent_layers(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    """Their own forward on rounded weights; with quantized inputs asked for they stay weight-only."""
    value = random(5, 2, 16)
    rtn = {"bits": 8, "group_size": "channel"} if fields is STATIC else fields
    module, expected = prepared(build(make), **fields), hfc.quantize(build(make), hfc.RTNQuantConfig(**rtn))
    with torch.no_grad():
        assert torch.equal(module(value)[0], expected(value)[0])
        sequence = pack_sequence([random(5, 16), random(3, 16, seed=1)])
        assert torch.equal(module(sequence)[0].data, expected(sequence)[0].data)
    module(value)[0].square().sum().backward()
    weights = {name: one for name, one in module.named_parameters() if one.ndim == 2}
    assert set(module.hfc_layouts) == set(weights)
    assert all(one.grad is not None and bool(one.grad.any()) for one in weights.values())

    copied = copy.deepcopy(module)
    with torch.no_grad():
        for one in copied.parameters():
            one.mul_(2)
        assert torch.equal(module(value)[0], expected(value)[0])
        assert not torch.equal(copied(value)[0], expected(value)[0])
    moved = module.double()
    assert moved(value.double())[0].dtype == torch.float64
    remove_fake_quant(module)
    assert type(module) is type(build(make))
    named = [module.get_parameter(name) for name in module._flat_weights_names]
    assert all(one is other for one, other in zip(module._flat_weights, named, strict=True))


def test_recurrent_cells() -> None:
    module = prepared(build(lambda: nn.LSTMCell(16, 32)), bits=4, group_size=16)
    expected = hfc.quantize(build(lambda: nn.LSTMCell(16, 32)), hfc.RTNQuantConfig(bits=4, group_size=16))
    with torch.no_grad():
        assert torch.equal(module(random(2, 16))[0], expected(random(2, 16))[0])


def test_embedding_tables() -> None:
    """Rows are rounded as they are looked up; the padding row gets no gradient, others that of a plain table."""
    ids = torch.tensor([[0, 3, 3, 7]])
    plain = build(lambda: nn.Embedding(11, 8, padding_idx=0))
    expected = hfc.quantize(copy.deepcopy(plain), hfc.RTNQuantConfig(embeddings="int8"))
    module = prepared(copy.deepcopy(plain), embeddings="int8")
    assert torch.equal(module(ids), expected(ids))
    assert module(ids[:, :0]).shape == (1, 0, 8)
    weights = random(1, 4, 8)
    for one in (module, plain):
        (one(ids) * weights).sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)
    assert not module.weight.grad[0].any()


class Scaled(nn.Embedding):
    """A table whose rows are scaled after they were looked up, as in BART."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.7


def test_tables_with_a_forward_of_their_own() -> None:
    ids = torch.tensor([[0, 3, 3, 7]])
    module = prepared(build(lambda: Scaled(11, 8)), embeddings="int8")
    expected = hfc.quantize(build(lambda: Scaled(11, 8)), hfc.RTNQuantConfig(embeddings="int8"))
    assert torch.equal(module(ids), expected(ids))
    module(ids).sum().backward()
    assert bool((module.weight.grad[3] == 2 * module.weight.grad[7]).all())


@pytest.mark.parametrize("learn_scales", [False, True])
def test_tied_weights(learn_scales: bool) -> None:
    """The table and the head round one parameter in the same way, and no scale of it is learned."""
    fields: dict[str, Any] = {**W4, "embeddings": "int8"}
    model = prepared(tiny("llama-tied"), **fields, learn_scales=learn_scales)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {path for path, module in fake_modules(model) if module.hfc_learned}
    assert bool(names) == learn_scales
    assert not names & {"lm_head", "model.embed_tokens"}
    inputs = tiny_inputs(model)
    assert torch.equal(output(model, inputs), packed_output(tiny("llama-tied"), hfc.RTNQuantConfig(**fields), inputs))
    codes = [quantized(module, "weight").codes for module in (model.lm_head, model.model.embed_tokens)]
    assert torch.equal(*codes)


def test_copies_are_independent() -> None:
    model = prepared(tiny("llama"), **W4, learn_scales=True)
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, inputs), before)
    assert training_plan_of(copied) == training_plan_of(model)
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(0.1)
    set_phase(copied, quantize=False, observe=False)
    remove_fake_quant(copied)
    assert torch.equal(output(model, inputs), before)


def test_moving_to_another_type() -> None:
    """What belongs to fake quantization stays float32; the values are those of a model that was so from the start."""
    model = prepared(tiny("llama"), **STATIC, learn_scales=True).to(torch.bfloat16)
    extra = {name: value for name, value in model.state_dict().items() if ".hfc_" in name}
    assert extra
    assert {value.dtype for value in extra.values()} == {torch.float32}
    assert all(module.hfc_seen.dtype == torch.float32 for _, module in fake_modules(model))
    assert model.dtype == torch.bfloat16
    inputs = tiny_inputs(model)
    whole = prepared(tiny("llama", dtype=torch.bfloat16), **W4)
    assert torch.equal(output(prepared(tiny("llama"), **W4).to(torch.bfloat16), inputs), output(whole, inputs))


# ---------------------------------------------------------------------------------------------------- fixed ranges


def shown(module: Any, *values: Tensor) -> list[float]:
    """The range after one optimizer step with these batches."""
    for value in values:
        module(value)
    commit_ranges(module)
    return [module.hfc_input_low.item(), module.hfc_input_high.item()]


def test_ranges_are_a_moving_average_over_steps() -> None:
    """That of `MovingAverage`; all batches of a step are one. Float32 against Python floats: 1e-6."""
    module, twin, observer = linear(**STATIC).train(), linear(**STATIC).train(), MovingAverage()
    assert math.isnan(module.hfc_input_low)
    for seed in range(5):
        value = random(8, 64, seed=seed) * (1 + seed)
        observer.update(value)
        assert shown(module, value) == pytest.approx(observer.range(), rel=1e-6)
        assert shown(twin, *value.split(3)) == shown_again(module)


def shown_again(module: Any) -> list[float]:
    return [module.hfc_input_low.item(), module.hfc_input_high.item()]


def test_ranges_hold_from_the_step_after() -> None:
    """Within a step nothing changes, so a layer that is run again, or a second batch, meets the same grid."""
    module, value = linear(**STATIC).train(), random(4, 64)
    weights_alone = linear(bits=8, group_size="channel")
    assert torch.equal(module(value), weights_alone(value))
    assert torch.equal(module(value), weights_alone(value))
    commit_ranges(module)
    first = module(value)
    assert not torch.equal(first, weights_alone(value))
    module(100 * value)
    assert torch.equal(module(value), first)
    commit_ranges(module)
    assert not torch.equal(module(value), first)


def test_ranges_move_in_training_alone() -> None:
    module = linear(**STATIC).train()
    before = shown(module, random(4, 64))
    assert shown(module.eval(), 9 * random(4, 64)) == before
    set_phase(module.train(), quantize=True, observe=False)
    assert shown(module, 9 * random(4, 64)) == before
    set_phase(module, quantize=True, observe=True)
    assert shown(module, 9 * random(4, 64)) != before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ranges_leave_out_what_is_not_finite(bad: float) -> None:
    module, broken = linear(**STATIC).train(), random(4, 64)
    before = shown(module, random(4, 64))
    broken[0, 0] = bad
    assert shown(module, broken) == before
    assert (shown(module, broken, 9 * random(4, 64)) == before) == math.isinf(bad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """A layer that is run twice sees no batch twice, and gradients are those without."""
    value = random(4, 64).requires_grad_()
    found = []
    for again in (False, True):
        module = nn.Sequential(linear(**STATIC), nn.GELU(), build(lambda: nn.Linear(8, 8))).train()
        for step in range(3):
            given = value * (1 + step)
            made = checkpoint(module, given, use_reentrant=reentrant) if again else module(given)
            made.square().sum().backward()
            commit_ranges(module)
        found.append([shown_again(module[0]), [one.grad for one in module.parameters()]])
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


def _one_of_two(rank: int, folder: str) -> None:
    """A process that sees its half of a batch, then another one that only the first process has."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    module = linear(**STATIC).train()
    ranges = [shown(module, random(8, 64).chunk(2)[rank])]
    ranges.append(shown(module, *([3 * random(4, 64)] if rank == 0 else [])))
    torch.save(torch.tensor(ranges, dtype=torch.float64), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_their_ranges(tmp_path: Path) -> None:
    """Two processes with half of a batch each are as one with all of it, also where one has nothing to show."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    alone = linear(**STATIC).train()
    expected = torch.tensor([shown(alone, random(8, 64)), shown(alone, 3 * random(4, 64))], dtype=torch.float64)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)


# -------------------------------------------------------------------------------------------------- learned scales


def test_learned_scales_are_parameters_that_do_not_decay() -> None:
    model = prepared(tiny("qwen3-moe"), **W4, learn_scales=True)
    new = {name for name, _ in model.named_parameters() if ".hfc_" in name}
    assert "model.layers.0.self_attn.q_proj.hfc_scale_bias" in new
    assert "model.layers.0.mlp.experts.hfc_gate_up_proj_scale_bias" in new
    assert not new & set(Trainer.get_decay_parameter_names(None, model))
    assert model.model.layers[0].self_attn.q_proj.hfc_scale.dtype == torch.float32


@pytest.mark.parametrize("fields", [W4, W3_ASYMMETRIC], ids=["int4", "int3 asymmetric"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 8), RECURRENT[1], CONVOLUTIONS[1]])
def test_learned_scales_train(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    """They start as those of rounding to nearest, move, and what would be packed is what was computed with."""
    fields = {**fields, "group_size": "channel"}
    value = random(2, 6, 7, 8) if isinstance(build(make), nn.Conv2d) else random(4, 5, 64)[..., : width(make)]
    module = prepared(build(make), **fields, learn_scales=True)
    start = prepared(build(make), **fields)
    assert torch.equal(first(module(value)), first(start(value)))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        first(module(value)).square().sum().backward()
        optimizer.step()
    learned = {name: one for name, one in module.named_parameters() if "hfc_" in name}
    assert set(module.hfc_learned) == set(module.hfc_layouts)
    assert all(bool(one.any()) for one in learned.values())
    with torch.no_grad():
        trained = first(module(value))
        made = {name: dequantized(module, name, layout) for name, layout in module.hfc_layouts.items()}
        remove_fake_quant(module)
        for name, values in made.items():
            module.get_parameter(name).copy_(values)
        assert torch.equal(first(module(value)), trained)


def width(make: Callable[[], nn.Module]) -> int:
    module = build(make)
    return module.in_features if isinstance(module, nn.Linear) else 16


def first(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def dequantized(module: nn.Module, name: str, layout: Layout) -> Tensor:
    return layout.oriented(dequantize(pack(quantized(module, name), layout)))


def test_gradient_of_the_logarithm_of_a_scale() -> None:
    """scale = start · exp(bias): doubling the start and taking its logarithm off again changes nothing."""
    module, value = linear(**W4, learn_scales=True), random(4, 64)
    module(value).square().sum().backward()
    before = module.hfc_scale_bias.grad.clone()
    with torch.no_grad():
        module.hfc_scale.mul_(2)
        module.hfc_scale_bias.fill_(-math.log(2))
        module.hfc_scale_bias.grad = None
    module(value).square().sum().backward()
    # exp(-ln 2) is 0.5 within float32's 6e-8, which can move a code at a tie: none of these 512 values is one.
    assert torch.allclose(module.hfc_scale_bias.grad, before, rtol=1e-4, atol=1e-5)
    assert bool(before.any())


def test_learned_scales_start_where_fake_quantization_does() -> None:
    module = linear(**W4, learn_scales=True, start=0.5)
    with torch.no_grad():
        module.weight.mul_(3)
    set_phase(module, quantize=True, observe=True)
    other = linear(**W4)
    with torch.no_grad():
        other.weight.mul_(3)
        assert torch.equal(module(random(2, 64)), other(random(2, 64)))
        module.hfc_scale_bias.fill_(0.1)
    kept = module.hfc_scale.clone()
    set_phase(module, quantize=False, observe=True)
    with torch.no_grad():
        module.weight.mul_(3)
    set_phase(module, quantize=True, observe=True)  # as after a checkpoint: what was trained stays
    assert torch.equal(module.hfc_scale, kept)


# --------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    "fields",
    [W4, W3_ASYMMETRIC, {**W4, "learn_scales": True}, {"activation_bits": 8}, STATIC],
    ids=["int4", "int3 asymmetric", "learned", "dynamic", "static"],
)
def test_compiled_without_graph_breaks(fields: dict[str, Any]) -> None:
    """Values, gradients and ranges are those without; the compiler may fuse, which rounds float32 differently."""
    eager, module = linear(**fields).train(), linear(**fields).train()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(2):
        value = random(3, 5, 64, seed=step)
        for one in (eager, compiled):
            one(value).square().sum().backward()
        for one in (eager, module):
            commit_ranges(one)
    assert torch.allclose(eager(value), compiled(value), rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(eager.named_parameters(), module.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-4), name
    if fields is STATIC:
        assert shown_again(eager) == shown_again(module)
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------------- refusals


def unchanged(model: nn.Module) -> bool:
    return not list(fake_modules(model)) and training_plan_of(model) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = bad
    with pytest.raises(WeightValueError, match=r"layers\.1\.mlp\.down_proj holds"):
        prepared(model, **W4)
    assert unchanged(model)


def test_models_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(64, 8)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        prepared(model, **W4)
    assert unchanged(model)


def test_modules_whose_forward_was_replaced() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    model[1].forward = model[1].forward
    with pytest.raises(UnsupportedModelError, match="1 has a forward of its own"):
        prepared(model, **W4)
    assert unchanged(model)


def test_fields_of_another_method() -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="RTNFields"):
        insert_fake_quant(model, plan_model(model, QATConfig(**W4)), RTNFields())
    assert unchanged(model)


def test_models_without_fake_quantization() -> None:
    with pytest.raises(UnsupportedModelError, match="has no fake quantization"):
        remove_fake_quant(tiny("llama"))
    with pytest.raises(UnsupportedModelError, match="is not fake-quantized"):
        quantized(build(lambda: nn.Linear(4, 4)), "weight")
    with pytest.raises(UnsupportedModelError, match="bias of Linear is not fake-quantized"):
        quantized(linear(**W4), "bias")


def test_ranges_that_nothing_has_shown() -> None:
    with pytest.raises(CalibrationError, match="is not known"):
        quantized(linear(**STATIC), "weight")


def test_calls_without_a_tensor_give_the_error_of_the_original() -> None:
    module, original = linear(activation_bits=8), build(lambda: nn.Linear(64, 8))
    for args in ((), (None,), (torch.tensor(1.0),)):
        with pytest.raises((TypeError, RuntimeError)) as expected:
            original(*args)
        with pytest.raises(type(expected.value)):
            module(*args)
    assert torch.equal(module(input=random(2, 64)), module(random(2, 64)))
    assert module(random(0, 64)).shape == (0, 8)
    assert isinstance(module, FakeQuantized)
