"""Which weights are pruned, along which dimension, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_compress.core.errors import (
    ConfigError,
    GroupSizeError,
    NothingToQuantizeError,
    PatternError,
    RuleError,
    TiedWeightsError,
    UnsupportedModelError,
    WeightValueError,
)
from hf_compress.core.weights import WeightKind
from hf_compress.training.pruning.config import PruningConfig, PruningRule
from hf_compress.training.pruning.report import achieved
from hf_compress.training.pruning.targets import Target, check_targets, find_targets
from tests._utils.tiny import tiny


def named(model: nn.Module, **values: Any) -> dict[str, Target]:
    return {target.name: target for target in find_targets(model, PruningConfig(**values))}


def test_heads_norms_and_embeddings_are_kept() -> None:
    found = named(tiny("bert-classifier"))
    assert len(found) == 13  # 6 per layer, and the pooler
    assert all("embeddings" not in name and name != "classifier" for name in found)
    assert {target.sparsity for target in found.values()} == {0.5}


def test_rules_and_skip() -> None:
    rules = [PruningRule(pattern="query", sparsity=0.25), PruningRule(pattern="classifier", keep=False)]
    found = named(tiny("bert-classifier"), rules=rules, skip=["pooler"])
    assert found["classifier"].sparsity == 0.5
    assert "bert.pooler.dense" not in found
    assert sorted(target.sparsity for target in found.values()) == [0.25] * 2 + [0.5] * 11


@pytest.mark.parametrize(
    ("name", "kind", "inputs"),
    [
        ("gpt2", WeightKind.CONV1D, {64, 256}),
        ("qwen3-moe", WeightKind.EXPERTS, {64}),
        ("resnet", WeightKind.CONV, None),
    ],
)
def test_patterns_go_along_the_inputs(name: str, kind: WeightKind, inputs: set[int] | None) -> None:
    """Conv1D is stored transposed, convolutions have the kernel last, experts come first."""
    model = tiny(name)
    # The stem of a ResNet has 3 channels; the whole width of the others can be grouped.
    skip = ["embedder.embedder"] if name == "resnet" else []
    found = [target for target in named(model, pattern="2:4", skip=skip).values() if target.weight.kind is kind]
    assert found
    assert inputs is None or {target.inputs for target in found} == inputs
    for target in found:
        parameter = target.parameter(model)
        assert parameter is not None
        mask = target.grouped(parameter.detach().abs(), 2, 4)
        assert mask.shape == parameter.shape
        dimension = {WeightKind.CONV1D: 0, WeightKind.CONV: 1}.get(kind, parameter.ndim - 1)
        groups = mask.movedim(dimension, -1).reshape(-1, 4)
        assert bool((groups.sum(-1) == 2).all())


def test_tied_weights_are_one() -> None:
    found = named(tiny("llama-tied"), default_rules=False)
    assert "model.embed_tokens" in found
    assert "lm_head" not in found
    with pytest.raises(TiedWeightsError, match=r"lm_head .* shares its values with model.embed_tokens"):
        named(tiny("llama-tied"), rules=[PruningRule(pattern="lm_head", keep=False)])


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"skip": ["qeury"]}, PatternError, "Did you mean 'query'"),
        ({"skip": ["*"]}, NothingToQuantizeError, "Nothing to prune: none of the"),
        ({"rules": [PruningRule(pattern="query")]}, RuleError, "give it keep or sparsity"),
        ({"rules": [PruningRule(pattern="classifier", sparsity=0.1)]}, RuleError, "every weight it matches is kept"),
        ({"pattern": "2:5"}, GroupSizeError, "5 does not divide the 64 inputs"),
        ({"scope": "global", "sparsity": 0.999}, ConfigError, "sparsity=0.9"),
    ],
)
def test_refused(values: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        named(tiny("bert-classifier"), **values)
    assert said in str(caught.value)


class Odd(nn.Module):
    """A layer that is pruned, and parameters that can't be."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.pair, self.attention = nn.Linear(8, 8), nn.Bilinear(4, 4, 4), nn.MultiheadAttention(8, 2)


@pytest.mark.touches_rng  # layers draw their weights
def test_what_cannot_be_pruned_is_reported_and_not_ruled_upon() -> None:
    model = Odd()
    report = achieved(model, PruningConfig(skip=["attention.out_proj"]))
    assert [weight.name for weight in report.weights] == ["plain"]
    assert set(report.left_dense) == {"pair", "attention.in_proj_weight"}
    assert "pair  dense: a parameter of Bilinear, which is no layer that can be pruned" in str(report)
    for rule in (PruningRule(pattern="pair", keep=False), PruningRule(pattern="attention.in_proj*", sparsity=0.3)):
        with pytest.raises(RuleError, match="has no effect"):
            achieved(model, PruningConfig(rules=[rule]))
    with pytest.raises(NothingToQuantizeError, match=r"pair \(a parameter of Bilinear"):
        achieved(model, PruningConfig(skip=["plain", "attention"]))


def test_nan_weights_are_refused_by_name() -> None:
    model, config = tiny("bert-classifier"), PruningConfig()
    model.get_parameter("bert.pooler.dense.weight").data[3, 4] = torch.nan
    with pytest.raises(WeightValueError, match=r"bert\.pooler\.dense holds 1 NaN"):
        check_targets(model, find_targets(model, config), config)


def test_frozen_weights_have_no_movement() -> None:
    model, config = tiny("bert-classifier"), PruningConfig(method="movement")
    model.get_parameter("bert.pooler.dense.weight").requires_grad_(False)
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense is frozen"):
        check_targets(model, find_targets(model, config), config)
    check_targets(model, find_targets(model, PruningConfig()), PruningConfig())


@pytest.mark.touches_rng  # adapters draw
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="has an adapter at"):
        named(model)


def test_report_counts_zeros_of_scope_and_model() -> None:
    model = tiny("bert-classifier")
    with torch.no_grad():
        model.get_parameter("bert.pooler.dense.weight")[:32] = 0
        model.get_parameter("bert.embeddings.word_embeddings.weight")[:64] = 0  # not in scope
    report = achieved(model, PruningConfig())
    zeros = 32 * 64
    assert report.zeros == zeros
    assert report.sparsity == zeros / sum(target.weight.count for target in named(model).values())
    assert report.model_sparsity == zeros / sum(value.numel() for value in model.parameters())
    assert {weight.name: weight.sparsity for weight in report.weights}["bert.pooler.dense"] == 0.5
    assert "Zeros alone make no model faster" in str(report)
