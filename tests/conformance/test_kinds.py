"""Kinds of weights beside linear layers: convolutions, embeddings, attention's own, and what stays kept."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hf_compress as hfc
from hf_compress.core.errors import GroupSizeError, NothingToQuantizeError, RowError
from hf_compress.modules.packed import dequantize
from hf_compress.modules.swap import PackedModule, packed_tensor, unpack_module

RTN = hfc.RTNQuantConfig(bits=4)
W8A8 = hfc.Int8DynamicQuantConfig()

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "1d same": (lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2), (2, 6, 9)),
    "1d unbatched": (lambda: nn.Conv1d(6, 8, 3), (6, 9)),
    "2d stride": (lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=(1, 0)), (2, 6, 7, 8)),
    "2d groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False), (2, 6, 7, 7)),
    "2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 7, 7)),
    "2d pointwise": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 4, 4)),
    "2d circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2)), (2, 4, 3, 5, 5)),
}


def build(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make().eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(module: nn.Module) -> Any:
    """The original class with the dequantized weights."""
    made = copy.deepcopy(module)
    assert isinstance(made, PackedModule)
    unpack_module(made)
    return made


@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_weight_only_convolutions(name: str) -> None:
    """The original forward on weights of one scale per output channel, rounded to nearest."""
    make, shape = CONVOLUTIONS[name]
    module, original = hfc.quantize(build(make), RTN), build(make)
    assert isinstance(module, type(original))
    assert torch.equal(module(random(*shape)), dense(module)(random(*shape)))
    assert module.weight.shape == original.weight.shape
    assert on_the_nearest_point(module.weight.double().flatten(1), original.weight.double().flatten(1), 7.5)


def on_the_nearest_point(found: Tensor, rows: Tensor, half: float) -> bool:
    """Whether rows were rounded to the nearest multiple of absmax / half."""
    scale = rows.abs().amax(1, keepdim=True) / half
    steps = found / scale.clamp_min(1e-30)
    whole = bool(((steps - steps.round()).abs() < 1e-4).all())
    return whole and bool(((found - rows).abs() <= 0.5 * scale * (1 + 1e-4)).all())


def windows(value: Tensor, module: Any) -> Tensor:
    """A two-dimensional convolution, one multiplication at a time in float64."""
    weight, step = module.weight.double(), module.stride
    batch, _, height, width = value.shape
    rows, columns = weight.shape[2:]
    group_in, group_out = weight.shape[1], len(weight) // module.groups
    out = torch.zeros(
        batch, len(weight), (height - rows) // step[0] + 1, (width - columns) // step[1] + 1, dtype=torch.float64
    )
    for b, channel, y, x in itertools.product(*(range(size) for size in out.shape)):
        first = channel // group_out * group_in
        top, left = y * step[0], x * step[1]
        patch = value[b, first : first + group_in, top : top + rows, left : left + columns]
        out[b, channel, y, x] = (patch.double() * weight[channel]).sum() + module.bias[channel].double()
    return out


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}], ids=str)
@torch.no_grad()
def test_int8_convolution_against_the_oracle(options: dict[str, int]) -> None:
    """One input scale for the whole tensor, the batch included: absmax / 127.5, half to even, clamped to int8."""
    module = hfc.quantize(build(lambda: nn.Conv2d(4, 6, 3, **options)), W8A8)
    assert module.hfc_layouts["weight"].scheme.input_activations.strategy == "tensor"
    value = random(2, 4, 6, 7) * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1)
    step = value.abs().max() / 127.5
    rounded = torch.clamp(torch.round(value / step), -128, 127).double() * step.double()
    expected = windows(rounded, dense(module))
    assert float((module(value).double() - expected).abs().max() / expected.abs().max()) < 1e-6
    assert not torch.equal(module(value[:1]), module(value)[:1])  # the scale spans the batch


@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_int8_convolutions_stay_close(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    module, value = hfc.quantize(build(make), W8A8), random(*shape)
    expected = build(make)(value)
    assert float((module(value) - expected).norm() / expected.norm()) < 0.02
    depthwise = name == "2d depthwise"
    assert (module.hfc_layouts["weight"].scheme.input_activations is None) == depthwise


def test_gradients_of_int8_convolutions_pass_straight_through() -> None:
    module = hfc.quantize(build(lambda: nn.Conv2d(4, 6, 3)), W8A8)
    found, expected = random(2, 4, 6, 6).requires_grad_(), random(2, 4, 6, 6).requires_grad_()
    weights = random(2, 6, 4, 4, seed=2)
    (module(found) * weights).sum().backward()
    (dense(module)(expected) * weights).sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, atol=1e-6)


def test_group_size_of_a_convolution_by_rule() -> None:
    """One scale per channel unless a rule asks for groups, which then must divide the inputs × kernel."""
    rule = hfc.Rule(pattern="*", group_size=9)
    module = hfc.quantize(build(lambda: nn.Conv2d(4, 6, 3)), hfc.RTNQuantConfig(bits=4, rules=[rule]))
    packed = packed_tensor(module, "weight")
    assert packed.scale.shape == (6, 4)
    original = build(lambda: nn.Conv2d(4, 6, 3)).weight.double().view(6, 4, 9)
    assert torch.allclose(packed.scale.double(), original.abs().amax(-1) / 7.5, rtol=1e-6)
    assert module.weight.shape == (6, 4, 3, 3)
    assert torch.equal(dequantize(packed).view(6, 4, 3, 3), dense(module).weight)
    rules = [hfc.Rule(pattern="*", group_size=8)]
    with pytest.raises(GroupSizeError, match="group_size=8 does not divide the 36 inputs"):
        hfc.plan(build(lambda: nn.Conv2d(4, 6, 3)), hfc.RTNQuantConfig(bits=4, rules=rules))


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "output channels in the second dimension"),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), "output channels in the second dimension"),
    "bag": (lambda: nn.EmbeddingBag(7, 8), "sums rows of its table"),
    "renormalised": (lambda: nn.Embedding(7, 8, max_norm=1.0), "max_norm=1.0"),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "Bilinear weights are not supported"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_a_reason(name: str) -> None:
    make, reason = KEPT[name]
    both = nn.ModuleDict({"odd": build(make), "linear": build(lambda: nn.Linear(64, 64))})
    made = hfc.plan(both, hfc.RTNQuantConfig(embeddings="int8"))
    rows = {row.name: row for row in made.rows}
    assert rows["odd"].scheme == "kept"
    assert reason in rows["odd"].reason
    assert rows["linear"].scheme == "int4-g64"
    with pytest.raises(NothingToQuantizeError, match=reason):
        hfc.plan(build(make), hfc.RTNQuantConfig(embeddings="int8"))


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "frequencies": {"scale_grad_by_freq": True, "sparse": True},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@torch.no_grad()
def test_embeddings(name: str) -> None:
    original = build(lambda: nn.Embedding(11, 8, **EMBEDDINGS[name]))
    module = hfc.quantize(copy.deepcopy(original), hfc.RTNQuantConfig(embeddings="int8"))
    rows = torch.tensor([[0, 3, 10], [5, 5, 1]])
    assert on_the_nearest_point(module(torch.arange(11)).double(), original.weight.double(), 127.5)
    assert torch.equal(module(rows), functional.embedding(rows, dense(module).weight))
    if "padding_idx" in EMBEDDINGS[name]:
        assert torch.equal(module(torch.tensor([0])), torch.zeros(1, 8))
    assert module(torch.zeros(0, dtype=torch.long)).shape == (0, 8)


@pytest.mark.parametrize("row", [11, -1, 2**40])
def test_rows_beyond_the_table(row: int) -> None:
    """The error of the dense layer, told with the row and the size of the table."""
    original = build(lambda: nn.Embedding(11, 8))
    module = hfc.quantize(copy.deepcopy(original), hfc.RTNQuantConfig(embeddings="int8"))
    asked = torch.tensor([[0, row]])
    with pytest.raises(IndexError):
        original(asked)
    with pytest.raises(RowError, match=rf"^\[HFC409\] Row {row} .*table of 11 rows.* Fix: ") as caught:
        module(asked)
    assert isinstance(caught.value, IndexError)


def test_rows_beyond_the_table_when_compiled() -> None:
    """Compiled code checks rows itself: never a value of another row."""
    module = hfc.quantize(build(lambda: nn.Embedding(11, 8)), hfc.RTNQuantConfig(embeddings="int8"))
    compiled = torch.compile(module, backend="aot_eager")
    rows = torch.tensor([[0, 3, 10]])
    with torch.no_grad():
        assert torch.equal(compiled(rows), module(rows))
        with pytest.raises((IndexError, RuntimeError)):
            compiled(torch.tensor([[0, 3, 11]]))


@torch.no_grad()
def test_attention_of_pytorch_reads_its_weights() -> None:
    """nn.MultiheadAttention never calls its output layer, so quantized inputs would be a claim nothing keeps."""
    both = build(lambda: nn.ModuleList([nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)]))
    config = hfc.Int8DynamicQuantConfig(min_coverage=0.3)
    rows = {row.name: row for row in hfc.plan(both, config).rows}
    assert rows["0.out_proj"].scheme == "int8-channel"
    assert rows["0.in_proj_weight"].scheme == "kept"
    assert rows["1"].scheme == "w8a8-dynamic-token"
    value = random(2, 5, 32)
    expected = both[0](value, value, value)[0]
    packed = hfc.quantize(both, config)
    assert float((packed[0](value, value, value)[0] - expected).norm() / expected.norm()) < 0.01


@torch.no_grad()
def test_a_buffer_with_a_name_that_packing_would_take() -> None:
    """Such a layer stays as it is, and so do its results."""
    both = build(lambda: nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]))
    both[0].register_buffer("weight_scale", torch.ones(3))
    expected = both[0](random(2, 64))
    packed = hfc.quantize(both, hfc.RTNQuantConfig(min_coverage=0.4))
    assert torch.equal(packed[0].weight_scale, torch.ones(3))
    assert torch.equal(packed[0](random(2, 64)), expected)
    assert isinstance(packed[1], PackedModule)
