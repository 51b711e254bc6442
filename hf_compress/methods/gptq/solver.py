"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): columns are rounded one after the other, the rest makes up for it.

With H = Σ x xᵀ and the columns in solve order, H = M Mᵀ with M upper triangular, T = M / diag(M). The paper's
algorithm (its Algorithm 1, the lazily updated Cholesky form) then is the same as rounding column j of

    w_j + Σ_{k<j} (w_k - q_k) T_kj

to its grid: the errors made so far are pulled in when a column is due, instead of being pushed to all later ones. This
needs one Cholesky decomposition and no inverse. What is left is Σ_j ‖(w'_j - q_j) M_jj‖², so M_jj² is what an error in
column j costs; grids are chosen by it.

Act-order is the solve order alone: the columns of largest Hessian diagonal first. Groups stay consecutive columns with
grids that are known before, so the result needs no table of group numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...core.errors import CalibrationError
from ...core.registry import Quantized
from ..rtn.method import uniform_grid

PANEL = 8
"""Columns within a block of which each pulls in the errors of the others one by one. So few that PyTorch starts no
threads for a column, which on a busy machine would cost far more than they save."""

LADDER = 3
"""Dampings tried, each ten times the one before."""

FRACTIONS = tuple(1 - 0.04 * step for step in range(10))
"""Ranges that are tried for a group, as fractions of that of round to nearest."""

COST_OF_DEAD = 1e-6
"""What an error in a column that is always zero costs, as a fraction of the mean of the others: it decides where
nothing else does, as in a group of such columns, in whatever unit the inputs are."""

CHUNK = 1 << 15
"""Values of a weight whose grids are searched at a time; as few for the same reason."""


class Grids(NamedTuple):
    """Grids of a weight, as they are stored.

    Attributes:
        scale: Rows × groups, rows × 1, or (1), in the weight's data type.
        zero_point: int8 of the same shape, or None when symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Factor:
    """A decomposed Hessian.

    Attributes:
        order: int64, columns in solve order.
        pull: float32 T of the solve order, columns × columns, upper triangular with ones.
        cost: float32, what a squared error in a column costs (M_jj²), in original order.
        damping: What was added to the diagonal, as a fraction of its mean.
    """

    order: Tensor
    pull: Tensor
    cost: Tensor
    damping: float


def factor(gram: Tensor, damping: float, act_order: bool, name: str) -> Factor:
    """Decompose a Hessian.

    Columns that were never other than zero get a diagonal of 1: nothing is known of them, they are rounded to
    nearest, no error goes to or comes from them, and other columns of their groups decide the grids.

    Args:
        gram: Σ x xᵀ, columns × columns, float32 or float64.
        damping: Fraction of the mean diagonal that is added to it; ten times that, and so on, where the decomposition
            fails in float32 and in float64.
        act_order: Whether columns of large diagonal are solved first.
        name: The weight's name, for the message.

    Raises:
        CalibrationError: It can't be decomposed with the largest damping either.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    mean = float(diagonal[~dead].double().mean()) if not bool(dead.all()) else 1.0
    backwards = order.flip(0)
    for step in range(LADDER):
        added = damping * 10**step
        for dtype in (torch.float32, torch.float64):
            hessian = gram[backwards.unsqueeze(1), backwards].to(dtype)
            hessian.diagonal().add_(torch.where(dead[backwards], 1.0, added * mean).to(dtype))
            lower, info = torch.linalg.cholesky_ex(hessian)
            del hessian
            roots = lower.diagonal()
            if int(info) == 0 and bool(roots.isfinite().all()) and float(roots.min()) > 0:
                upper = lower.flip(0, 1)
                del lower
                roots = upper.diagonal().clone()
                cost = torch.empty_like(diagonal, dtype=torch.float32)
                cost[order] = roots.square().float()
                if not bool(dead.all()):
                    cost[dead] = COST_OF_DEAD * cost[~dead].mean()
                return Factor(order, upper.div_(roots).float().contiguous(), cost, added)
    raise CalibrationError(
        f"The Hessian of {name} ({len(diagonal)} inputs, {int(dead.sum())} of them always zero) can't be decomposed, "
        f"not with damping={damping * 10 ** (LADDER - 1):g} either.",
        f'give more varied calibration data, or a larger damping than {damping:g}, or skip=["{name}"]',
    )


@torch.no_grad()
def gptq(
    weight: Tensor, factored: Factor, args: QuantizationArgs, block_size: int = 128, given: Grids | None = None
) -> Quantized:
    """Quantize a weight so that its outputs on the calibration data change least.

    Args:
        weight: Rows × columns, floating point, finite.
        factored: The Hessian of its inputs.
        args: The grid: bits, strategy, group size, symmetry.
        block_size: Columns after which pulled errors are multiplied as matrices.
        given: Grids to take instead of searching for them.

    Returns:
        Codes (int8, rows × columns), scales in the weight's data type, zero points (int8) unless symmetric.
    """
    scale, zeros = grids(weight, factored.cost, args) if given is None else given
    rows, columns = weight.shape
    groups = schemes.groups((rows, columns), args)[-1]
    order = factored.order
    values = weight.T[order].float()
    wide = scale.float().expand(rows, groups).T.contiguous()
    offsets = None if zeros is None else zeros.float().expand(rows, groups).T.contiguous()
    of_group = (order // (columns // groups)).tolist()
    levels = _solve(values, factored.pull, wide, offsets, of_group, args.num_bits, block_size)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    codes[:, order] = levels.T
    return Quantized(codes, scale, zeros)


def _solve(
    values: Tensor,
    pull: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    of_group: list[int],
    bits: int,
    block_size: int,
) -> Tensor:
    """The column loop.

    Args:
        values: float32 weight, columns in solve order × rows. Replaced by the errors w - q.
        pull: T of `Factor`.
        scale: float32, groups × rows.
        zeros: float32 zero points, groups × rows, or None.
        of_group: The group of each column.
        bits: Bits per code.
        block_size: Columns of a block.

    Returns:
        int8 codes, columns in solve order × rows.
    """
    columns, rows = values.shape
    codes = torch.empty(columns, rows, dtype=torch.int8)
    limit = 2 ** (bits - 1)
    inverse = scale.reciprocal()
    level, restored = torch.empty(2, rows)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        due = torch.addmm(values[first:last], pull[:first, first:last].T, values[:first])
        for start in range(first, last, PANEL):
            stop = min(start + PANEL, last)
            panel = due[start - first : stop - first]
            panel.addmm_(pull[first:start, start:stop].T, values[first:start])
            for column in range(start, stop):
                group = of_group[column]
                torch.mul(panel[column - start], inverse[group], out=level)
                if zeros is not None:
                    level.add_(zeros[group])
                level.round_().clamp_(-limit, limit - 1)
                codes[column] = level
                if zeros is not None:
                    level.sub_(zeros[group])
                torch.mul(level, scale[group], out=restored)
                error = values[column].sub_(restored)
                if column + 1 < stop:
                    panel[column + 1 - start :].addr_(pull[column, column + 1 : stop], error)
    return codes


def grids(weight: Tensor, cost: Tensor, args: QuantizationArgs, fractions: Sequence[float] = FRACTIONS) -> Grids:
    """Scale and zero point of each group: of the ranges tried, that of the least costly rounding.

    Args:
        weight: Rows × columns.
        cost: What a squared error in each column costs, float32.
        args: The grid.
        fractions: Ranges to try, as fractions of the whole one.
    """
    shape = schemes.groups(tuple(weight.shape), args)
    if args.strategy == "tensor":
        pieces, cost = [weight.reshape(1, 1, -1)], cost.repeat(len(weight)).view(1, -1)
    else:
        step = max(1, CHUNK // weight.shape[1])
        pieces, cost = [part.unflatten(-1, (shape[-1], -1)) for part in weight.split(step)], cost.view(shape[-1], -1)
    made = [_best(piece, cost, args, fractions) for piece in pieces]
    zeros = [zero for _, zero in made if zero is not None]
    return Grids(torch.cat([scale for scale, _ in made]).view(shape), torch.cat(zeros).view(shape) if zeros else None)


def _best(grouped: Tensor, cost: Tensor, args: QuantizationArgs, fractions: Sequence[float]) -> Grids:
    """The best grids of some groups, rows × groups × values."""
    values, limit = grouped.float(), 2 ** (args.num_bits - 1)
    low, high = values.amin(-1), values.amax(-1)
    scale, zeros = uniform_grid(low, high, args, grouped.dtype)
    least = torch.full(scale.shape, torch.inf)
    for fraction in fractions:
        tried, offset = uniform_grid(low * fraction, high * fraction, args, grouped.dtype)
        wide = tried.float().unsqueeze(-1)
        shift = 0.0 if offset is None else offset.float().unsqueeze(-1)
        levels = (values / wide).add_(shift).round_().clamp_(-limit, limit - 1).sub_(shift)
        loss = levels.mul_(wide).sub_(values).square_().mul_(cost).sum(-1)
        better = loss < least
        least, scale = torch.where(better, loss, least), torch.where(better, tried, scale)
        if zeros is not None and offset is not None:
            zeros = torch.where(better, offset, zeros)
    return Grids(scale, zeros)
