"""Masks with exact counts, against oracles that sort in Python."""

from __future__ import annotations

from math import ceil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from hf_compress.training.pruning.masks import count_of, floor_of, grouped, lowest, lowest_with_floors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 0.501953125, 3.0, 60000.0])
"""Few values, so that many are equal; two of them are one in bfloat16."""
any_float = st.floats(-60000, 60000, width=16)
tensors = st.lists(st.lists(few | any_float, min_size=1, max_size=20), min_size=1, max_size=4)


def made(values: list[list[float]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64).to(dtype) for row in values]


def order(values: list[Tensor]) -> list[tuple[float, int, int]]:
    """(value, tensor, position), smallest first, in order of position where equal."""
    return sorted((float(x) + 0.0, i, j) for i, row in enumerate(values) for j, x in enumerate(row))


def kept(values: list[Tensor], pruned: set[tuple[int, int]]) -> list[list[bool]]:
    return [[(i, j) not in pruned for j in range(len(row))] for i, row in enumerate(values)]


@settings(max_examples=60, deadline=None)
@given(tensors, st.sampled_from(DTYPES), st.floats(0, 1))
def test_lowest_prunes_the_smallest_of_all_and_no_other(rows: list[list[float]], dtype: torch.dtype, s: float) -> None:
    values = made(rows, dtype)
    count = int(s * sum(len(row) for row in rows))
    wanted = {(i, j) for _, i, j in order(values)[:count]}
    assert [mask.tolist() for mask in lowest(values, count)] == kept(values, wanted)


@settings(max_examples=60, deadline=None)
@given(tensors, st.floats(0, 1), st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_floors_are_kept_and_the_count_is_made_up_elsewhere(
    rows: list[list[float]], s: float, floors: list[int]
) -> None:
    """Oracle: take the smallest one after the other, pass over those whose tensor has nothing left to give."""
    values = made(rows, torch.float32)
    least = [min(floor, len(row)) for floor, row in zip(floors, rows, strict=False)]
    most = [len(row) - floor for row, floor in zip(rows, least, strict=True)]
    count = int(s * sum(most))
    pruned: set[tuple[int, int]] = set()
    for _, i, j in order(values):
        if len(pruned) < count and sum(one == i for one, _ in pruned) < most[i]:
            pruned.add((i, j))
    assert [mask.tolist() for mask in lowest_with_floors(values, count, least)] == kept(values, pruned)


@settings(max_examples=40, deadline=None)
@given(st.lists(few, min_size=24, max_size=24), st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]))
def test_groups_lose_exactly_their_smallest(row: list[float], pattern: tuple[int, int]) -> None:
    values = torch.tensor(row)
    pruned, size = pattern
    mask = grouped(values.view(2, 12) if size != 8 else values.view(1, 24), pruned, size).flatten().tolist()
    for start in range(0, 24, size):
        order_ = sorted(range(size), key=lambda j: (row[start + j] + 0.0, j))
        assert [j for j in range(size) if not mask[start + j]] == sorted(order_[:pruned])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_have_exact_counts_in_every_type(dtype: torch.dtype) -> None:
    """In bfloat16 a hundred thousand values share a few thousand magnitudes."""
    value = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    for count in (1, 59999, 60000, 119999):
        mask = lowest([value], count)[0]
        assert mask.shape == value.shape
        assert int((~mask).sum()) == count
        assert value[~mask].max() <= value[mask].min()


def test_all_equal_values_are_pruned_from_the_first_on() -> None:
    assert lowest([torch.ones(3), torch.ones(3)], 4)[1].tolist() == [False, True, True]


@pytest.mark.parametrize(("sparsity", "size", "count"), [(0.29, 100, 29), (0.7, 10, 7), (0.0, 5, 0), (0.99, 10, 9)])
def test_count(sparsity: float, size: int, count: int) -> None:
    """`int(0.29 * 100)` is 28; and a weight is never pruned away."""
    assert count_of(sparsity, size) == count


def test_floor_is_half_a_percent_or_one_per_row() -> None:
    assert floor_of((10, 1000)) == ceil(0.005 * 10000)
    assert floor_of((100, 9)) == 100
    assert floor_of((4, 2, 50)) == 8
