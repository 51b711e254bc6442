from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hf_compress as hfc
from hf_compress.core import scheme as schemes
from hf_compress.core.errors import ConfigError
from hf_compress.core.registry import Quantized
from hf_compress.core.scheme import groups, weight_args
from hf_compress.methods.hqq import solver
from hf_compress.methods.hqq.method import quantize, quantize_scheme
from hf_compress.methods.hqq.solver import Grid, fit, sums
from hf_compress.methods.rtn.method import CHUNK
from hf_compress.methods.rtn.method import quantize as round_to_nearest
from tests._utils.tiny import tiny

GROUPS = [8, "channel", "tensor"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rebuild(made: Quantized) -> Tensor:
    """Dequantized in float64, without the package."""
    codes = made.codes.double()
    cells = codes.reshape(1, -1) if made.scale.numel() == 1 else codes.unflatten(-1, (made.scale.shape[-1], -1))
    zeros = 0 if made.zero_point is None else made.zero_point.double().reshape(*cells.shape[:-1], 1)
    return ((cells - zeros) * made.scale.double().reshape(*cells.shape[:-1], 1)).reshape(codes.shape)


def losses(weight: Tensor, made: Quantized) -> Tensor:
    """The objective of each group, float64."""
    error = (weight.double() - rebuild(made)).abs() ** solver.LOSS
    return error.sum().view(1) if made.scale.numel() == 1 else error.unflatten(-1, (made.scale.shape[-1], -1)).sum(-1)


def assert_nearest(weight: Tensor, made: Quantized, bits: int) -> None:
    """No other code of the range is nearer, with scale and zero point as stored."""
    limit = 2 ** (bits - 1)
    error = (weight.double() - rebuild(made)).abs()
    for step in (-1, 1):
        codes = (made.codes.int() + step).clamp(-limit, limit - 1).to(torch.int8)
        other = Quantized(codes, made.scale, made.zero_point)
        assert bool((error <= (weight.double() - rebuild(other)).abs() * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_group_is_worse_than_rounded_to_nearest(
    bits: int, dtype: torch.dtype, group_size: int | str, symmetric: bool
) -> None:
    weight, args = normal(12, 32, dtype=dtype) + 0.2, weight_args(bits, group_size, symmetric)
    made, before = quantize(weight, args), round_to_nearest(weight, args)
    assert (made.codes.dtype, made.scale.dtype, made.scale.shape) == (torch.int8, dtype, groups((12, 32), args))
    assert (made.zero_point is None) == symmetric
    if made.zero_point is not None:
        assert (made.zero_point.dtype, made.zero_point.shape) == (torch.int8, made.scale.shape)
        limit = 2 ** (bits - 1)
        assert -limit <= int(made.zero_point.min()) <= int(made.zero_point.max()) < limit
    assert_nearest(weight, made, bits)
    ours, theirs = losses(weight, made), losses(weight, before)
    # The solver compares in float32.
    assert bool((ours <= theirs * (1 + 1e-4)).all())
    if bits < 8:
        assert float(ours.sum()) < float(theirs.sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_round_to_nearest(bits: int, symmetric: bool) -> None:
    weight, args = normal(64, 256), weight_args(bits, 64, symmetric)
    errors = [
        float((rebuild(run(weight, args)) - weight.double()).square().mean()) for run in (quantize, round_to_nearest)
    ]
    assert errors[0] < 0.97 * errors[1]


def oracle(
    values: list[float], scale: float, zero: int | None, bits: int, beta: float
) -> tuple[float, float, float, float]:
    """A round's sums over one group, in float64, value by value: loss, product, square, drift."""
    limit = 2 ** (bits - 1)
    loss = product = square = drift = 0.0
    for value in values:
        code = max(-limit, min(limit - 1, round(value / scale + (zero or 0))))
        level = code - (zero or 0)
        error = value / scale - level
        # The shrinkage of the paper's equation for |x|^p, p < 1: e = sign(x) · max(|x| - |x|^(p - 1) / β, 0).
        shrunk = 0.0
        if error:
            shrunk = math.copysign(max(abs(error) - abs(error) ** (solver.POWER - 1) / beta, 0.0), error)
        loss += abs(error) ** solver.LOSS
        product += level * (error - shrunk)
        square += level**2
        drift += error - shrunk
    return loss, product, square, drift


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("beta", [0.5, 2.5, 10.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_sums_are_those_of_a_slow_loop(bits: int, beta: float, zero: int | None) -> None:
    block = normal(3, 32)
    scale = torch.tensor([[0.1], [0.3], [0.7]])
    zeros = None if zero is None else torch.full((3, 1), float(zero))
    seen = sums([block[:, :20], block[:, 20:]], Grid(scale, zeros), bits, beta)
    for row in range(3):
        expected = oracle(block[row].tolist(), float(scale[row]), zero, bits, beta)
        found = (float(seen.loss[row]), float(seen.product[row]), float(seen.square[row]))
        assert found == pytest.approx(expected[:3], rel=1e-4, abs=1e-4)


def test_the_scale_is_the_least_squares_fit() -> None:
    """With β so small that nothing is taken as an outlier, a round is s = Σ q·w / Σ q²."""
    block, scale = normal(4, 64), torch.full((4, 1), 0.31)
    seen = sums([block], Grid(scale, None), 4, 1e-9)
    codes = (block.double() / 0.31).round().clamp(-8, 7)
    expected = (codes * block).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
    torch.testing.assert_close(scale * (1 + seen.product / seen.square), expected.float(), rtol=1e-4, atol=0)


def test_an_outlier_does_not_decide_the_grid() -> None:
    """63 values on a 2-bit grid and one far outside: least squares alone would move the grid to it."""
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(16).view(1, 64)
    values[0, 5] = 2.2
    made = quantize(values, weight_args(2, 64, True))
    before = round_to_nearest(values, weight_args(2, 64, True))
    error, former = ((rebuild(one) - values.double()).abs().median() for one in (made, before))
    assert float(error) < 0.6 * float(former)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponent", [-30, -10, 10, 30])
def test_results_do_not_depend_on_the_magnitude(exponent: int, symmetric: bool) -> None:
    weight, args = normal(4, 64), weight_args(4, 16, symmetric)
    one, other = quantize(weight, args), quantize(weight * 2.0**exponent, args)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero(dtype: torch.dtype, group_size: int | str, symmetric: bool) -> None:
    weight = normal(4, 16, dtype=dtype)
    weight[1], weight[2, :8] = 0, 0
    for value in (weight, torch.zeros_like(weight)):
        made = quantize(value, weight_args(4, group_size, symmetric))
        assert bool((made.scale > 0).all())
        assert bool(made.scale.isfinite().all())
        assert bool((rebuild(made)[value == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("constant", [1.0, -1.0, 1e-6, -3e4, 1e-30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_weight_is_nearly_exact(bits: int, constant: float, symmetric: bool) -> None:
    made = quantize(torch.full((3, 8), constant), weight_args(bits, 8, symmetric))
    torch.testing.assert_close(rebuild(made), torch.full((3, 8), constant).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", ["tiny", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes_stay_finite(dtype: torch.dtype, magnitude: str, symmetric: bool) -> None:
    """Down to the smallest normal and up to a quarter of the largest number."""
    factor = torch.finfo(dtype).tiny if magnitude == "tiny" else torch.finfo(dtype).max / 4
    weight = torch.linspace(-1, 1, 32).view(2, 16).to(dtype) * factor
    made = quantize(weight, weight_args(4, 8, symmetric))
    assert bool(rebuild(made).isfinite().all())
    assert float((rebuild(made) - weight.double()).abs().max()) <= 0.5 * float(weight.double().abs().max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_a_narrower_type(dtype: torch.dtype, symmetric: bool) -> None:
    args = schemes.with_half_scales(schemes.scheme(weight_args(4, 16, symmetric))).weights
    weight = normal(8, 64, dtype=dtype)
    made = quantize(weight, args)
    assert made.scale.dtype == dtype
    assert torch.equal(made.scale, made.scale.half().to(dtype))
    assert_nearest(weight, made, 4)
    assert bool((losses(weight, made) <= losses(weight, round_to_nearest(weight, args)) * (1 + 1e-4)).all())


@pytest.mark.parametrize("group_size", [64, "channel"])
def test_blocks_do_not_change_the_result(group_size: int | str) -> None:
    weight, args = normal(CHUNK // 1024 + 37, 1024), weight_args(4, group_size, False)
    whole, parts = quantize(weight, args), [quantize(part, args) for part in weight.split(10)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
    assert torch.equal(whole.zero_point, torch.cat([part.zero_point for part in parts]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_one_tensor_are_fitted_together(symmetric: bool) -> None:
    """The same grid as for the weight in one piece, but for the order of float32 sums."""
    weight, args = normal(CHUNK // 512 + 5, 512), weight_args(4, "tensor", symmetric)
    made = quantize(weight, args)
    flat = weight.view(1, -1)
    before = round_to_nearest(weight, args)
    zero = None if before.zero_point is None else before.zero_point.float().view(1, 1)
    best = fit([flat], Grid(before.scale.view(1, 1), zero), 4, (torch.float32,))
    torch.testing.assert_close(made.scale.view(1, 1), best.scale, rtol=1e-4, atol=0)
    assert float(losses(weight, made)) < float(losses(weight, before))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, "channel"])
def test_experts_are_quantized_one_by_one(group_size: int | str, symmetric: bool) -> None:
    weight, args = normal(3, 5, 16), weight_args(4, group_size, symmetric)
    whole = quantize(weight, args)
    for expert in range(3):
        one = quantize(weight[expert], args)
        assert torch.equal(whole.codes[expert], one.codes)
        assert torch.equal(whole.scale[expert], one.scale)
        assert symmetric or torch.equal(whole.zero_point[expert], one.zero_point)


@pytest.mark.parametrize("group_size", GROUPS)
def test_same_input_same_bytes_and_input_unchanged(group_size: int | str) -> None:
    weight, args = normal(6, 16), weight_args(3, group_size, False)
    before = weight.clone()
    first, second = quantize(weight, args), quantize(weight.t().contiguous().t(), args)
    assert torch.equal(weight, before)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.zero_point, second.zero_point)


def test_a_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform grid"):
        quantize_scheme(normal(4, 16), schemes.scheme(weight_args(4, "channel", True), codebook="nf4"))


def test_impossible_fields() -> None:
    with pytest.raises(ConfigError, match="bits=9 is not possible"):
        hfc.HQQQuantConfig(bits=9)


def test_the_plan_is_that_of_round_to_nearest() -> None:
    """The same schemes, so the same bytes."""
    rows = [hfc.plan(tiny("llama"), config(group_size=16)).rows for config in (hfc.HQQQuantConfig, hfc.RTNQuantConfig)]
    assert rows[0] == rows[1]
