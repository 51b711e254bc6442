from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.apply.packing import pack_weight
from hf_compress.core.errors import ConfigError, WeightValueError
from hf_compress.core.registry import Quantized
from hf_compress.core.scheme import groups, weight_args
from hf_compress.methods.cast.config import CastFields
from hf_compress.methods.cast.method import scheme as cast_scheme
from hf_compress.methods.rtn.config import RTNFields
from hf_compress.methods.rtn.method import CHUNK, quantize, scheme
from hf_compress.modules.packed import dequantize
from hf_compress.modules.results import check_values, sqnr_db
from hf_compress.pipeline.planning import plan
from hf_compress.pipeline.quantize import quantize as quantize_model
from tests._utils.packing import packed_of
from tests._utils.tiny import tiny

BITS = range(2, 9)
GRIDS = [4, 8, 16, "channel", "tensor"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(shape: tuple[int, int], group_size: int | str) -> list[list[tuple[int, int]]]:
    """The cells of each group, in the order of the scales."""
    rows, columns = shape
    if group_size == "tensor":
        return [[(row, column) for row in range(rows) for column in range(columns)]]
    width = columns if group_size == "channel" else int(group_size)
    return [
        [(row, column) for column in range(start, start + width)]
        for row in range(rows)
        for start in range(0, columns, width)
    ]


def oracle(weight: Tensor, bits: int, group_size: int | str, symmetric: bool) -> tuple[list[float], list[int], Tensor]:
    """Scales, zero points and reconstruction in float64, one value after another."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales, zeros, rebuilt = [], [], torch.zeros(weight.shape, dtype=torch.float64)
    for cells in spans(tuple(weight.shape), group_size):
        values = [float(weight[cell]) for cell in cells]
        low, high = min(0.0, *values), max(0.0, *values)
        if symmetric:
            scale, zero = max(-low, high) / ((highest - lowest) / 2), 0
        else:
            scale = (high - low) / (highest - lowest)
            zero = max(lowest, min(highest, round(lowest - low / scale))) if scale else 0
        scales.append(scale)
        zeros.append(zero)
        for cell, value in zip(cells, values, strict=True):
            code = max(lowest, min(highest, round(value / scale) + zero)) if scale else zero
            rebuilt[cell] = (code - zero) * scale
    return scales, zeros, rebuilt


def rebuild(made: Quantized, group_size: int | str) -> Tensor:
    """Dequantized in float64, without the package."""
    codes = made.codes.double()
    width = codes.shape[-1] if isinstance(group_size, str) else group_size
    grouped = codes.unflatten(-1, (-1, width))
    zeros = 0 if made.zero_point is None else made.zero_point.double().reshape(*made.scale.shape[:-1], -1, 1)
    return ((grouped - zeros) * made.scale.double().reshape(*made.scale.shape[:-1], -1, 1)).flatten(-2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_oracle(bits: int, group_size: int | str, symmetric: bool) -> None:
    weight = normal(7, 16, seed=bits) + (0.0 if symmetric else 0.5)
    made = quantize(weight, weight_args(bits, group_size, symmetric))
    scales, zeros, expected = oracle(weight, bits, group_size, symmetric)
    assert made.codes.dtype == torch.int8
    assert made.scale.shape == groups((7, 16), weight_args(bits, group_size, symmetric))
    torch.testing.assert_close(
        made.scale.flatten().double(), torch.tensor(scales, dtype=torch.float64), rtol=3e-7, atol=0
    )
    if symmetric:
        assert made.zero_point is None
    else:
        assert made.zero_point is not None
        assert made.zero_point.flatten().tolist() == zeros
    # The most negative value of a symmetric group is a tie by construction (-absmax / scale = 1/2 - limit), which
    # float32 and float64 may break differently: so the errors are compared, not the values.
    dense = weight.double()
    errors = (rebuild(made, group_size) - dense).abs(), (expected - dense).abs()
    torch.testing.assert_close(*errors, rtol=1e-6, atol=1e-6)
    assert int((rebuild(made, group_size) - expected).abs().gt(1e-6).sum()) <= len(scales)


def test_by_hand() -> None:
    # absmax 7.5 gives scale 1 at 4 bits; halves go to the even neighbour, 7.5 is clamped to 7.
    weight = torch.tensor([[7.5, 0.5, 1.5, -0.5, 2.5, -7.5, -3.4, 0.0]])
    made = quantize(weight, weight_args(4, "channel", True))
    assert made.scale.tolist() == [[1.0]]
    assert made.codes.tolist() == [[7, 0, 2, 0, 2, -8, -3, 0]]
    # 0 … 15 gives scale 1 and the lowest code for zero.
    made = quantize(torch.arange(16.0).view(1, 16), weight_args(4, "channel", False))
    assert (made.scale.tolist(), made.zero_point.tolist()) == ([[1.0]], [[-8]])
    assert made.codes.tolist() == [list(range(-8, 8))]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scale_is_the_one_used(dtype: torch.dtype, group_size: int | str, symmetric: bool) -> None:
    """Codes are the nearest for the scale as stored, so its own rounding costs nothing inside the range."""
    weight = normal(6, 16, dtype=dtype)
    made = quantize(weight, weight_args(4, group_size, symmetric))
    assert made.scale.dtype == dtype
    assert_nearest(weight, made, 4, group_size)


def assert_nearest(weight: Tensor, made: Quantized, bits: int, group_size: int | str) -> None:
    """Inside the range the error is at most half a step.

    One float32 ulp of `weight / scale` (at most 2^bits, so 2^(bits - 24)) may move a value across a tie.
    """
    limit = 2 ** (bits - 1)
    inside = (made.codes > -limit) & (made.codes < limit - 1)
    width = weight.shape[-1] if isinstance(group_size, str) else group_size
    scale = made.scale.double().reshape(*made.scale.shape[:-1], -1, 1)
    step = scale.expand(*weight.shape[:-1], weight.shape[-1] // width, width).flatten(-2)
    error = (weight.double() - rebuild(made, group_size)).abs()
    assert bool((error <= step * (0.5 + 2.0 ** (bits - 23)))[inside].all())
    # At the ends of the range symmetric rounding clamps by at most half a step more.
    assert bool((error <= step * (1 + limit * torch.finfo(made.scale.dtype).eps)).all())


weights = st.builds(
    lambda rows, groups, width, seed, exponent, offset: (
        (normal(rows, groups * width, seed=seed) + offset) * 10.0**exponent,
        width,
    ),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 2, 4, 8, 16]),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-20, 20),
    offset=st.sampled_from([0.0, 0.0, 1.0, -3.0]),
)
grids = st.sampled_from(["group", "channel", "tensor"])


@settings(max_examples=80, deadline=None)
@given(weights, st.integers(2, 8), grids, st.booleans())
def test_error_is_at_most_half_a_step(made: tuple[Tensor, int], bits: int, grid: str, symmetric: bool) -> None:
    weight, width = made
    group_size: int | str = width if grid == "group" else grid
    assert_nearest(weight, quantize(weight, weight_args(bits, group_size, symmetric)), bits, group_size)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(2, 8), grids, st.booleans())
def test_monotone(made: tuple[Tensor, int], bits: int, grid: str, symmetric: bool) -> None:
    """Within a group, a larger value never gets a smaller code."""
    weight, width = made
    group_size: int | str = width if grid == "group" else grid
    codes = quantize(weight, weight_args(bits, group_size, symmetric)).codes
    for cells in spans(tuple(weight.shape), group_size):
        ordered = sorted(cells, key=lambda cell: float(weight[cell]))
        found = [int(codes[cell]) for cell in ordered]
        assert found == sorted(found)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([4, "channel", "tensor"]),
    st.booleans(),
    st.integers(0, 9999),
    st.integers(-8, 8),
)
def test_idempotent(bits: int, group_size: int | str, symmetric: bool, seed: int, exponent: int) -> None:
    """Quantizing the dequantized weight gives the same values again.

    Conditions: every group reaches both ends of its code range, so that the grid has the same extent again, and
    (symmetric) the grid's half step 2^bits / (2^bits - 1) is taken out by reusing its codes: a weight already on a
    symmetric grid whose lowest code is used has absmax = limit · scale, and so the new scale is
    scale · limit / (limit - 0.5). Codes then shrink by at most half a step: equal after rounding up to the bound
    code · 0.5 / limit <= 0.5. Asymmetric grids reproduce exactly.
    """
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator) * 2.0**exponent
    weight[:, 0::4], weight[:, 1::4] = -3 * 2.0**exponent, 3 * 2.0**exponent
    first = quantize(weight, weight_args(bits, group_size, symmetric))
    rebuilt = rebuild(first, group_size).float()
    second = quantize(rebuilt, weight_args(bits, group_size, symmetric))
    difference = (first.codes.int() - second.codes.int()).abs()
    if not symmetric:
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.zero_point, second.zero_point)
        return
    assert int(difference.max()) <= 1
    assert bool((difference[first.codes.abs() < limit / 2] == 0).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 9999), st.integers(-6, 6))
def test_exact_on_its_own_grid(bits: int, seed: int, exponent: int) -> None:
    """Integers times a power of two with absmax ± (limit - 0.5) lie on the symmetric grid: no error at all."""
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-limit + 1, limit, (4, 16), generator=generator).float() * 2.0**exponent
    weight[:, 0] = (limit - 0.5) * 2.0**exponent
    made = quantize(weight, weight_args(bits, "channel", True))
    assert torch.equal(made.scale, torch.full((4, 1), 2.0**exponent))
    assert torch.equal(rebuild(made, "channel").float()[:, 1:], weight[:, 1:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zero(dtype: torch.dtype, group_size: int | str, symmetric: bool) -> None:
    weight = normal(4, 16, dtype=dtype)
    weight[1] = 0
    weight[2, :8] = 0
    for value in (weight, torch.zeros_like(weight)):
        made = quantize(value, weight_args(4, group_size, symmetric))
        assert bool((made.scale > 0).all())
        assert bool(made.scale.isfinite().all())
        rebuilt = rebuild(made, group_size)
        assert bool((rebuilt[value == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("constant", [1.0, -1.0, 1e-6, -3e4, 1e-30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_weight(bits: int, constant: float, symmetric: bool) -> None:
    made = quantize(torch.full((3, 8), constant), weight_args(bits, 8, symmetric))
    assert len(made.codes.unique()) == 1
    relative = ((rebuild(made, 8) - constant) / constant).abs().max()
    # The top code of a symmetric grid is half a step short of absmax; zero is on an asymmetric grid, as is the end.
    assert relative <= (0.5 / (2 ** (bits - 1) - 0.5) if symmetric else 0.0) + 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", ["tiny", "max"])
def test_extreme_magnitudes_stay_finite(magnitude: str, dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.linspace(-1, 1, 32).view(2, 16).to(dtype) * getattr(torch.finfo(dtype), magnitude)
    assert bool(weight.isfinite().all())
    made = quantize(weight, weight_args(4, 8, symmetric))
    rebuilt = rebuild(made, 8)
    assert bool(rebuilt.isfinite().all())
    assert float((rebuilt - weight.double()).abs().max()) <= float(weight.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_range_beyond_float32_is_refused(dtype: torch.dtype) -> None:
    """From -max to max: the difference of the two overflows float32."""
    weight = torch.linspace(-1, 1, 16).view(1, 16).to(dtype) * torch.finfo(dtype).max
    (row,) = plan(_linear(weight), _config("channel", symmetric=False)).quantized
    with pytest.raises(WeightValueError, match=f"range of 0 is too wide for {dtype}") as caught:
        pack_weight(row, weight, "rtn")
    assert 'skip=["0"]' in caught.value.fix


def test_range_of_float16_fits_float32() -> None:
    """From -max to max: the difference of the two overflows float16 only, the scale does not."""
    weight = torch.linspace(-1, 1, 16).view(1, 16).half() * torch.finfo(torch.float16).max
    made = quantize(weight, weight_args(4, "channel", False))
    assert bool(made.scale.isfinite().all())
    assert len(made.codes.unique()) > 2


@pytest.mark.parametrize("exponent", [-30, -20, 0, 20, 30])
def test_noise_does_not_depend_on_the_magnitude(exponent: int) -> None:
    """Squares of 1e30 overflow float32 and those of 1e-30 vanish; the ratio is neither nan nor "exact"."""
    weight = normal(4, 64)
    (row,) = plan(_linear(weight), _config("channel")).quantized
    _, expected = pack_weight(row, weight, "rtn")
    _, seen = pack_weight(row, weight * 10.0**exponent, "rtn")
    assert expected is not None
    assert seen == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("value", "words"), [(math.nan, "1 NaN and 0 infinite"), (-math.inf, "0 NaN and 1 infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_refused(value: float, words: str, dtype: torch.dtype) -> None:
    weight = normal(4, 16, dtype=dtype)
    check_values("layer", weight)
    weight[2, 3] = value
    with pytest.raises(WeightValueError, match=f"layer holds {words} values of 64") as caught:
        check_values("layer", weight)
    assert 'skip=["layer"]' in caught.value.fix


def test_empty_weights_are_refused() -> None:
    with pytest.raises(WeightValueError, match=r"layer has no values \(shape \(0, 4\)\)"):
        check_values("layer", torch.zeros(0, 4))


def test_a_broken_weight_leaves_the_model_as_it_was() -> None:
    from hf_compress.methods.rtn import RTNQuantConfig

    model, untouched = tiny("llama"), tiny("llama")
    for one in (model, untouched):
        one.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(WeightValueError, match=r"model.layers.1.mlp.down_proj holds 1 NaN"):
        quantize_model(model, RTNQuantConfig())
    assert list(model.state_dict()) == list(untouched.state_dict())
    for key, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[key].nan_to_num(), value.nan_to_num())


@pytest.mark.parametrize("group_size", [64, "channel", "tensor"])
def test_chunks_do_not_change_the_result(group_size: int | str) -> None:
    columns = 1024
    rows = CHUNK // columns + 37
    weight = normal(rows, columns)
    args = weight_args(4, group_size, False)
    whole = quantize(weight, args)
    if group_size == "tensor":
        grid = quantize(torch.stack([weight.amin(), weight.amax()]).view(1, 2), args)
        assert torch.equal(whole.scale, grid.scale)
        assert torch.equal(whole.zero_point, grid.zero_point)
        codes = (weight / whole.scale + whole.zero_point).round().clamp(-8, 7).to(torch.int8)
        assert torch.equal(whole.codes, codes)
        return
    parts = [quantize(part, args) for part in weight.split(100)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
    assert torch.equal(whole.zero_point, torch.cat([part.zero_point for part in parts]))


def test_rows_longer_than_a_chunk() -> None:
    weight = normal(2, CHUNK + 8)
    made = quantize(weight, weight_args(8, "channel", True))
    assert torch.equal(made.codes[1], quantize(weight[1:], weight_args(8, "channel", True)).codes[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, "channel"])
def test_experts_are_quantized_one_by_one(group_size: int | str, symmetric: bool) -> None:
    weight = normal(3, 5, 16)
    args = weight_args(4, group_size, symmetric)
    whole = quantize(weight, args)
    for expert in range(3):
        one = quantize(weight[expert], args)
        assert torch.equal(whole.codes[expert], one.codes)
        assert torch.equal(whole.scale[expert], one.scale)
        assert symmetric or torch.equal(whole.zero_point[expert], one.zero_point)


@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_same_input_same_bytes_and_input_unchanged(group_size: int | str) -> None:
    weight, args = normal(6, 16), weight_args(3, group_size, False)
    before = weight.clone()
    first, second = quantize(weight, args), quantize(weight.t().contiguous().t(), args)
    assert torch.equal(weight, before)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.zero_point, second.zero_point)


@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_noise_is_that_of_float64(group_size: int | str) -> None:
    packed = packed_of((6, 16), 4, group_size, symmetric=False)
    weight = dequantize(packed) + 0.01 * normal(6, 16)
    expected = 10 * torch.log10(
        weight.double().square().sum() / (weight.double() - dequantize(packed).double()).square().sum()
    )
    assert sqnr_db(weight, packed) == pytest.approx(float(expected), rel=1e-6)
    assert sqnr_db(dequantize(packed), packed) is None


def test_noise_over_chunks() -> None:
    weight = normal(CHUNK // 512 + 5, 512)
    for group_size in (64, "tensor"):
        (row,) = plan(_linear(weight), _config(group_size)).quantized
        packed, noise = pack_weight(row, weight, "rtn")
        error = (weight.double() - dequantize(packed).double()).square().sum()
        assert noise == pytest.approx(10 * math.log10(float(weight.double().square().sum() / error)), rel=1e-6)


def _linear(weight: Tensor) -> torch.nn.Module:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return torch.nn.Sequential(module)


def _config(group_size: int | str, *, symmetric: bool = True) -> object:
    from hf_compress.methods.rtn import RTNQuantConfig

    return RTNQuantConfig(group_size=group_size, symmetric=symmetric)


def test_scheme_of_fields() -> None:
    made = scheme(RTNFields(bits=3, group_size=32, symmetric=False), None)  # type: ignore[arg-type]
    assert made.weights == weight_args(3, 32, False)
    with pytest.raises(ConfigError, match="CastFields has no bits"):
        scheme(CastFields(), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="RTNFields has no dtype"):
        cast_scheme(RTNFields(), None)  # type: ignore[arg-type]
