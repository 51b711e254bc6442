"""The relation loss of MiniLMv2 against its equations, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress.core.errors import ConfigError, TeacherError
from hf_compress.training.distillation.relations import (
    RelationConfig,
    relation_heads,
    relation_loss,
    relation_pair,
)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def oracle(student: Tensor, teacher: Tensor, heads: int) -> float:
    """Equations 1 to 4 for one row without padding, one head and token at a time."""

    def relations(value: Tensor, head: int) -> list[list[float]]:
        width = value.shape[-1] // heads
        part = value[:, head * width : (head + 1) * width].tolist()
        return [
            softmax([sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(width) for other in part])
            for one in part
        ]

    total = 0.0
    for head in range(heads):
        for own, other in zip(relations(student, head), relations(teacher, head), strict=True):
            total += sum(q * math.log(q / p) for p, q in zip(own, other, strict=True))
    return total / (heads * len(student))


def test_agrees_with_the_oracle_whatever_the_widths() -> None:
    student, teacher = values(2, 5, 12), values(2, 5, 8, seed=1)
    expected = torch.tensor([oracle(student[row], teacher[row], 4) for row in range(2)], dtype=torch.float64)
    made = relation_loss(student, teacher, 4, None)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-14)  # float64 on both sides, sums of 5 terms


@pytest.mark.parametrize("kept", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
def test_padding_on_any_side_equals_no_padding(kept: list[int]) -> None:
    student, teacher = values(2, 5, 12), values(2, 5, 8, seed=1)
    mask = torch.tensor([[1] * 5, kept], dtype=torch.bool)
    made = relation_loss(student.requires_grad_(True), teacher, 4, mask)
    assert made[1].item() == pytest.approx(oracle(student[1][mask[1]], teacher[1][mask[1]], 4), rel=1e-12)
    assert made[0].item() == pytest.approx(oracle(student[0], teacher[0], 4), rel=1e-12)
    made.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[1][~mask[1]].any()


def test_a_row_of_padding_gives_nothing() -> None:
    student, teacher = values(2, 3, 4).float().requires_grad_(True), values(2, 3, 4, seed=1).float()
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    made = relation_loss(student, teacher, 2, mask)
    made.sum().backward()
    assert made[1].item() == 0.0
    assert made[0].item() > 0.0
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_equal_relations_lose_nothing() -> None:
    same = values(2, 5, 8)
    assert relation_loss(same, same, 2, None).abs().max() == 0.0
    turned = torch.linalg.qr(values(4, 4, seed=3))[0]
    rotated = (same.unflatten(-1, (2, 4)) @ turned).flatten(-2)  # within each head: products stay
    assert relation_loss(rotated, same, 2, None).abs().max() < 1e-14


def test_gradients_are_those_of_the_loss() -> None:
    student, teacher = values(1, 3, 4).requires_grad_(True), values(1, 3, 8, seed=1)
    mask = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda value: relation_loss(value, teacher, 2, mask), (student,))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"), [(384, 768, 48), (64, 64, 32), (96, 64, 32), (60, 64, 4), (7, 8, 1)]
)
def test_heads_are_found(student: int, teacher: int, expected: int) -> None:
    assert relation_heads(RelationConfig(), student, teacher, "keys") == expected


def test_heads_that_do_not_divide() -> None:
    assert relation_heads(RelationConfig(heads=8), 32, 64, "keys") == 8
    with pytest.raises(TeacherError, match=r"heads=12 .* 32 and 64.*keys"):
        relation_heads(RelationConfig(heads=12), 32, 64, "keys")


def test_layers() -> None:
    assert relation_pair(RelationConfig(), 6, 12, "x") == (6, 12)
    assert relation_pair(RelationConfig(layers=(3, 11)), 6, 12, "x") == (3, 11)
    with pytest.raises(TeacherError, match="blocks 1 to 6, the teacher 1 to 12"):
        relation_pair(RelationConfig(layers=(7, 12)), 6, 12, "x")


@pytest.mark.parametrize(
    "options", [{"heads": 0}, {"layers": (0, 1)}, {"layers": 3}, {"weight": -1}, {"of": ()}, {"of": ("outputs",)}]
)
def test_impossible_configurations(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RelationConfig(**options)
