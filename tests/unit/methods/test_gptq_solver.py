"""The GPTQ solver against the paper's algorithm, column by column in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.core.errors import CalibrationError
from hf_compress.core.scheme import weight_args
from hf_compress.methods.gptq.solver import Grids, factor, gptq, grids
from hf_compress.methods.rtn.method import quantize

ROWS, COLUMNS = 12, 64


def problem(seed: int, tokens: int = 400, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def oracle(
    weight: Tensor, gram: Tensor, grid: Grids, bits: int, group: int, damping: float, act_order: bool
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2210.17323 without blocks: inverse Hessian, its upper Cholesky factor, errors pushed on.

    Returns:
        Codes, and how far each was from the next rounding boundary, in steps.
    """
    hessian = gram.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(gram))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    values, limit = weight.double()[:, order].clone(), 2 ** (bits - 1)
    codes, margin = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(weight.shape, dtype=torch.float64)
    for step, column in enumerate(order.tolist()):
        scale = grid.scale.double().expand(len(weight), -1)[:, column // group]
        zero = 0.0 if grid.zero_point is None else grid.zero_point.expand(len(weight), -1)[:, column // group].double()
        exact = values[:, step] / scale + zero
        code = exact.round().clamp(-limit, limit - 1)
        codes[:, column] = code.to(torch.int8)
        margin[:, column] = (exact - exact.floor() - 0.5).abs()
        error = (values[:, step] - (code - zero) * scale) / upper[step, step]
        values[:, step:] -= error[:, None] * upper[step, step:]
    return codes, margin


def dense(codes: Tensor, grid: Grids, group: int) -> Tensor:
    """Dequantized values, float64."""
    shift = 0.0 if grid.zero_point is None else grid.zero_point.double().unsqueeze(-1)
    return ((codes.double().unflatten(-1, (-1, group)) - shift) * grid.scale.double().unsqueeze(-1)).flatten(-2)


def loss(weight: Tensor, restored: Tensor, gram: Tensor) -> float:
    """What GPTQ minimises: tr((W - Q) H (W - Q)ᵀ)."""
    error = weight.double() - restored.double()
    return float(((error @ gram.double()) * error).sum())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 8),
    group=st.sampled_from([8, 16, 64]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    block=st.sampled_from([1, 7, 16, 48, 128]),
)
def test_codes_are_the_papers(seed, bits, group, symmetric, act_order, block):
    weight, gram = problem(seed)
    factored = factor(gram, 0.01, act_order, "w")
    made = gptq(weight, factored, weight_args(bits, group, symmetric), block)
    grid = Grids(made.scale, made.zero_point)
    codes, margin = oracle(weight, gram, grid, bits, group, 0.01, act_order)
    # float32 rounds each of 64 terms of up to 2^7 steps by 2^-24 at most: values closer than 5e-4 steps to a boundary
    # may fall on its other side, and change what comes after them in their row. That is about one row in twelve.
    safe = (margin > 5e-4).all(1)
    assert torch.equal(made.codes[safe], codes[safe])
    assert safe.sum() >= ROWS // 3


@pytest.mark.parametrize("group", [16, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_closer_than_rounded_ones(bits, symmetric, group):
    weight, gram = problem(3)
    args = weight_args(bits, group, symmetric)
    made, nearest = gptq(weight, factor(gram, 0.01, True, "w"), args), quantize(weight, args)
    span = COLUMNS if isinstance(group, str) else group
    ours, theirs = (
        loss(
            weight,
            dense(one.codes, Grids(one.scale.view(-1, 1) if one.scale.ndim == 1 else one.scale, _zero(one)), span),
            gram,
        )
        for one in (made, nearest)
    )
    assert ours < 0.75 * theirs
    limit = 2 ** (bits - 1)
    assert made.codes.min() >= -limit
    assert int(made.codes.max()) < limit
    assert made.scale.dtype == weight.dtype
    assert (made.zero_point is None) == symmetric


def _zero(one):
    return (
        None if one.zero_point is None else one.zero_point.view(-1, 1) if one.zero_point.ndim == 1 else one.zero_point
    )


def test_searched_grids_cost_less_than_whole_ranges():
    weight, gram = problem(5)
    args, factored = weight_args(3, 16, True), factor(gram, 0.01, True, "w")
    whole, searched = (grids(weight, factored.cost, args, fractions) for fractions in ((1.0,), (1.0, 0.9, 0.8)))

    def cost(grid):
        steps = weight.unflatten(-1, (-1, 16)) / grid.scale.unsqueeze(-1)
        error = (steps - steps.round().clamp(-4, 3)) * grid.scale.unsqueeze(-1)
        return (error.square() * factored.cost.view(-1, 16)).sum(-1)

    assert (cost(searched) <= cost(whole) * (1 + 1e-6)).all()
    assert (cost(searched) < cost(whole)).float().mean() > 0.5


def test_cost_is_what_an_error_adds():
    """With T and the costs, tr(E H Eᵀ) is Σ_j M_jj² (e_j + Σ_{k<j} e_k T_kj)²."""
    _, gram = problem(7)
    factored = factor(gram, 0.02, True, "w")
    error = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1)).double()
    pulled = error[:, factored.order] @ factored.pull.double()
    hessian = gram.double().clone()
    hessian.diagonal().add_(0.02 * hessian.diagonal().mean())
    expected = ((error @ hessian) * error).sum(1)
    torch.testing.assert_close((pulled.square() * factored.cost[factored.order]).sum(1), expected, rtol=1e-4, atol=0)


def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing():
    weight, gram = problem(9)
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[::16] = True
    gram[dead] = 0
    gram[:, dead] = 0
    args = weight_args(4, 16, True)
    made = gptq(weight, factor(gram, 0.01, True, "w"), args)
    steps = weight.unflatten(-1, (-1, 16)) / made.scale.unsqueeze(-1)
    nearest = steps.round().clamp(-8, 7).flatten(-2)
    assert torch.equal(made.codes[:, dead].float(), nearest[:, dead])
    changed = weight.clone()
    changed[:, dead] *= 0.5
    again = gptq(changed, factor(gram, 0.01, True, "w"), args, given=Grids(made.scale, None))
    assert torch.equal(again.codes[:, ~dead], made.codes[:, ~dead])


@pytest.mark.parametrize("group", [16, "channel", "tensor"])
def test_the_unit_of_inputs_does_not_matter(group):
    """Not where columns are dead either, whose errors cost nothing. A power of two is exact in floating point."""
    weight, gram = problem(9)
    gram[::8] = 0
    gram[:, ::8] = 0
    args = weight_args(3, group, True)
    made = [gptq(weight, factor(gram * 4.0**power, 0.01, True, "w"), args) for power in (0, 7, -10)]
    for other in made[1:]:
        assert torch.equal(other.scale, made[0].scale)
        assert torch.equal(other.codes, made[0].codes)


def test_nothing_known_at_all_is_rounding():
    weight, _ = problem(11)
    args = weight_args(4, 16, False)
    nearest = quantize(weight, args)
    given_ = Grids(nearest.scale, nearest.zero_point)
    made = gptq(weight, factor(torch.zeros(COLUMNS, COLUMNS), 0.01, True, "w"), args, given=given_)
    assert torch.equal(made.codes, nearest.codes)


def test_too_few_tokens_are_damped():
    weight, gram = problem(13, tokens=5)
    factored = factor(gram, 0.01, True, "w")
    assert factored.damping == 0.01
    assert loss(weight, dense_of(weight, factored), gram) < loss(weight, dense_rtn(weight), gram)


def dense_of(weight, factored):
    made = gptq(weight, factored, weight_args(4, 16, True))
    return dense(made.codes, Grids(made.scale, None), 16)


def dense_rtn(weight):
    made = quantize(weight, weight_args(4, 16, True))
    return dense(made.codes, Grids(made.scale, None), 16)


def test_a_matrix_that_is_no_gram_climbs_the_ladder_and_then_raises():
    """A negative eigenvalue of 3 % of the mean diagonal is cured by damping, one that outweighs them by none."""
    vectors = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()).Q
    values = torch.ones(8).double()
    values[0] = -0.03
    assert factor((vectors * values) @ vectors.T, 0.01, False, "w").damping == pytest.approx(0.1)
    values[0] = -2000.0
    values[1:] = 500.0
    with pytest.raises(CalibrationError, match=r"layer\.q.*damping=.*Fix: .*damping.*skip=\[\"layer\.q\"\]"):
        factor((vectors * values) @ vectors.T, 0.01, False, "layer.q")


def test_half_precision_scales_are_those_used():
    weight, gram = problem(15)
    args = weight_args(4, 16, True).model_copy(update={"scale_dtype": torch.float16})
    made = gptq(weight, factor(gram, 0.01, True, "w"), args)
    assert torch.equal(made.scale, made.scale.half().float())
    low = gptq(weight.bfloat16(), factor(gram, 0.01, True, "w"), weight_args(4, 16, True))
    assert low.scale.dtype == torch.bfloat16


def test_rows_do_not_depend_on_each_other():
    weight, gram = problem(17)
    args, factored = weight_args(4, 16, True), factor(gram, 0.01, True, "w")
    whole, alone = gptq(weight, factored, args), gptq(weight[4:6], factored, args)
    assert torch.equal(whole.codes[4:6], alone.codes)
    assert torch.equal(whole.scale[4:6], alone.scale)
