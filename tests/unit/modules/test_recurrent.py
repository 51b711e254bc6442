"""Recurrent layers: packed weights behind PyTorch's own forward, and the step-by-step one with quantized inputs."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hf_compress.core.errors import PackedWeightError
from hf_compress.methods.int8_dynamic import Int8DynamicQuantConfig
from hf_compress.methods.rtn import RTNQuantConfig
from hf_compress.modules.kernels.choose import kernel_counts, reference_kernels
from hf_compress.modules.kernels.int_mm import _exact
from hf_compress.modules.swap import PackedModule, packed_tensor, unpack_module
from hf_compress.pipeline.quantize import quantize

needs_exact = pytest.mark.skipif(not _exact(), reason="torch._int_mm is not exact on this processor (no VNNI)")

LSTM: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True},
    "projected": {"proj_size": 8, "num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}
GRU = {name: options for name, options in LSTM.items() if "proj_size" not in options}
LAYERS = [(nn.LSTM, name) for name in LSTM] + [(nn.GRU, name) for name in GRU]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: type[nn.Module], **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(16, 24, **options).eval()


def dynamic(kind: type[nn.Module], **options: Any) -> Any:
    return quantize(layer(kind, **options), Int8DynamicQuantConfig())


def twin(module: nn.Module) -> Any:
    """The layer of the original class, with the dequantized weights."""
    made = copy.deepcopy(module)
    assert isinstance(made, PackedModule)
    unpack_module(made)
    return made


def rounded(value: Tensor) -> Tensor:
    """A token on its grid: float32 decides the code, the value is exact."""
    single = value.float()
    step = single.abs().max() / 127.5
    if step == 0:
        return value.double() * 0
    return torch.clamp(torch.round(single / step), -128, 127).double() * step.double()


def oracle(module: Any, steps: list[Tensor], states: list[Tensor], suffix: str) -> tuple[list[Tensor], list[Tensor]]:
    """One sequence through one layer in one direction, token by token in float64."""
    weights = {name: value.double() for name, value in twin(module).named_parameters()}
    ih, hh = weights[f"weight_ih_{suffix}"], weights[f"weight_hh_{suffix}"]
    none = torch.zeros(len(ih), dtype=torch.float64)
    left, right = weights.get(f"bias_ih_{suffix}", none), weights.get(f"bias_hh_{suffix}", none)
    outputs, size = [], module.hidden_size
    for token in steps:
        given, again = ih @ rounded(token) + left, hh @ rounded(states[0]) + right
        if isinstance(module, nn.LSTM):
            enter, forget, new, leave = (given + again).split(size)
            cell = torch.sigmoid(forget) * states[1] + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(cell)
            if module.proj_size:
                hidden = weights[f"weight_hr_{suffix}"] @ rounded(hidden)
            states = [hidden, cell]
        else:
            r, z, n = (part for part in zip(given.split(size), again.split(size), strict=True))
            new = torch.tanh(n[0] + torch.sigmoid(sum(r)) * n[1])
            keep = torch.sigmoid(sum(z))
            states = [(1 - keep) * new + keep * states[0]]
        outputs.append(states[0])
    return outputs, states


def oracle_layers(module: Any, steps: list[Tensor], initial: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One sequence through all layers: outputs (steps × features) and final states (layers · directions × size)."""
    finals: list[list[Tensor]] = []
    tokens = [token.double() for token in steps]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    for number in range(module.num_layers):
        made = []
        for way in ways:
            states = [state[len(finals)].double() for state in initial]
            order = tokens[::-1] if way else tokens
            outputs, final = oracle(module, order, states, f"l{number}{way}")
            made.append(outputs[::-1] if way else outputs)
            finals.append(final)
        tokens = [torch.cat(parts) for parts in zip(*made, strict=True)]
    return torch.stack(tokens), [torch.stack(parts) for parts in zip(*finals, strict=True)]


def initial_states(module: Any, batch: int, seed: int | None) -> list[Tensor]:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    sizes = sizes[: 2 if isinstance(module, nn.LSTM) else 1]
    if seed is None:
        return [torch.zeros(layers, batch, size) for size in sizes]
    return [0.5 * random(layers, batch, size, seed=seed + index) for index, size in enumerate(sizes)]


def as_given(module: Any, states: list[Tensor]) -> Any:
    return tuple(states) if isinstance(module, nn.LSTM) else states[0]


def listed(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


def close(found: Tensor, expected: Tensor, limit: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert found.numel() == 0 or float((found.double() - expected.double()).abs().max()) <= limit


def close_but_for_a_code(found: Tensor, expected: Tensor) -> None:
    """The last bit of a sum may turn the rounding of a hidden value; then one code of 127 differs."""
    close(found, expected, 2e-3)


@pytest.mark.parametrize("integers", [False, pytest.param(True, marks=needs_exact)])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize(("kind", "name"), LAYERS)
@torch.no_grad()
def test_equals_the_oracle(kind: type[nn.Module], name: str, seed: int | None, integers: bool) -> None:
    module = dynamic(kind, **LSTM[name])
    value, states = random(5, 3, 16), initial_states(module, 3, seed)
    given = value.transpose(0, 1) if module.batch_first else value
    choose(module, integers)
    found, finals = module(given) if seed is None else module(given, as_given(module, states))
    found = found.transpose(0, 1) if module.batch_first else found
    for row in range(3):
        expected, last = oracle_layers(module, list(value[:, row]), [state[:, row] for state in states])
        close_but_for_a_code(found[:, row], expected)
        for state, wanted in zip(listed(finals), last, strict=True):
            close_but_for_a_code(state[:, row], wanted)


@pytest.mark.parametrize("integers", [False, pytest.param(True, marks=needs_exact)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_one_step_is_exact(kind: type[nn.Module], integers: bool) -> None:
    """Of one step all codes are certain."""
    module = dynamic(kind)
    value, states = random(1, 3, 16), initial_states(module, 3, 2)
    choose(module, integers)
    found, finals = module(value, as_given(module, states))
    for row in range(3):
        expected, last = oracle_layers(module, list(value[:, row]), [state[:, row] for state in states])
        close(found[:, row], expected, 2e-7)
        for state, wanted in zip(listed(finals), last, strict=True):
            close(state[:, row], wanted, 3e-7)


def choose(module: Any, integers: bool) -> None:
    """The kernel or the reference, whatever the probe says about speed here."""
    from hf_compress.modules.kernels.int_recurrent import RecurrentIntMatmul

    kernel = RecurrentIntMatmul()
    assert kernel.refusal(module, next(iter(module.hfc_layouts.values()))) is None
    module.hfc_kernel = kernel if integers else None


@pytest.mark.parametrize("integers", [False, pytest.param(True, marks=needs_exact)])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_packed_sequences(kind: type[nn.Module], ordered: bool, integers: bool) -> None:
    """Each sequence gives what it gives alone."""
    module = dynamic(kind, num_layers=2, bidirectional=True)
    lengths = [6, 4, 1] if ordered else [1, 6, 4]
    value, states = random(6, 3, 16), initial_states(module, 3, 5)
    choose(module, integers)
    packed = pack_padded_sequence(value, torch.tensor(lengths), enforce_sorted=ordered)
    output, finals = module(packed, as_given(module, states))
    assert isinstance(output, PackedSequence)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for row, length in enumerate(lengths):
        alone, last = module(value[:length, row : row + 1], as_given(module, [s[:, row : row + 1] for s in states]))
        close_but_for_a_code(padded[:length, row : row + 1], alone)
        for state, wanted in zip(listed(finals), listed(last), strict=True):
            close_but_for_a_code(state[:, row : row + 1], wanted)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@torch.no_grad()
def test_forms_of_the_input(kind: type[nn.Module]) -> None:
    """Without a batch, with an empty batch: shapes are those of the original layer."""
    for options in ({"num_layers": 2}, {"batch_first": True}):
        dense, module = layer(kind, **options), dynamic(kind, **options)
        value = random(4, 16)
        states = [state.squeeze(1) for state in initial_states(module, 1, 3)]
        found, finals = module(value, as_given(module, states))
        expected, last = dense(value, as_given(dense, states))
        close(found, expected, 0.02)
        for state, wanted in zip(listed(finals), listed(last), strict=True):
            close(state, wanted, 0.02)
        for shape in ((0, 4, 16), (4, 0, 16)):
            batch_dimension = 0 if module.batch_first else 1
            if shape[batch_dimension]:
                with pytest.raises(RuntimeError, match="length to be larger than 0"):
                    module(torch.zeros(shape))
                continue
            assert module(torch.zeros(shape))[0].shape == dense(torch.zeros(shape))[0].shape


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_inputs_that_do_not_fit_give_the_errors_of_the_original(kind: type[nn.Module]) -> None:
    dense, module = layer(kind), dynamic(kind)
    wrong_batch = as_given(module, initial_states(module, 2, 1))
    flat = as_given(module, [state[:, 0] for state in initial_states(module, 3, 1)])
    cases: list[tuple[Any, ...]] = [
        (random(5, 3, 15),),
        (random(5, 3, 2, 16),),
        (random(5, 3, 16), wrong_batch),
        (random(5, 3, 16), flat),
        (random(5, 16), wrong_batch),
        (random(5, 3, 16).double(),),
    ]
    for case in cases:
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            dense(*case)
        with pytest.raises(type(wanted.value)):
            module(*case)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gradients_pass_straight_through(kind: type[nn.Module]) -> None:
    """Of the input and of the initial states, as if nothing had been rounded but the weights."""
    module, dense = dynamic(kind), twin(dynamic(kind))
    made = []
    for one in (module, dense):
        value = random(4, 2, 16).requires_grad_()
        states = [state.requires_grad_() for state in initial_states(one, 2, 7)]
        one(value, as_given(one, states))[0].square().sum().backward()
        made.append([value.grad, *(state.grad for state in states)])
    for found, expected in zip(*made, strict=True):
        assert found is not None
        assert expected is not None
        assert float((found - expected).norm() / expected.norm()) < 0.02


def test_dropout_between_layers_only_in_training() -> None:
    module = dynamic(nn.LSTM, num_layers=2, dropout=0.5)
    value = random(5, 3, 16)
    assert torch.equal(module(value)[0], module(value)[0])
    with torch.random.fork_rng(devices=[]):
        module.train()
        assert not torch.equal(module(value)[0], module(value)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_weight_only_is_the_original_forward(kind: type[nn.Module]) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    module = quantize(layer(kind, **options), RTNQuantConfig(bits=4, group_size="channel"))
    value = random(5, 3, 16)
    found, expected = module(value), twin(module)(value)
    assert torch.equal(found[0], expected[0])
    packed = pack_padded_sequence(value, torch.tensor([5, 3, 2]))
    assert torch.equal(module(packed)[0].data, twin(module)(packed)[0].data)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("config", [RTNQuantConfig(bits=4, group_size=8), Int8DynamicQuantConfig()], ids=repr)
@torch.no_grad()
def test_cells_are_weight_only(kind: type[nn.Module], config: Any) -> None:
    module = quantize(layer(kind), config)
    assert all(layout.scheme.input_activations is None for layout in module.hfc_layouts.values())
    value = random(3, 16)
    for found, wanted in zip(listed(module(value)), listed(twin(module)(value)), strict=True):
        assert torch.equal(found, wanted)


def test_vanilla_rnn_is_weight_only() -> None:
    module = dynamic(nn.RNN)
    assert all(layout.scheme.input_activations is None for layout in module.hfc_layouts.values())


@pytest.mark.parametrize("config", [RTNQuantConfig(bits=4, group_size=8), Int8DynamicQuantConfig()], ids=repr)
@torch.no_grad()
def test_state_lives_in_packed_buffers_only(config: Any) -> None:
    module = layer(nn.LSTM)
    dense = [weakref.ref(value) for value in module._flat_weights if value.ndim == 2]
    quantize(module, config)
    gc.collect()
    assert all(reference() is None for reference in dense)
    names = set(module.state_dict())
    assert {"weight_ih_l0_packed", "weight_ih_l0_scale", "bias_ih_l0"} <= names
    assert "weight_ih_l0" not in names
    value = random(5, 3, 16)
    with reference_kernels(module):
        expected = module(value)[0]
        twins = [copy.deepcopy(module), copy.deepcopy(module).to(torch.float64).to(torch.float32)]
        for one in twins:
            one.flatten_parameters()
            one.hfc_kernel = None
            assert torch.equal(one(value)[0], expected)
    other = quantize(layer(nn.LSTM), config)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict())
    with reference_kernels(other):
        assert torch.equal(other(value)[0], expected)
    with pytest.raises(PackedWeightError):
        module.weight_ih_l0 = nn.Parameter(torch.zeros(96, 16))


@torch.no_grad()
def test_unpacked_is_an_ordinary_layer_again() -> None:
    module = layer(nn.GRU)
    before = copy.deepcopy(module)
    quantize(module, RTNQuantConfig(bits=8, group_size="channel"))
    values = {name: packed_tensor(module, name).dense() for name in module.hfc_layouts}
    unpack_module(module)
    assert type(module) is nn.GRU
    assert module.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(module.get_parameter(name), value) for name, value in values.items())
    close(module(random(5, 3, 16))[0], before(random(5, 3, 16))[0], 0.02)
    module.weight_ih_l0.data.zero_()  # what the forward reads is the parameter, not a copy
    assert not torch.equal(module(random(5, 3, 16))[0], before(random(5, 3, 16))[0])


@torch.no_grad()
def test_half_precision(recwarn: pytest.WarningsRecorder) -> None:
    module = dynamic(nn.LSTM).to(torch.bfloat16)
    assert kernel_counts(module) == {"reference": 1}
    found = module(random(5, 3, 16).bfloat16())[0]
    assert found.dtype == torch.bfloat16
    close(found.float(), layer(nn.LSTM)(random(5, 3, 16))[0], 0.05)


@needs_exact
@torch.no_grad()
def test_kernel_is_reported_and_agrees_with_the_reference() -> None:
    module = dynamic(nn.LSTM, num_layers=2)
    choose(module, integers=True)
    assert kernel_counts(module) == {"int8-matmul-recurrent": 1}
    value = random(20, 4, 16)
    found = module(value)[0]
    with reference_kernels(module):
        assert kernel_counts(module) == {"reference": 1}
        close_but_for_a_code(found, module(value)[0])
    odd = quantize(layer(nn.LSTM, proj_size=5), Int8DynamicQuantConfig())
    assert kernel_counts(odd) == {"reference": 1}


@torch.no_grad()
def test_some_weights_may_stay_dense() -> None:
    module = quantize(layer(nn.LSTM), Int8DynamicQuantConfig(skip=["weight_hh_l0"], min_coverage=0.0))
    assert set(module.hfc_layouts) == {"weight_ih_l0"}
    close(module(random(5, 3, 16))[0], layer(nn.LSTM)(random(5, 3, 16))[0], 0.02)
    clone = copy.deepcopy(module)
    clone.weight_hh_l0.zero_()
    assert not torch.equal(clone(random(5, 3, 16))[0], module(random(5, 3, 16))[0])


class Outputs(nn.LSTM):
    """A recurrent layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0] + 1.0


@pytest.mark.parametrize("config", [RTNQuantConfig(bits=8, group_size="channel"), Int8DynamicQuantConfig()], ids=repr)
@pytest.mark.parametrize("name", ["Outputs", "LSTM"])
@torch.no_grad()
def test_a_forward_of_its_own_is_kept(name: str, config: Any) -> None:
    """It gets dequantized weights and nothing else, whatever its class is called."""
    kind = type(name, (Outputs,), {})
    module = quantize(layer(kind), config)
    assert not any(one.scheme.input_activations for one in module.hfc_layouts.values())
    value = random(5, 3, 16)
    expected = twin(module)(value)
    assert torch.equal(module(value), expected)
    assert torch.equal(module(x=value), expected)


@torch.no_grad()
def test_a_subclass_without_a_forward_of_its_own_is_quantized_like_its_base() -> None:
    kind = type("Named", (nn.GRU,), {})
    module = dynamic(kind)
    assert all(one.scheme.input_activations for one in module.hfc_layouts.values())
    value = random(5, 3, 16)
    assert torch.equal(module(value)[0], dynamic(nn.GRU)(value)[0])
    assert torch.equal(module(input=value, hx=None)[0], module(value)[0])


@needs_exact
@torch.no_grad()
def test_the_kernel_runs_what_its_protocol_says() -> None:
    """With given states too."""
    module = dynamic(nn.LSTM)
    choose(module, integers=True)
    value, states = random(5, 3, 16), as_given(module, initial_states(module, 3, seed=4))
    found = module.hfc_kernel.run(module, value, states)
    assert torch.equal(module(value, states)[0], found[0])
    calls = []

    class Spy(type(module.hfc_kernel)):  # type: ignore[misc]
        def run(self, module: nn.Module, *inputs: Any) -> Any:
            calls.append(len(inputs))
            return super().run(module, *inputs)

    module.hfc_kernel = Spy()
    assert torch.equal(module(value, states)[0], found[0])
    assert calls == [2]
