"""The hidden-state loss against a slow oracle, and which layers it compares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress.core.errors import ConfigError, TeacherError
from hf_compress.training.distillation.hidden import HiddenConfig, hidden_loss, layer_pairs, row_means


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(config: HiddenConfig, student: Tensor, teacher: Tensor, mask: Tensor) -> list[float]:
    """Token by token, in Python's floats."""
    found = []
    for row in range(len(student)):
        losses = []
        for token in range(student.shape[1]):
            if not mask[row, token]:
                continue
            own, other = student[row, token].tolist(), teacher[row, token].tolist()
            lengths = math.hypot(*own), math.hypot(*other)
            if config.loss == "cosine":
                losses.append(1 - sum(a * b for a, b in zip(own, other, strict=True)) / (lengths[0] * lengths[1]))
            elif config.normalise:
                losses.append(sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(own, other, strict=True)))
            else:
                losses.append(sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) / len(own))
        found.append(sum(losses) / len(losses) if losses else 0.0)
    return found


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"loss": "cosine"}])
def test_agrees_with_the_oracle(options: dict[str, Any]) -> None:
    config = HiddenConfig(**options)
    student, teacher = values(3, 5, 7), values(3, 5, 7, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor(oracle(config, student, teacher, mask), dtype=torch.float64)
    # float64 on both sides: a few dozen roundings
    torch.testing.assert_close(hidden_loss(config, student, teacher, mask), expected, rtol=1e-13, atol=1e-15)
    narrow = hidden_loss(config, student.bfloat16(), teacher.bfloat16(), mask)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.01)  # inputs of 8 bits


def test_padding_counts_for_nothing() -> None:
    config = HiddenConfig()
    student, teacher = values(2, 5, 4).requires_grad_(True), values(2, 5, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    loss = hidden_loss(config, student, teacher, mask)
    loss.sum().backward()
    assert student.grad is not None
    assert not student.grad[1, :2].any()
    assert student.grad[1, 2:].all()
    with torch.no_grad():
        spoiled = teacher.masked_fill(~mask[..., None], torch.nan)
        assert torch.equal(hidden_loss(config, student, spoiled, mask), loss)
        alone = hidden_loss(config, student[1:, 2:], teacher[1:, 2:], None)
        torch.testing.assert_close(alone, loss[1:], rtol=1e-14, atol=0.0)


def test_equal_states_lose_nothing() -> None:
    same = values(2, 3, 4)
    for options in ({}, {"normalise": True}, {"loss": "cosine"}):
        loss = hidden_loss(HiddenConfig(**options), same, same, None)  # type: ignore[arg-type]
        assert loss.abs().max() < 1e-15


def test_length_does_not_matter_where_it_should_not() -> None:
    student, teacher = values(2, 3, 4), values(2, 3, 4, seed=1)
    for options in ({"normalise": True}, {"loss": "cosine"}):
        config = HiddenConfig(**options)  # type: ignore[arg-type]
        torch.testing.assert_close(
            hidden_loss(config, 3 * student, teacher, None), hidden_loss(config, student, teacher, None)
        )


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 2, 3, [(1, 2), (2, 3)]),
        ("uniform", 3, 1, [(1, 1), (2, 1), (3, 1)]),  # never 0, the embeddings
        ("last", 6, 12, [(6, 12)]),
        (((0, 0), (1, 4)), 2, 4, [(0, 0), (1, 4)]),
    ],
)
def test_layer_maps(layers: Any, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(HiddenConfig(layers=layers), student, teacher, "encoder.layer") == expected


@pytest.mark.parametrize("pair", [(3, 4), (2, 5)])
def test_layers_that_are_not_there(pair: tuple[int, int]) -> None:
    with pytest.raises(TeacherError, match=r"encoder\.layer the student has layers 0 to 2, the teacher 0 to 4"):
        layer_pairs(HiddenConfig(layers=(pair,)), 2, 4, "encoder.layer")


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "first"},
        {"layers": ()},
        {"layers": ((-1, 0),)},
        {"layers": ((1, 2, 3),)},
        {"weight": 0.0},
        {"weight": math.inf},
        {"loss": "l1"},
        {"normalise": 1},
        {"layer": "last"},
    ],
)
def test_impossible_configurations(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HiddenConfig(**options)


def test_row_means_of_nothing() -> None:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert row_means(torch.ones(1, 3), mask).item() == 0.0
