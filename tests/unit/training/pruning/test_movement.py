"""Scores of movement pruning against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_compress.core.errors import ResumeError
from hf_compress.training.pruning.config import PruningConfig
from hf_compress.training.pruning.masks import lowest
from hf_compress.training.pruning.movement import Scores

CONFIG = PruningConfig(method="movement", sparsity=0.5)


class TopK(torch.autograd.Function):
    """The mask of the largest half of the scores; its gradient goes straight to the scores (the paper's equation)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        mask = torch.ones_like(scores).flatten()
        mask[scores.flatten().argsort(stable=True)[: scores.numel() // 2]] = 0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(10, 8, generator=generator), torch.randn(10, 4, generator=generator)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.ndim == 2}


def pruned(model: nn.Module) -> tuple[Scores, dict[str, Tensor]]:
    """Scores that aren't magnitudes, and the weights masked by them."""
    scores = Scores(weights(model), CONFIG)
    generator = torch.Generator().manual_seed(7)
    keep = {}
    for name, value in weights(model).items():
        scores.values[name].data.copy_(torch.randn(value.shape, generator=generator))
        keep[name] = lowest([scores.values[name].detach()], value.numel() // 2)[0]
        scores.exchange(name, value, keep[name])
    return scores, keep


def oracle(model: nn.Module, scores: Scores) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of scores and weights with W ⊙ TopK(S) in the graph, float64."""
    dense = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    learned = {name: value.detach().double().requires_grad_() for name, value in scores.values.items()}
    masked = {name: value * TopK.apply(learned[name]) if name in learned else value for name, value in dense.items()}
    x, y = batch()
    output = functional_call(model.double(), masked, (x.double(),))
    (output - y.double()).square().mean().backward()
    made = {name: value.grad for name, value in learned.items() if value.grad is not None}
    return made, {name: dense[name].grad for name in learned if dense[name].grad is not None}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_straight_through_mask(dtype: torch.dtype) -> None:
    """Tolerance: the rounding of the type, 2^-23 or 2^-8, over sums of some ten terms."""
    model = model_of(dtype)
    before = {name: value.detach().clone() for name, value in weights(model).items()}
    scores, keep = pruned(model)
    x, y = batch()
    (model(x.to(dtype)) - y.to(dtype)).square().mean().backward()
    for name, value in weights(model).items():
        scores.take(name, value, None)
    of_scores, of_weights = oracle(model_of(dtype), scores)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for name, value in weights(model).items():
        assert torch.equal(value.detach() + scores.held[name], before[name])  # nothing is lost
        assert torch.equal(value.detach() == 0, ~keep[name])
        taken = scores.values[name].grad
        assert taken is not None
        assert taken.dtype == torch.float32
        assert value.grad is not None
        for found, wanted in ((taken, of_scores[name]), (value.grad * keep[name], of_weights[name])):
            assert float((found.double() - wanted).norm() / wanted.norm()) < limit
        assert bool(of_scores[name][~keep[name]].any())  # scores of pruned weights learn


def test_scores_move_as_adam_moves_them() -> None:
    model = model_of()
    scores, _ = pruned(model)
    twins = {name: nn.Parameter(value.detach().clone()) for name, value in scores.values.items()}
    adam = torch.optim.Adam(twins.values(), lr=1e-2, fused=True)
    x, y = batch()
    for _ in range(3):
        (model(x) - y).square().mean().backward()
        for name, value in weights(model).items():
            twins[name].grad = value.grad * (value.detach() + scores.held[name])
            scores.take(name, value, None)
        scores.step()
        adam.step()
        model.zero_grad()
    assert all(torch.equal(twins[name], value) for name, value in scores.values.items())


def test_a_weight_comes_back_with_its_value() -> None:
    model = model_of()
    weight = weights(model)["0.weight"]
    before = weight.detach().clone()
    scores, keep = pruned(model)
    scores.exchange("0.weight", weight, ~keep["0.weight"])
    assert torch.equal(weight.detach(), torch.where(keep["0.weight"], 0, before))
    scores.exchange("0.weight", weight, torch.ones_like(keep["0.weight"]))
    assert torch.equal(weight.detach(), before)


def test_scores_start_from_relative_magnitudes_or_zero() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, -4.0]]))
    made = Scores({"w": weight}, CONFIG).values["w"]
    assert torch.allclose(made, torch.tensor([[3.0, 4.0]]) / 12.5**0.5)
    zero = PruningConfig(method="movement", initial_scores="zero")
    assert not Scores({"w": weight}, zero).values["w"].any()


@pytest.mark.parametrize("what", ["score", "held", "step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("how", ["missing", "shape", "type"])
def test_incomplete_state_is_refused(what: str, how: str) -> None:
    model = model_of()
    scores, _ = pruned(model)
    x, y = batch()
    (model(x) - y).square().mean().backward()
    for name, value in weights(model).items():
        scores.take(name, value, None)
    scores.step()
    kept = scores.tensors()
    key = f"0.weight.{what}"
    broken = {name: value for name, value in kept.items() if name != key}
    if how != "missing":
        broken[key] = kept[key].flatten()[:1] if how == "shape" else kept[key].double()
    with pytest.raises(ResumeError, match=what):
        Scores(weights(model), CONFIG).load(broken)
    again = Scores(weights(model), CONFIG)
    again.load(kept)
    assert all(torch.equal(again.tensors()[name], value) for name, value in kept.items())
