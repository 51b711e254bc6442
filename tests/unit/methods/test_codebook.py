from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import hf_compress as hfc
from hf_compress.core import scheme as schemes
from hf_compress.core.errors import ConfigError, WeightValueError
from hf_compress.core.registry import Quantized
from hf_compress.core.scheme import groups, weight_args
from hf_compress.methods.codebook.config import CodebookFields
from hf_compress.methods.codebook.kmeans import Histogram, histogram, improved, learn, start
from hf_compress.methods.codebook.method import nearest, quantize, quantize_scheme, scheme
from hf_compress.methods.codebook.tables import fixed_table, powers_of_two
from hf_compress.methods.rtn.method import CHUNK
from hf_compress.methods.rtn.method import quantize as round_to_nearest
from hf_compress.modules.packed import Layout, dequantize, pack
from tests._utils.tiny import tiny

KINDS = ["nf4", "fp4", "log", "kmeans"]
GROUPS = [8, "channel", "tensor"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(values: Tensor, made: Quantized) -> tuple[Tensor, Tensor]:
    """Values in float64, … × groups × values, and the scales beside them."""
    if made.scale.numel() == 1:
        return values.double().reshape(1, -1), made.scale.double().reshape(1, 1)
    return values.double().unflatten(-1, (made.scale.shape[-1], -1)), made.scale.double().unsqueeze(-1)


def rebuild(made: Quantized) -> Tensor:
    """Dequantized in float64, without the package."""
    assert made.codebook is not None
    values = made.codebook.double()[made.codes.long() + len(made.codebook) // 2]
    cells, scale = grouped(values, made)
    return (cells * scale).reshape(made.codes.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_are_those_of_bitsandbytes(kind: schemes.Codebook) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    table = fixed_table(kind, 4)
    assert torch.equal(table, functional.get_4bit_type(kind, device="cpu"))
    assert not bool(torch.signbit(table[table == 0]).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(kind: schemes.Codebook, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(16, 256, dtype=dtype)
    made = quantize(weight, weight_args(4, 64, True), kind)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    assert torch.equal(made.scale.float().flatten(), state.absmax)
    layout = Layout((16, 256), schemes.scheme(weight_args(4, 64, True), codebook=kind), transposed=False)
    theirs = functional.dequantize_4bit(packed, state)
    # They multiply by the reciprocal, we divide: a value between two may go to the other one.
    different = dequantize(pack(made, layout)) != theirs
    assert int(different.sum()) <= 4
    table = torch.sort(made.codebook).values
    between = (weight.float() / made.scale.float().repeat_interleave(64, 1))[different]
    middles = (table[1:] + table[:-1]) / 2
    assert all(float((middles - value).abs().min()) < 1e-6 for value in between)


def test_powers_of_two() -> None:
    expected = [-1, -1 / 2, -1 / 4, 0, 1 / 8, 1 / 4, 1 / 2, 1]
    assert powers_of_two(3).tolist() == expected
    assert powers_of_two(4).tolist()[6:9] == [-1 / 64, 0, 1 / 128]
    for bits in range(2, 9):
        table = powers_of_two(bits)
        assert len(table.unique()) == 2**bits
        assert torch.equal(table, table.sort().values)
        nonzero = table[table != 0].double()
        assert torch.equal(nonzero.abs().log2(), nonzero.abs().log2().round())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_of_the_table(dtype: torch.dtype, group_size: int | str, kind: schemes.Codebook) -> None:
    """Against a search through the whole table in float64, value by value, with the scale as stored."""
    weight = normal(5, 24, dtype=dtype)
    made = quantize(weight, weight_args(4, group_size, True), kind)
    assert made.codebook is not None
    assert (made.codes.dtype, made.scale.dtype, made.codebook.dtype) == (torch.int8, dtype, torch.float32)
    assert made.scale.shape == groups((5, 24), weight_args(4, group_size, True))
    assert made.zero_point is None
    table = made.codebook.double().tolist()
    cells, scale = grouped(weight, made)
    expected = cells.clone().flatten(0, -2)
    for row, (values, largest) in enumerate(zip(expected.tolist(), scale.flatten().tolist(), strict=True)):
        assert largest == max(abs(value) for value in values)
        errors = [min(abs(value - entry * largest) for entry in table) for value in values]
        expected[row] = torch.tensor(errors, dtype=torch.float64)
    error = (rebuild(made) - weight.double()).abs()
    torch.testing.assert_close(error.flatten(), expected.flatten(), rtol=1e-5, atol=1e-7)


def test_nearest_by_hand() -> None:
    table = torch.tensor([0.5, -1.0, 1.0, -1.0])
    values = torch.tensor([-2.0, -1.0, -0.25, -0.24, 0.75, 0.76, 3.0])
    # Between two as near, the smaller one; of two equal ones, the first.
    assert nearest(values, table).tolist() == [-1, -1, -1, -2, -2, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros(dtype: torch.dtype, kind: schemes.Codebook) -> None:
    weight = normal(4, 32, dtype=dtype)
    weight[1], weight[2, :8] = 0, 0
    made = quantize(weight, weight_args(4, 8, True), kind)
    assert bool(made.scale.isfinite().all())
    assert bool((rebuild(made)[weight == 0] == 0).all())
    zeros = (weight.unflatten(-1, (-1, 8)) == 0).all(-1)
    assert torch.equal(made.scale == 0, zeros if kind == "kmeans" else torch.zeros_like(zeros))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "log"])
@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 1e-6, -3e4, 1e-30])
def test_constant_weight_is_exact(constant: float, kind: schemes.Codebook) -> None:
    made = quantize(torch.full((3, 8), constant), weight_args(4, 8, True), kind)
    assert torch.equal(rebuild(made).float(), torch.full((3, 8), constant))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", ["tiny", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes_stay_finite(dtype: torch.dtype, magnitude: str, kind: schemes.Codebook) -> None:
    weight = torch.linspace(-1, 1, 64).view(4, 16).to(dtype) * getattr(torch.finfo(dtype), magnitude)
    made = quantize(weight, weight_args(4, 8, True), kind)
    assert bool(rebuild(made).isfinite().all())
    assert float((rebuild(made) - weight.double()).abs().max()) <= float(weight.double().abs().max())


def test_scales_of_a_narrower_type() -> None:
    """The scale is rounded to float16 first, and codes are the nearest ones for it."""
    weight = normal(8, 64) + 0.1
    args = schemes.with_half_scales(schemes.scheme(weight_args(4, 16, True))).weights
    made = quantize(weight, args, "nf4")
    assert made.scale.dtype == torch.float32
    assert torch.equal(made.scale, made.scale.half().float())
    assert not torch.equal(made.scale, quantize(weight, weight_args(4, 16, True), "nf4").scale)
    cells, scale = grouped(weight, made)
    distances = (cells.unsqueeze(-1) - made.codebook.double() * scale.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((rebuild(made) - weight.double()).abs(), distances.reshape(weight.shape), atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [64, "channel", "tensor"])
def test_blocks_do_not_change_the_result(group_size: int | str, kind: schemes.Codebook) -> None:
    """Codes and scales against the whole weight at once."""
    weight = normal(CHUNK // 1024 + 37, 1024)
    made = quantize(weight, weight_args(4, group_size, True), kind)
    assert made.codebook is not None
    width = weight.numel() if group_size == "tensor" else 1024 if group_size == "channel" else 64
    cells = weight.view(-1, width)
    scale = cells.abs().amax(-1, keepdim=True)
    assert torch.equal(made.scale.flatten(), scale.flatten())
    assert torch.equal(made.codes, nearest(cells / scale, made.codebook).view(weight.shape))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "log"])
@pytest.mark.parametrize("group_size", [8, "channel"])
def test_experts_are_quantized_one_by_one(group_size: int | str, kind: schemes.Codebook) -> None:
    weight = normal(3, 5, 16)
    whole = quantize(weight, weight_args(4, group_size, True), kind)
    for expert in range(3):
        one = quantize(weight[expert], weight_args(4, group_size, True), kind)
        assert torch.equal(whole.codes[expert], one.codes)
        assert torch.equal(whole.scale[expert], one.scale)


def test_experts_share_the_learned_table() -> None:
    weight = normal(3, 5, 16)
    whole, flat = (quantize(value, weight_args(3, 8, True), "kmeans") for value in (weight, weight.view(15, 16)))
    assert torch.equal(whole.codebook, flat.codebook)
    assert torch.equal(whole.codes.view(15, 16), flat.codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_same_input_same_bytes_and_input_unchanged(group_size: int | str, kind: schemes.Codebook) -> None:
    weight = normal(6, 16)
    before = weight.clone()
    first, second = (
        quantize(value, weight_args(4, group_size, True), kind) for value in (weight, weight.t().contiguous().t())
    )
    assert torch.equal(weight, before)
    for one, other in ((first.codes, second.codes), (first.scale, second.scale), (first.codebook, second.codebook)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("kmeans", 2), ("kmeans", 3), ("kmeans", 4), ("kmeans", 8)])
def test_less_error_than_uniform_on_gaussian_weights(kind: schemes.Codebook, bits: int) -> None:
    weight, args = normal(256, 512), weight_args(bits, 64, True)
    made, uniform = quantize(weight, args, kind), round_to_nearest(weight, args)
    levels = uniform.codes.double().unflatten(-1, (-1, 64)) * uniform.scale.double().unsqueeze(-1)
    theirs = (levels.flatten(-2) - weight.double()).square().mean()
    assert float((rebuild(made) - weight.double()).square().mean()) < 0.9 * float(theirs)


# K-means


def spread(*, values: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values in -1 … 1 and positive weights, both float64."""
    generator = torch.Generator().manual_seed(seed)
    points = (torch.randn(values, generator=generator) / 4).clamp(-1, 1)
    return points, torch.rand(values, dtype=torch.float64, generator=generator) + 0.1


def objective(points: Tensor, weights: Tensor, table: Tensor) -> float:
    """Σ weight · (value - nearest of the table)² in float64, value by value."""
    entries = table.tolist()
    return math.fsum(
        weight * min((point - entry) ** 2 for entry in entries)
        for point, weight in zip(points.double().tolist(), weights.tolist(), strict=True)
    )


@pytest.mark.parametrize("count", [4, 8, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_rounds_never_make_the_objective_grow(seed: int, count: int) -> None:
    points, weights = spread(seed=seed)
    found = histogram([(points[:150], weights[:150]), (points[150:], weights[150:])])
    table = start(found, count)
    losses = [objective(points, weights, table)]
    for _ in range(40):
        table = improved(found, table)
        assert torch.equal(table, table.sort().values)
        losses.append(objective(points, weights, table))
    # Values of one bin share a mean: that is worth 1e-9 of the objective here.
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_a_round_is_that_of_a_slow_loop() -> None:
    points, weights = spread()
    table = torch.linspace(-0.6, 0.6, 8, dtype=torch.float64)
    cells: list[list[tuple[float, float]]] = [[] for _ in range(8)]
    for point, weight in zip(points.double().tolist(), weights.tolist(), strict=True):
        cells[min(range(8), key=lambda cell: abs(point - float(table[cell])))].append((point, weight))
    assert all(cells)
    expected = [sum(p * w for p, w in cell) / sum(w for _, w in cell) for cell in cells]
    # A bin is 1/32768 wide and goes to one cell as a whole.
    torch.testing.assert_close(
        improved(histogram([(points, weights)]), table), torch.tensor(expected).double(), rtol=0, atol=1e-5
    )


def test_a_value_that_is_nearest_to_none_is_used_elsewhere() -> None:
    points, weights = torch.tensor([-1.0, -0.9, 0.5, 0.6, 0.9, 1.0]), torch.ones(6).double()
    found = histogram([(points, weights)])
    table = torch.tensor([-0.95, -0.2, -0.1, 0.75], dtype=torch.float64)
    better = improved(found, table)
    # One of the two idle values takes the upper half of the widest cell, the other waits for the next round.
    torch.testing.assert_close(better, torch.tensor([-0.95, -0.1, 0.75, 0.95]).double())
    assert objective(points, weights, better) < objective(points, weights, table)
    # Three pairs, one of them split: two errors of 2 · 0.05² stay.
    assert objective(points, weights, learn(found, 4)) == pytest.approx(0.01)


def test_as_many_values_as_codes_are_exact() -> None:
    points = torch.tensor([-1.0, -0.25, 0.125, 1.0])
    found = histogram([(points, torch.tensor([1.0, 1e-12, 1.0, 1e6], dtype=torch.float64))])
    torch.testing.assert_close(learn(found, 4), points.double())


def test_groups_count_with_the_square_of_their_scale() -> None:
    """With one group a thousand times as large, its values alone decide, as they do for the weight's error."""
    small, large = torch.linspace(-1, 1, 64), torch.tensor([-1.0, -0.5, 0.5, 1.0]).repeat(16)
    made = quantize(torch.stack([small, 1000 * large]), weight_args(2, 64, True), "kmeans")
    torch.testing.assert_close(made.codebook, torch.tensor([-1.0, -0.5, 0.5, 1.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_table_is_near_the_best_one(bits: int) -> None:
    """Against the optimum by dynamic programming over all values, float64."""
    points, weights = spread(values=1500)
    count = 2**bits
    best = optimum(*(part.tolist() for part in (points.double().sort().values, weights[points.sort().indices])), count)
    found = objective(points, weights, learn(histogram([(points, weights)]), count))
    assert best <= found * (1 + 1e-9)
    assert found <= 1.1 * best


def optimum(points: list[float], weights: list[float], count: int) -> float:
    """The least weighted squared error of `count` values, exactly."""
    w = torch.tensor([0.0, *weights], dtype=torch.float64).cumsum(0)
    x = torch.tensor([0.0, *(p * q for p, q in zip(points, weights, strict=True))], dtype=torch.float64).cumsum(0)
    xx = torch.tensor([0.0, *(p * p * q for p, q in zip(points, weights, strict=True))], dtype=torch.float64).cumsum(0)
    spans = w[None] - w[:, None], x[None] - x[:, None], xx[None] - xx[:, None]
    cost = torch.where(spans[0] > 0, (spans[2] - spans[1].square() / spans[0]).clamp_min(0), torch.inf)
    cost.fill_diagonal_(0)
    least = cost[0]
    for _ in range(count - 1):
        least = (least.unsqueeze(1) + cost).amin(0)
    return float(least[-1])


@pytest.mark.parametrize(
    ("weight", "bits", "words", "fix"),
    [
        (normal(1, 8), 4, "learns 16 values, but only 8 of the 8 values", "bits=3"),
        (normal(2, 3), 3, "learns 8 values, but only [56] of the 6 values", "bits=2"),
        (torch.ones(8, 64), 2, "learns 4 values, but only 1 of the 512 values", 'codebook="nf4", bits=4'),
        (torch.zeros(8, 64), 4, "learns 16 values, but only 1 of the 512 values", 'codebook="nf4", bits=4'),
    ],
)
def test_fewer_values_than_codes(weight: Tensor, bits: int, words: str, fix: str) -> None:
    with pytest.raises(WeightValueError, match=words) as caught:
        quantize(weight, weight_args(bits, "channel", True), "kmeans")
    assert caught.value.fix.startswith(fix)


def test_the_error_names_the_weight() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(0.5)
    config = hfc.CodebookQuantConfig(codebook="kmeans", group_size=16, format="guarded")
    with pytest.raises(
        WeightValueError, match=r"\[HFC402\] model.layers.0.mlp.up_proj: K-means with 4 bits"
    ) as caught:
        hfc.quantize(model, config)
    assert caught.value.fix == 'codebook="nf4", bits=4, or skip=["model.layers.0.mlp.up_proj"]'


# Configuration and scheme


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_are_refused(bits: int, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"bits={bits} is not possible with codebook='{kind}'") as caught:
        hfc.CodebookQuantConfig(codebook=kind, bits=bits)
    assert f'codebook="kmeans" for {bits} bits' in caught.value.fix


def test_other_bits_in_a_rule_are_refused() -> None:
    config = hfc.CodebookQuantConfig(group_size=16, rules=[{"pattern": "q_proj", "bits": 3}])
    with pytest.raises(ConfigError, match="bits=3 is not possible with codebook='nf4'"):
        hfc.plan(tiny("llama"), config)


@pytest.mark.parametrize("fields", [{"codebook": "nf3"}, {"codebook": None}, {"codebook": "log", "bits": 9}])
def test_impossible_fields(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{'bits' if 'bits' in fields else 'codebook'}=.* is not possible"):
        hfc.CodebookQuantConfig(**fields)


def test_there_are_no_zero_points() -> None:
    with pytest.raises(ConfigError, match="Unknown key 'symmetric'"):
        hfc.CodebookQuantConfig(symmetric=True)


def test_scheme_of_fields() -> None:
    made = scheme(CodebookFields(codebook="kmeans", bits=3, group_size=-1), None)  # type: ignore[arg-type]
    assert (made.codebook, made.weights) == ("kmeans", weight_args(3, "channel", True))
    assert schemes.label(made) == "kmeans3-channel"


def test_without_a_codebook_it_is_round_to_nearest() -> None:
    weight, given = normal(4, 16), schemes.scheme(weight_args(8, "channel", True), packed=False)
    made, expected = quantize_scheme(weight, given), round_to_nearest(weight, given.weights)
    assert made.codebook is None
    assert torch.equal(made.codes, expected.codes)
    assert torch.equal(made.scale, expected.scale)


def test_histogram_of_values_at_the_ends() -> None:
    """A scale rounded down lets values pass 1 by a little."""
    found = histogram([(torch.tensor([-1.0001, -1.0, 1.0, 1.0001]), torch.ones(4).double())])
    assert isinstance(found, Histogram)
    torch.testing.assert_close(found.means, torch.tensor([-1.00005, 1.00005]).double())
