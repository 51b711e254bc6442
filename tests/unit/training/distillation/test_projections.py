"""Projections: the same values everywhere, AdamW's steps, and a resume that changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_compress.core.errors import ResumeError
from hf_compress.training.distillation.projections import Projections
from hf_compress.training.state import Section, read_section, write_section

CPU = torch.device("cpu")


def inputs(step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))


def train(projections: Projections, steps: Iterator[int] | range) -> None:
    """Steps whose loss mixes two projections."""
    for step in steps:
        value = inputs(step)
        first, second = projections.get("a", 3, 4, CPU), projections.get("b", 3, 2, CPU)
        loss = first(value).square().sum() + (second(value) - 1).abs().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        projections.step(0.1 / (1 + step))


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    one, other = Projections(), Projections()
    other.get("b", 3, 2, CPU)
    assert torch.equal(one.get("a", 3, 4, CPU).weight, other.get("a", 3, 4, CPU).weight)
    assert not torch.equal(one.get("c", 3, 4, CPU).weight, one.get("a", 3, 4, CPU).weight)
    assert not torch.equal(Projections(1).get("a", 3, 4, CPU).weight, one.get("a", 3, 4, CPU).weight)
    weight = one.get("wide", 400, 300, CPU).weight
    assert weight.abs().max() <= 0.05
    assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert one.get("wide", 400, 300, CPU).weight is weight


def test_steps_are_adamw() -> None:
    projections = Projections()
    copies = [torch.nn.Parameter(value.detach().clone()) for value in projections.get("a", 3, 4, CPU).parameters()]
    optimizer = torch.optim.AdamW(copies, lr=0.1, weight_decay=0.0)
    for step in range(3):
        for half in (0, 10):  # gradients of two micro-batches add up
            projections.get("a", 3, 4, CPU)(inputs(step + half)).square().sum().backward()
            torch.nn.functional.linear(inputs(step + half), *copies).square().sum().backward()
        projections.step(0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(own, copied) for own, copied in zip(projections.parameters(), copies, strict=True))
    assert all(parameter.grad is None for parameter in projections.parameters())


def test_resume_changes_no_bit(tmp_path: Path) -> None:
    whole, half = Projections(), Projections()
    train(whole, range(6))
    train(half, range(3))
    write_section(tmp_path, "distillation", Section({}, 3, half.tensors()))
    resumed = Projections()
    resumed.load(read_section(tmp_path, "distillation", {}, 3).tensors, CPU)
    train(resumed, range(3, 6))
    assert resumed.tensors().keys() == whole.tensors().keys()
    assert len(whole.tensors()) == 4 * 4  # two weights, two biases: value, two moments, steps
    assert all(torch.equal(value, whole.tensors()[name]) for name, value in resumed.tensors().items())
    assert not torch.equal(resumed.tensors()["a.weight"], half.tensors()["a.weight"])


def test_loss_scaling_is_taken_back_and_overflow_skips() -> None:
    plain, scaled = Projections(), Projections()
    for projections, scale in ((plain, 1.0), (scaled, 1024.0)):
        (projections.get("a", 3, 4, CPU)(inputs(0)).square().sum() * scale).backward()
        projections.step(0.1, scale)
    assert all(torch.equal(value, plain.tensors()[name]) for name, value in scaled.tensors().items())
    before = [value.detach().clone() for value in scaled.parameters()]
    (scaled.get("a", 3, 4, CPU)(inputs(1)).sum() * torch.inf).backward()
    scaled.step(0.1, 1024.0)
    assert all(torch.equal(value, old) for value, old in zip(scaled.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in scaled.parameters())


def test_a_step_without_projections_does_nothing() -> None:
    projections = Projections()
    projections.step(0.1)
    assert projections.tensors() == {}
    projections.load({}, CPU)
    assert list(projections.parameters()) == []


def test_other_widths_and_missing_parts() -> None:
    projections = Projections()
    projections.get("a", 3, 4, CPU)
    with pytest.raises(ResumeError, match="3 features to 4, but the student has 5"):
        projections.get("a", 5, 4, CPU)
    with pytest.raises(ResumeError, match=r"a\.bias"):
        Projections().load({"a.weight": torch.zeros(4, 3)}, CPU)
