"""What holds for all methods that quantize weights, on any weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_compress as hfc
from hf_compress.core import scheme as schemes
from hf_compress.core.errors import WeightValueError
from hf_compress.core.registry import METHODS, Quantized
from hf_compress.core.scheme import weight_args
from hf_compress.methods.codebook.method import nearest
from hf_compress.methods.codebook.method import quantize as to_codebook
from hf_compress.methods.hqq.method import quantize as half_quadratic
from hf_compress.methods.rtn.method import quantize as round_to_nearest
from hf_compress.modules.packed import Layout, dequantize, pack
from tests._utils.tiny import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIFORM = {"rtn": round_to_nearest, "hqq": half_quadratic}
FIXED = ("nf4", "fp4", "log")


def quantized(weight: Tensor, given: schemes.Scheme, method: str) -> tuple[Quantized, Tensor]:
    """The result of a method, and the values that a model computes with."""
    run = METHODS.get(method).quantize
    assert run is not None
    made = run(weight, given)
    return made, dequantize(pack(made, Layout(tuple(weight.shape), given, transposed=False)))


def steps(made: Quantized, shape: torch.Size) -> Tensor:
    """Each value's scale, float64."""
    if made.scale.numel() == 1:
        return made.scale.double().view(1, 1).expand(shape)
    return made.scale.double().repeat_interleave(shape[-1] // made.scale.shape[-1], -1)


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


weights = st.builds(
    lambda rows, groups, seed, exponent, offset, dtype: (
        (normal(rows, groups * 16, seed) + offset) * 10.0**exponent
    ).to(dtype),
    rows=st.integers(2, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-3, 3),
    offset=st.sampled_from([0.0, 0.0, 1.0, -3.0]),
    dtype=st.sampled_from(DTYPES),
)
group_sizes = st.sampled_from([16, "channel", "tensor"])
uniform = st.builds(
    lambda bits, size, symmetric: schemes.scheme(weight_args(bits, size, symmetric)),
    st.integers(2, 8),
    group_sizes,
    st.booleans(),
)
tables = st.builds(
    lambda kind, bits, size: schemes.scheme(
        weight_args(bits if kind in ("log", "kmeans") else 4, size, True), codebook=kind
    ),
    st.sampled_from([*FIXED, "kmeans"]),
    st.integers(2, 4),
    group_sizes,
)
with_methods = st.one_of(
    st.tuples(st.just("rtn"), uniform), st.tuples(st.just("hqq"), uniform), st.tuples(st.just("codebook"), tables)
)


@settings(max_examples=150, deadline=None)
@given(weights, with_methods)
def test_monotone(weight: Tensor, way: tuple[str, schemes.Scheme]) -> None:
    """Within a group, a larger weight never becomes a smaller value."""
    method, given = way
    _, values = quantized(weight, given, method)
    args = given.weights
    width = {"group": args.group_size, "channel": weight.shape[1], "tensor": weight.numel()}[args.strategy]
    for before, after in zip(weight.view(-1, width), values.view(-1, width), strict=True):
        order = before.float().argsort()
        assert bool((after[order].float().diff() >= 0).all())


@settings(max_examples=100, deadline=None)
@given(weights, uniform, st.sampled_from(["rtn", "hqq"]))
def test_uniform_error_is_at_most_half_a_step_inside_the_range(
    weight: Tensor, given: schemes.Scheme, method: str
) -> None:
    """A float32 ulp of `weight / scale` (at most 2^bits) may move a value across a tie."""
    made, _ = quantized(weight, given, method)
    bits = given.weights.num_bits
    limit, scale = 2 ** (bits - 1), steps(made, weight.shape)
    zero = 0 if made.zero_point is None else steps(Quantized(made.codes, made.zero_point, None), weight.shape)
    error = (weight.double() - (made.codes.double() - zero) * scale).abs()
    inside = (made.codes > -limit) & (made.codes < limit - 1)
    assert bool((error <= scale * (0.5 + 2.0 ** (bits - 22)))[inside].all())


@settings(max_examples=100, deadline=None)
@given(weights, tables)
def test_codebook_error_is_at_most_half_a_gap(weight: Tensor, given: schemes.Scheme) -> None:
    """Half the widest gap of neighbours in the table, times the scale; beyond its ends, what is missing to ± 1."""
    made, _ = quantized(weight, given, "codebook")
    table = made.codebook.double().sort().values
    widest = max(float(table.diff().max()) / 2, float(1 - table[-1]), float(1 + table[0]))
    values = made.codebook.double()[made.codes.long() + len(table) // 2]
    scale = steps(made, weight.shape)
    assert bool(((weight.double() - values * scale).abs() <= scale * (widest + 1e-6)).all())


@settings(max_examples=100, deadline=None)
@given(weights, st.sampled_from(FIXED), st.integers(2, 8), group_sizes)
def test_fixed_tables_are_idempotent(weight: Tensor, kind: schemes.Codebook, bits: int, size: int | str) -> None:
    """Quantizing the values again changes nothing: ± 1 are in the table, so every group keeps its scale."""
    given = schemes.scheme(weight_args(bits if kind == "log" else 4, size, True), codebook=kind)
    first, values = quantized(weight, given, "codebook")
    second, again = quantized(values, given, "codebook")
    assert torch.equal(values, again)
    assert torch.equal(first.scale, second.scale)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(2, 4), group_sizes)
def test_a_learned_table_is_a_projection(weight: Tensor, bits: int, size: int | str) -> None:
    """Values in the table keep their codes.

    Learning again is not idempotent: ± 1 are not in the table, so groups shrink, each by the value its largest weight
    went to, and the values are no longer those of one table.
    """
    made = to_codebook(weight, weight_args(bits, size, True), "kmeans")
    assert torch.equal(nearest(made.codebook[made.codes.long() + 2 ** (bits - 1)], made.codebook), made.codes)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(3, 8), st.booleans())
def test_quantizing_twice_with_hqq(weight: Tensor, bits: int, symmetric: bool) -> None:
    """Values on a grid stay nearer to themselves than with round to nearest.

    Neither method is idempotent when symmetric: the grid of round to nearest has no value at its own absolute maximum
    (see test_rtn), and a fitted one does not look for the grid that values came from, only for a small loss.
    """
    given = schemes.scheme(weight_args(bits, 16, symmetric))
    _, values = quantized(weight.float(), given, "hqq")
    errors = [(quantized(values, given, method)[1] - values).double().abs().pow(3).sum() for method in UNIFORM]
    rounding = 1e-15 * values.double().abs().pow(3).sum()  # values 1e-5 off, as float32 gives
    assert float(errors[1]) <= float(errors[0]) * (1 + 1e-3) + float(rounding)


CONFIGS = [
    hfc.RTNQuantConfig(group_size=16),
    hfc.HQQQuantConfig(group_size=16),
    hfc.HQQQuantConfig(group_size=16, symmetric=False, format="guarded"),
    *(hfc.CodebookQuantConfig(codebook=kind, group_size=16, format="guarded") for kind in (*FIXED, "kmeans")),
    hfc.CodebookQuantConfig(codebook="kmeans", bits=3, group_size="tensor", embeddings="int8", format="guarded"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(value: float, config: hfc.QuantConfig) -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(WeightValueError, match=r"\[HFC402\] model.layers.0.mlp.up_proj holds") as caught:
        hfc.quantize(model, config)
    assert 'skip=["model.layers.0.mlp.up_proj"]' in caught.value.fix


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_model_computes_with_the_quantized_values(config: hfc.QuantConfig) -> None:
    """In place and packed: the logits are those of the dense model with the method's values in it."""
    model, dense = tiny("llama", num_hidden_layers=1), tiny("llama", num_hidden_layers=1)
    tokens = torch.arange(2, 18).view(2, 8)
    before = dense(input_ids=tokens).logits
    plan = hfc.plan(model, config)
    for row in plan.quantized:
        parameter = dense.get_submodule(row.module).get_parameter(row.parameter)
        parameter.data = quantized(parameter.data, row.quantization, config.method)[1]
    expected = dense(input_ids=tokens).logits
    seen = hfc.quantize(model, config)(input_ids=tokens).logits
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(seen, before, rtol=0, atol=1e-5)
