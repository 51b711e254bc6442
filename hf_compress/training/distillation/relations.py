"""The relation loss of MiniLMv2 (Wang et al., arXiv:2012.15828): how tokens relate, not what they hold.

Queries, keys and values of all attention heads are joined and cut anew into relation heads, so a teacher and a student
may have other widths and numbers of heads.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.config import Settings
from ...core.errors import TeacherError
from .hidden import row_means, wide

Kind = Literal["queries", "keys", "values"]
Layer = Annotated[int, Field(strict=True, ge=1)]

_MOST = 48
"""Relation heads of base models in the paper (section 4.1)."""


class RelationConfig(Settings):
    """Which relations are compared.

    Attributes:
        heads: Relation heads; None takes the most, up to 48, that divide the width of what is compared in both models.
        layers: Blocks of the student and of the teacher, counted from 1; None takes the last ones. The paper takes an
            upper middle layer of large teachers, such as 21 of 24. Of a model with several stacks, such as an encoder
            and a decoder, it holds for each of them.
        weight: What the loss is multiplied with.
        of: What is compared: each one's relations with itself.
    """

    heads: Annotated[int, Field(strict=True, ge=1)] | None = None
    layers: tuple[Layer, Layer] | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    of: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("queries", "keys", "values")


def relation_pair(config: RelationConfig, student: int, teacher: int, where: str) -> tuple[int, int]:
    """The blocks that are compared, counted from 1.

    Args:
        config: The configuration.
        student: Number of the student's blocks.
        teacher: Number of the teacher's blocks.
        where: Path of the student's blocks, for messages.

    Raises:
        TeacherError: A given layer doesn't exist.
    """
    own, other = config.layers or (student, teacher)
    if own > student or other > teacher:
        raise TeacherError(
            f"layers=({own}, {other}) of the relations, but at {where} the student has blocks 1 to {student}, the "
            f"teacher 1 to {teacher}.",
            f"layers=({min(own, student)}, {min(other, teacher)})",
        )
    return own, other


def relation_heads(config: RelationConfig, student: int, teacher: int, what: str) -> int:
    """Relation heads for features of two widths.

    Args:
        config: The configuration.
        student: Features of the student's queries, keys or values, of all heads together.
        teacher: Those of the teacher.
        what: What they are, for messages.

    Raises:
        TeacherError: They can't be cut into the given number of heads.
    """
    common = math.gcd(student, teacher)
    fitting = [heads for heads in range(1, min(common, _MOST) + 1) if common % heads == 0]
    if config.heads is None:
        return fitting[-1]
    if common % config.heads:
        raise TeacherError(
            f"heads={config.heads} relation heads don't divide {student} and {teacher}, the features of the student's "
            f"and the teacher's {what}.",
            f"heads={fitting[-1]}, or leave it out",
        )
    return config.heads


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """The relations of a student's tokens against those of a teacher's, for each row.

    KL(R_teacher ‖ R_student) / (heads · tokens) with R = softmax(A Aᵀ / √d), where A are the queries, keys or values
    of one relation head, tokens × d (equations 1 to 4; the sum over queries, keys and values is the caller's). It
    takes memory for rows × heads × tokens² values, several times.

    Args:
        student: Rows × tokens × features.
        teacher: Rows × tokens × features, which may be other ones.
        heads: Relation heads; they divide both numbers of features.
        mask: Which tokens count, rows × tokens, bool; None where all do.

    Returns:
        One value for each row, float32 or wider; 0 for a row without tokens that count.
    """
    own = _relations(student, heads, mask)
    with torch.no_grad():
        other = _relations(teacher, heads, mask)
        weights = other.exp()
    apart = (weights * (other - own)).sum(dim=-1)
    return row_means(apart.unflatten(0, (-1, heads)).mean(dim=1), mask)


def _relations(value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Logarithms of relations, (rows · heads) × tokens × tokens."""
    rows, tokens, width = value.shape
    size = width // heads
    parts = wide(value).reshape(rows, tokens, heads, size).transpose(1, 2).reshape(rows * heads, tokens, size)
    hidden = parts.new_zeros(rows * heads, 1, tokens)
    if mask is not None:  # not -inf: a product with its probability, 0, would be NaN
        padding = ~mask.repeat_interleave(heads, dim=0).unsqueeze(1)
        hidden = hidden.masked_fill(padding, torch.finfo(parts.dtype).min / 2)
    return torch.baddbmm(hidden, parts, parts.transpose(1, 2), alpha=size**-0.5).log_softmax(dim=-1)
