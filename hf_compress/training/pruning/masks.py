"""Masks with exact counts: which values are the smallest, on any device, without sorting them.

The k-th smallest value is found digit by digit of its bits (a radix selection): two passes for 32 bits and less, in
integers, so the result is the same everywhere. Equal values are pruned in the order of their positions. A count is
never missed by ties, which in bfloat16 are the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

FLOOR = 0.005
"""Smallest fraction of a weight's values that is left to it where weights compete, so that no layer collapses."""

_DIGIT = 16
"""Bits that are looked at in one pass."""


def count_of(sparsity: float, size: int) -> int:
    """How many of `size` values are pruned: the nearest integer, but never all.

    Args:
        sparsity: Fraction, 0 to below 1.
        size: Number of values.
    """
    return min(round(sparsity * size), max(size - 1, 0))


def floor_of(shape: Sequence[int]) -> int:
    """How many values a weight keeps at least where weights compete: 0.5 %, and as many as it has rows.

    Args:
        shape: … × rows × columns.
    """
    size = torch.Size(shape).numel()
    return min(size, max(ceil(FLOOR * size), size // max(shape[-1], 1)))


def lowest(values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Where the values are that are kept when the `count` smallest of all are pruned.

    Args:
        values: Floating tensors of any shape, without NaN: magnitudes or scores.
        count: How many are pruned, in all of them together.

    Returns:
        Boolean tensors of the same shapes, False for exactly `count` values. Among equal values, those of earlier
        tensors and earlier positions are pruned.
    """
    if count <= 0:
        return [torch.ones_like(value, dtype=torch.bool) for value in values]
    keys = [_keys(value.flatten()) for value in _alike(values)]
    threshold, equal = _select(keys, count)
    kept = []
    for value, key in zip(values, keys, strict=True):
        keep = key > threshold
        ties = (key == threshold).nonzero().squeeze(-1)
        keep[ties[equal:]] = True
        equal = max(0, equal - len(ties))
        kept.append(keep.view(value.shape))
    return kept


def lowest_with_floors(values: Sequence[Tensor], count: int, floors: Sequence[int]) -> list[Tensor]:
    """Like `lowest`, but each tensor keeps at least as many values as its floor says; others then lose more.

    Args:
        values: Floating tensors of any shape, without NaN.
        count: How many are pruned in all, at most the number of values without the floors.
        floors: How many each tensor keeps at least.
    """
    made: dict[int, Tensor] = {}
    free, left = list(range(len(values))), count
    while free:
        kept = lowest([values[index] for index in free], left)
        over = [index for index, keep in zip(free, kept, strict=True) if _pruned(keep) > keep.numel() - floors[index]]
        if not over:
            return [({**made, **dict(zip(free, kept, strict=True))})[index] for index in range(len(values))]
        for index in over:
            most = values[index].numel() - floors[index]
            made[index] = lowest([values[index]], most)[0]
            left -= most
        free = [index for index in free if index not in over]
    return [made[index] for index in range(len(values))]


def grouped(values: Tensor, pruned: int, size: int) -> Tensor:
    """Where the values are that are kept when in each group the `pruned` smallest ones are not.

    Args:
        values: … × columns, floating, without NaN.
        pruned: How many of each group are pruned.
        size: Consecutive columns in a group, a divisor of the columns.

    Returns:
        A boolean tensor of the same shape.
    """
    groups = values.unflatten(-1, (-1, size))
    order = groups.argsort(dim=-1, stable=True)[..., :pruned]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order, False).flatten(-2)


def _pruned(keep: Tensor) -> int:
    """How many values a mask prunes."""
    return keep.numel() - int(keep.count_nonzero())


def _alike(values: Sequence[Tensor]) -> list[Tensor]:
    """All values in float32, which holds the 16-bit types, or in float64 where one of them is."""
    wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return [value.to(wide) for value in values]


def _keys(values: Tensor) -> Tensor:
    """Integers in the order of floating-point numbers; both zeros are one."""
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = (values + 0.0).view(integer)  # -0.0 + 0.0 is 0.0
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits)


def _select(keys: Sequence[Tensor], rank: int) -> tuple[int, int]:
    """The rank-th smallest of all keys, counted from 1, and how many of its equals are among the `rank` smallest."""
    bits = keys[0].element_size() * 8
    prefix, left, base = 0, rank, 1 << _DIGIT
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        first = shift == bits - _DIGIT
        counts = torch.zeros(base, dtype=torch.int64)
        for key in keys:
            digits = key >> shift
            digits = digits + base // 2 if first else digits[(digits >> _DIGIT) == prefix] & (base - 1)
            counts += torch.bincount(digits, minlength=base).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, left))
        left -= int(below[digit] - counts[digit])
        prefix = digit - base // 2 if first else (prefix << _DIGIT) | digit
    return prefix, left
