"""Values equal packing and dequantizing to the last bit; gradients equal those written out in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_compress.core import scheme as schemes
from hf_compress.core.scheme import static_args, tensor_args, token_args, weight_args
from hf_compress.methods.rtn.method import quantize, uniform_grid
from hf_compress.modules.packed import Layout, dequantize, pack
from hf_compress.training.qat.fake import codes_of, fake_input, fake_learned, fake_weight, weight_grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(3, 32), (2, 3, 32)]
GRIDS = [
    weight_args(bits, size, symmetric)
    for bits, size, symmetric in itertools.product(range(2, 9), (16, "channel", "tensor"), (True, False))
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_values(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """What a packed model computes with, without training."""
    layout = Layout(tuple(weight.shape), schemes.scheme(args), transposed=False)
    return dequantize(pack(quantize(weight, args), layout))


def learned(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """The grid of a weight's range as a learned one starts."""
    scale, zero_point = weight_grid(weight, args)
    return scale.float(), zero_point


weights = st.builds(
    lambda shape, seed, exponent, offset, dtype: ((random(*shape, seed=seed) + offset) * 10.0**exponent).to(dtype),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-3, 3),
    offset=st.sampled_from([0.0, 0.0, 1.0, -3.0]),
    dtype=st.sampled_from(DTYPES),
)


@settings(max_examples=300, deadline=None)
@given(weight=weights, args=st.sampled_from(GRIDS))
def test_values_are_those_of_packing(weight: Tensor, args: QuantizationArgs) -> None:
    expected = packed_values(weight, args)
    made = fake_weight(weight, args)
    assert (made.dtype, made.shape) == (weight.dtype, weight.shape)
    assert torch.equal(made, expected)
    assert torch.equal(fake_learned(weight, args, *learned(weight, args)), expected)


@pytest.mark.parametrize("args", GRIDS, ids=lambda args: schemes.label(schemes.scheme(args)))
def test_grid_and_codes_are_those_of_rounding_to_nearest(args: QuantizationArgs) -> None:
    weight = random(4, 32)
    expected = quantize(weight, args)
    scale, zero_point = weight_grid(weight, args)
    assert torch.equal(scale, expected.scale)
    assert (zero_point is None) == (expected.zero_point is None)
    if zero_point is not None and expected.zero_point is not None:
        assert torch.equal(zero_point, expected.zero_point)
    assert torch.equal(codes_of(weight, args, scale, zero_point), expected.codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_rows(dtype: torch.dtype, symmetric: bool) -> None:
    """All zeros, one value, the smallest and the largest ones of the type."""
    limits = torch.finfo(dtype)
    rows = [[0.0] * 8, [1.5] * 8, [-1.5] * 8, [limits.tiny] * 8, [limits.max / 4, *[0.0] * 7], [-0.0] * 8]
    weight = torch.tensor(rows, dtype=torch.float64).to(dtype)
    if dtype == torch.float64:  # scales are computed in float32
        weight = weight.float().nan_to_num(posinf=1.0).double()
    args = weight_args(4, "channel", symmetric)
    assert torch.equal(fake_weight(weight, args), packed_values(weight, args))
    assert torch.equal(fake_weight(weight, args)[0], weight[0])


@pytest.mark.parametrize("args", [args for args in GRIDS if args.symmetric], ids=str)
def test_zeros_stay_zeros(args: QuantizationArgs) -> None:
    """What pruning has zeroed."""
    weight = random(4, 32)
    weight[:, ::3] = 0
    assert int((fake_weight(weight, args)[:, ::3] != 0).sum()) == 0
    assert int((fake_learned(weight, args, *learned(weight, args))[:, ::3] != 0).sum()) == 0


def test_scales_that_a_format_narrows() -> None:
    weight = random(4, 32)
    args = weight_args(4, 16, symmetric=True).model_copy(update={"scale_dtype": torch.float16})
    assert torch.equal(fake_weight(weight, args), packed_values(weight, args))
    assert torch.equal(fake_learned(weight, args, *learned(weight, args)), packed_values(weight, args))
    wide = weight_args(4, 16, symmetric=True)
    assert not torch.equal(fake_weight(weight, args), fake_weight(weight, wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("args", GRIDS[:6], ids=lambda args: schemes.label(schemes.scheme(args)))
def test_gradient_of_rounding_is_the_identity(args: QuantizationArgs, dtype: torch.dtype) -> None:
    weight = nn.Parameter(random(4, 32).to(dtype))
    towards = random(4, 32, seed=1).to(dtype)
    fake_weight(weight, args).backward(towards)
    assert weight.grad is not None
    assert torch.equal(weight.grad, towards)


def written_out(weight: Tensor, scale: Tensor, zero_point: Tensor | None, limit: int, towards: Tensor) -> Any:
    """Equations 1, 2, 3 and 5 of arXiv:1902.08153 value by value in float64, for scales per row.

    Returns:
        Values, gradient of the weight, gradient of the scale, times 1 / √(n · q_max).
    """
    values, grads = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64)
    of_scale = torch.zeros(len(weight), 1, dtype=torch.float64)
    for row, column in itertools.product(range(weight.shape[0]), range(weight.shape[1])):
        step = float(scale[row, 0])
        zero = 0 if zero_point is None else int(zero_point[row, 0])
        position, grad = float(weight[row, column]) / step, float(towards[row, column])
        lowest, highest = -limit - zero, limit - 1 - zero
        code = min(max(round(position), lowest), highest)
        values[row, column] = code * step
        if lowest < position < highest:
            grads[row, column] = grad
            of_scale[row, 0] += grad * (round(position) - position)
        else:
            of_scale[row, 0] += grad * (lowest if position <= lowest else highest)
    return values, grads, of_scale / math.sqrt(weight.shape[1] * (limit - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [0.4, 1.01, 1.7])
def test_gradients_of_learned_scales(bits: int, symmetric: bool, factor: float) -> None:
    """On grids that clip, fit, and are too wide. One that fits to the last bit has its widest value at a tie.

    Float32 positions of up to 2^bits steps are off by 2^(bits - 24), so are the terms of a scale's gradient; 32 of
    them are summed: relative to the largest, 1e-5 x 2^(bits - 2) bounds both.
    """
    args = weight_args(bits, "channel", symmetric)
    weight, towards = nn.Parameter(random(5, 32)), random(5, 32, seed=1)
    scale, zero_point = learned(weight.detach(), args)
    scale = (scale * factor).requires_grad_()
    made = fake_learned(weight, args, scale, zero_point)
    made.backward(towards)
    limit = 2 ** (bits - 1)
    values, grads, of_scale = written_out(weight.detach(), scale.detach(), zero_point, limit, towards)
    bound = 1e-5 * 2.0 ** (bits - 2)
    assert float((made.detach() - values).abs().max() / values.abs().max()) < 1e-6
    assert weight.grad is not None
    assert torch.equal(weight.grad, grads.float())
    assert scale.grad is not None
    assert float((scale.grad - of_scale).abs().max() / of_scale.abs().max()) < bound
    if factor == 0.4:
        assert 0 < int((weight.grad == 0).sum()) < weight.numel()


@pytest.mark.parametrize(("size", "shape"), [(16, (4, 2)), ("channel", (4, 1)), ("tensor", (1,))])
def test_gradient_of_a_scale_is_summed_over_what_it_scales(size: Any, shape: tuple[int, ...]) -> None:
    """Differences of the sums of gradients over parts: of those of single rows or groups of 16, rightly paced."""
    args, weight, towards = weight_args(3, size, symmetric=True), random(4, 32), random(4, 32, seed=1)
    scale = learned(weight, args)[0].requires_grad_()
    assert scale.shape == shape
    fake_learned(weight, args, scale, None).backward(towards)
    per_sixteen = weight_args(3, 16, symmetric=True)
    wide = scale.detach().expand(4, 2).clone().requires_grad_()
    fake_learned(weight, per_sixteen, wide, None).backward(towards)
    assert scale.grad is not None
    assert wide.grad is not None
    values = weight.numel() // scale.numel()
    expected = wide.grad.sum_to_size(shape) / math.sqrt(values / 16)
    assert torch.allclose(scale.grad, expected, rtol=1e-5, atol=1e-6)  # float32 sums of up to 128 terms of size one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_learned_scales_of_narrow_weights(dtype: torch.dtype) -> None:
    """Scales stay float32, so do their gradients; the weight's has its type."""
    args = weight_args(4, 16, symmetric=False)
    weight = nn.Parameter(random(4, 32).to(dtype))
    scale, zero_point = learned(weight.detach(), args)
    made = fake_learned(weight, args, scale.requires_grad_(), zero_point)
    made.sum().backward()
    assert weight.grad is not None
    assert scale.grad is not None
    assert (made.dtype, weight.grad.dtype, scale.grad.dtype) == (dtype, dtype, torch.float32)


def test_little_is_kept_for_the_backward_pass() -> None:
    """Nothing for a grid of the weights' range; the parameter itself and the scales where they are learned."""
    weight, args = nn.Parameter(random(4, 32)), weight_args(4, 16, symmetric=True)
    scale, _ = learned(weight.detach(), args)
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        fake_weight(weight, args)
        assert kept == []
        fake_learned(weight, args, scale, None)
    assert {value.data_ptr() for value in kept} == {weight.data_ptr(), scale.data_ptr()}


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("args", [token_args(), tensor_args()], ids=["token", "tensor"])
def test_dynamic_inputs_are_those_of_compressed_tensors(args: QuantizationArgs, dtype: torch.dtype) -> None:
    value = (random(2, 5, 16) * torch.logspace(-3, 2, 5).view(1, 5, 1)).to(dtype)
    value[0, 0] = 0
    scale, zero_point = compute_dynamic_scales_and_zp(value=value, args=args, module=nn.Identity())
    expected = fake_quantize(value, scale, zero_point, args)
    found = fake_input(value, scale, None, clipped=False)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("given", DTYPES[:3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_inputs_are_those_of_compressed_tensors(
    symmetric: bool, given: torch.dtype, dtype: torch.dtype
) -> None:
    """Inputs of one type meet grids of another under mixed precision; values beyond the range are clipped."""
    args, value = static_args(symmetric), (3 * random(2, 5, 16)).to(given)
    scale, zero_point = uniform_grid(torch.tensor([-1.0]), torch.tensor([2.0]), args, dtype)
    expected = fake_quantize(value, scale, zero_point, args)
    found = fake_input(value, scale, zero_point, clipped=True)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_inputs_have_no_gradient(symmetric: bool) -> None:
    """A value has one where its nearest code exists, written out in float64."""
    args, value = static_args(symmetric), (3 * random(4, 32)).requires_grad_()
    scale, zero_point = uniform_grid(torch.tensor([-1.0]), torch.tensor([2.0]), args, torch.float32)
    towards = random(4, 32, seed=1)
    fake_input(value, scale, zero_point, clipped=True).backward(towards)
    zero = 0 if zero_point is None else int(zero_point)
    codes = (value.detach().double() / float(scale)).round() + zero
    inside = (codes >= -128) & (codes <= 127)
    assert 0 < int(inside.sum()) < inside.numel()
    assert value.grad is not None
    assert torch.equal(value.grad, torch.where(inside, towards, 0.0))


def test_gradients_of_dynamic_inputs_pass_straight_through() -> None:
    value, towards = random(2, 3, 16).requires_grad_(), random(2, 3, 16, seed=1)
    scale, _ = compute_dynamic_scales_and_zp(value=value.detach(), args=token_args(), module=nn.Identity())
    fake_input(value, scale, None, clipped=False).backward(towards)
    assert value.grad is not None
    assert torch.equal(value.grad, towards)


def test_mixed_precision_changes_nothing() -> None:
    """Weights are rounded in their own type; what multiplies them casts the result."""
    weight, args = nn.Parameter(random(4, 32)), weight_args(4, 16, symmetric=False)
    grid = learned(weight.detach(), args)
    plain = fake_weight(weight, args), fake_learned(weight, args, *grid)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fake_weight(weight, args), fake_learned(weight, args, *grid)
        product = nn.functional.linear(random(2, 32), mixed[0])
    assert all(torch.equal(*pair) for pair in zip(plain, mixed, strict=True))
    assert product.dtype == torch.bfloat16
    product.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_layouts_of_other_orientations() -> None:
    """`oriented` undoes what methods see: convolutions and GPT-2's Conv1D."""
    made = schemes.scheme(weight_args(4, "channel", symmetric=True))
    layout = Layout((4, 6), made, transposed=False, kernel=(2, 3))
    assert layout.oriented(random(4, 6)).shape == (4, 2, 3)
    turned = replace(layout, kernel=(), transposed=True).oriented(random(4, 6))
    assert torch.equal(turned, random(4, 6).t())
