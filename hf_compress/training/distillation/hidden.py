"""The hidden-state loss: what a student's layers hold, against what a teacher's hold."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.config import Settings
from ...core.errors import TeacherError

Index = Annotated[int, Field(strict=True, ge=0)]


class HiddenConfig(Settings):
    """Which hidden states are compared, and how.

    A layer's number is that of `output_hidden_states`: 0 is what the first block reads, the embeddings; L is what
    block L returns, counted from 1; that of the last block is what the model returns as `last_hidden_state`, after the
    final norm where there is one.

    Attributes:
        layers: `"uniform"` compares every block l of the student with block l · L_teacher / L_student, `"last"` the
            last ones; or pairs (student, teacher). Of a model with several stacks, such as an encoder and a decoder,
            it holds for each of them.
        weight: What the loss is multiplied with.
        loss: `"mse"` is the mean squared difference over the features; `"cosine"` 1 − the cosine of the angle between
            them (Sanh et al., arXiv:1910.01108, section 3).
        normalise: With `"mse"`: the squared distance of the vectors scaled to unit length, summed over the features
            (Sun et al., arXiv:1908.09355, equation 7), which doesn't depend on their lengths. A cosine never does.
    """

    layers: Literal["uniform", "last"] | Annotated[tuple[tuple[Index, Index], ...], Field(min_length=1)] = "uniform"
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    loss: Literal["mse", "cosine"] = "mse"
    normalise: Annotated[bool, Field(strict=True)] = False


def layer_pairs(config: HiddenConfig, student: int, teacher: int, where: str) -> list[tuple[int, int]]:
    """The layers that are compared.

    Args:
        config: The configuration.
        student: Number of the student's blocks.
        teacher: Number of the teacher's blocks.
        where: Path of the student's blocks, for messages.

    Returns:
        Pairs (student, teacher).

    Raises:
        TeacherError: A given pair names a layer that one of them doesn't have.
    """
    if config.layers == "last":
        return [(student, teacher)]
    if config.layers == "uniform":
        return [(layer, max(1, (2 * layer * teacher + student) // (2 * student))) for layer in range(1, student + 1)]
    for own, other in config.layers:
        if own > student or other > teacher:
            raise TeacherError(
                f"layers names the pair ({own}, {other}), but at {where} the student has layers 0 to {student}, the "
                f"teacher 0 to {teacher}; 0 are the embeddings.",
                f"layers=(({min(own, student)}, {min(other, teacher)}),)",
            )
    return [(own, other) for own, other in config.layers]


def hidden_loss(config: HiddenConfig, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """How far the hidden states of one layer are apart, for each row.

    Args:
        config: The configuration; `weight` is not applied.
        student: Rows × tokens × features, projected to the teacher's width.
        teacher: Rows × tokens × features.
        mask: Which tokens count, rows × tokens, bool; None where all do.

    Returns:
        The mean over the tokens that count, of each row, float32 or wider; 0 for a row without any.
    """
    own, other = wide(student), wide(teacher)
    if config.loss == "cosine":
        return row_means(1 - torch.cosine_similarity(own, other, dim=-1), mask)
    if config.normalise:
        own, other = (torch.nn.functional.normalize(value, dim=-1) for value in (own, other))
        return row_means((own - other).square().sum(dim=-1), mask)
    return row_means((own - other).square().mean(dim=-1), mask)


def wide(value: Tensor) -> Tensor:
    """A value in float32, or in float64 where it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def row_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means over tokens, padding left out, so that a row counts the same whatever its length.

    Args:
        values: Rows × tokens.
        mask: Which tokens count, rows × tokens, bool; None where all do.

    Returns:
        One value for each row; 0 for a row without tokens that count.
    """
    if mask is None:
        return values.mean(dim=1)
    kept = torch.where(mask, values, values.new_zeros(()))  # a product would keep NaN of padding
    return kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
