"""A table learned for one weight: weighted k-means in one dimension, on a fine histogram.

Values are normalised by their group's absolute maximum and count with the square of it, so that the error of the
weight itself is minimised. With the histogram, one round costs a few binary searches, whatever the size of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 16
"""Bins between -1 and 1; values in one bin are represented by their exact mean."""

ROUNDS = 200
"""Most rounds. From this start the error is within 0.01 dB of its final value long before."""

_COARSE = 1 << 6
"""Bins of the density that a table starts from: more follow the chance of a small weight's values."""


@dataclass(frozen=True)
class Histogram:
    """Weighted values, sorted.

    Attributes:
        means: float64, mean value of each bin that holds any, ascending.
        mass: float64, sum of weights up to each bin, with a leading 0.
        moment: float64, sum of weight times value up to each bin, with a leading 0.
    """

    means: Tensor
    mass: Tensor
    moment: Tensor


def histogram(blocks: Iterable[tuple[Tensor, Tensor]]) -> Histogram:
    """Gather values block by block, on the CPU, where sums have a fixed order.

    Args:
        blocks: Pairs of values, float32 in -1 … 1, and their weights, float64, both flat and of the same size.
    """
    mass, moment = torch.zeros(2, BINS, dtype=torch.float64)
    for values, weights in blocks:
        bins = ((values + 1) * (BINS / 2)).to(torch.int32).clamp_(0, BINS - 1)
        mass += torch.bincount(bins, weights, BINS)
        moment += torch.bincount(bins, weights * values, BINS)
    used = mass > 0
    padding = (1, 0)
    sums = (torch.nn.functional.pad(part[used].cumsum(0), padding) for part in (mass, moment))
    return Histogram(moment[used] / mass[used], *sums)


def learn(given: Histogram, count: int) -> Tensor:
    """The table that minimises the weighted squared error, as Lloyd's rounds find it (Lloyd 1982).

    Args:
        given: The weight's values, in at least `count` bins.
        count: Number of values in the table.

    Returns:
        float64, ascending.
    """
    table = start(given, count)
    for _ in range(ROUNDS):
        better = improved(given, table)
        if torch.equal(better, table):
            break
        table = better
    return table


def start(given: Histogram, count: int) -> Tensor:
    """Quantiles of the cube root of the density: where the points of a fine quantizer lie (Panter & Dite 1951).

    Args:
        given: The weight's values.
        count: Number of values.

    Returns:
        float64, ascending, without repetition if there are as many bins.
    """
    coarse = ((given.means + 1) * (_COARSE / 2)).to(torch.int64).clamp_(0, _COARSE - 1)
    mass = torch.bincount(coarse, given.mass.diff(), _COARSE)
    inside = torch.bincount(coarse, minlength=_COARSE)
    density = (mass.pow(1 / 3) / inside)[coarse].cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * density[-1]
    positions = torch.searchsorted(density, wanted).clamp_(max=len(density) - 1)
    return given.means[_distinct(positions, len(density))]


def improved(given: Histogram, table: Tensor) -> Tensor:
    """One round: each value of the table becomes the mean of the values that are nearest to it.

    One that is nearest to none goes where it helps most. The weighted squared error never grows.

    Args:
        given: The weight's values.
        table: float64, ascending.

    Returns:
        float64, ascending.
    """
    inner = torch.searchsorted(given.means, (table[1:] + table[:-1]) / 2)
    edges = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=len(given.means))
    mass = given.mass[edges].diff()
    means = torch.where(mass > 0, given.moment[edges].diff() / mass, table)
    empty = edges.diff() == 0
    # Differences of long sums are rounded: a mean must not leave its cell for that.
    low, high = given.means[edges[:-1].clamp(max=len(given.means) - 1)], given.means[edges[1:].sub(1).clamp_(min=0)]
    means = torch.where(empty, table, means.clamp(low, high))
    if bool(empty.any()):
        spread = mass * torch.where(empty, 0, high - low).square()
        means[int(empty.nonzero()[0])] = _halved(given, means, edges, int(spread.argmax()))
    return means.sort().values


def _halved(given: Histogram, means: Tensor, edges: Tensor, cell: int) -> Tensor:
    """The mean of the upper half of a cell."""
    low = int(torch.searchsorted(given.means, means[cell], right=True))
    high = int(edges[cell + 1])
    return (given.moment[high] - given.moment[low]) / (given.mass[high] - given.mass[low])


def _distinct(positions: Tensor, size: int) -> Tensor:
    """Ascending positions below `size`, moved apart where they repeat."""
    steps = torch.arange(len(positions))
    apart = (positions - steps).cummax(0).values + steps
    return torch.minimum(apart, size - len(positions) + steps)
