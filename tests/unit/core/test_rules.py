from __future__ import annotations

from typing import Any

import pytest

from hf_compress.core.config import QuantFields, Rule, UniformFields
from hf_compress.core.errors import PatternError, RuleError
from hf_compress.core.rules import Decision, matcher, resolve
from hf_compress.core.weights import Weight, list_weights
from tests._utils.tiny import tiny

NAME = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def llama() -> list[Weight]:
    return list_weights(tiny("llama"))


def decide(weights: list[Weight], **fields: Any) -> dict[str, Decision]:
    return resolve(UniformFields(**fields), weights)


def kept(decisions: dict[str, Decision]) -> set[str]:
    return {name for name, decision in decisions.items() if decision.keep}


@pytest.mark.parametrize(
    "pattern",
    [
        NAME,
        "k_proj",
        "self_attn",
        "layers.0",
        "0",
        "model",
        "*",
        "*_proj",
        "k_*",
        "?_proj",
        "[kq]_proj",
        "layers.*.k_proj",
        "layers.*",
        "model.*.k_proj",
        "self_attn.k_proj",
        "re:.*k_proj",
        "re:model",
        r"re:.*layers\.\d+\.self_attn",
        "re:",
    ],
)
def test_matches(pattern: str) -> None:
    assert matcher(pattern)(NAME)


@pytest.mark.parametrize(
    "pattern",
    [
        "proj",
        "k",
        "_proj",
        "attn",
        "layer",
        "layers.1",
        "layers.0.k_proj",
        "model.layers.0.self",
        "K_PROJ",
        "k_proj.weight",
        "[!k]_proj",
        "re:k_proj",
        "re:.*k_proj.+",
        "re:.*K_PROJ",
    ],
)
def test_does_not_match(pattern: str) -> None:
    assert not matcher(pattern)(NAME)


def test_digits_are_whole_parts() -> None:
    assert not matcher("layers.1")("model.layers.10.mlp")
    assert matcher("layers.1?")("model.layers.10.mlp")


def test_dots_of_a_glob_are_dots() -> None:
    assert not matcher("self.attn")("self_attn")


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[a"])
def test_broken_expression(pattern: str, llama: list[Weight]) -> None:
    with pytest.raises(PatternError, match="is not a regular expression"):
        decide(llama, skip=[pattern])


def test_defaults_keep_heads_and_embeddings(llama: list[Weight]) -> None:
    decisions = decide(llama)
    assert kept(decisions) == {"lm_head", "model.embed_tokens"}
    assert decisions["lm_head"].by_default
    assert "head" in decisions["lm_head"].reason
    assert decisions[NAME] == Decision(keep=False, reason="in scope")


def test_defaults_keep_routers() -> None:
    decisions = decide(list_weights(tiny("qwen3-moe", num_hidden_layers=1)))
    assert decisions["model.layers.0.mlp.gate"].reason == "default rule: router"


def test_user_rules_add_to_the_defaults(llama: list[Weight]) -> None:
    decisions = decide(llama, skip=["k_proj"])
    assert kept(decisions) == {"lm_head", "model.embed_tokens", NAME, NAME.replace("0", "1")}
    assert not decisions[NAME].by_default
    assert decisions[NAME].reason == "rule 'k_proj'"


def test_without_defaults(llama: list[Weight]) -> None:
    assert kept(decide(llama, default_rules=False)) == set()
    assert kept(decide(llama, default_rules=False, skip=["lm_head"])) == {"lm_head"}


def test_embeddings_int8_lets_only_embeddings_in(llama: list[Weight]) -> None:
    decisions = decide(llama, embeddings="int8")
    assert kept(decisions) == {"lm_head"}
    assert decisions["model.embed_tokens"].reason == 'embeddings="int8"'


def test_a_rule_takes_back_a_default(llama: list[Weight]) -> None:
    decisions = decide(llama, rules=[Rule(pattern="lm_head", keep=False)])
    assert not decisions["lm_head"].keep
    assert decisions["lm_head"].reason == "rule 'lm_head'"


def test_last_match_wins(llama: list[Weight]) -> None:
    rules = [
        Rule(pattern="self_attn", bits=8),
        Rule(pattern="layers.0", bits=3),
        Rule(pattern="k_proj", group_size=32),
    ]
    decisions = decide(llama, rules=rules)
    assert decisions[NAME].settings == {"bits": 3, "group_size": 32}
    assert decisions["model.layers.1.self_attn.k_proj"].settings == {"bits": 8, "group_size": 32}
    assert decisions["model.layers.1.self_attn.q_proj"].settings == {"bits": 8}
    assert decisions["model.layers.1.mlp.up_proj"].settings == {}
    turned = decide(llama, rules=[rules[1], rules[0]])
    assert turned[NAME].settings == {"bits": 8}


def test_rules_come_after_skip(llama: list[Weight]) -> None:
    decisions = decide(llama, skip=["self_attn"], rules=[Rule(pattern="k_proj", keep=False)])
    assert not decisions[NAME].keep
    assert decisions[NAME.replace("k_proj", "q_proj")].keep
    again = decide(llama, rules=[Rule(pattern="k_proj", keep=False), Rule(pattern="self_attn", keep=True)])
    assert again[NAME].keep


def test_keeping_drops_earlier_settings(llama: list[Weight]) -> None:
    rules = [
        Rule(pattern="self_attn", bits=8),
        Rule(pattern="k_proj", keep=True),
        Rule(pattern="k_proj", keep=False),
    ]
    assert decide(llama, rules=rules)[NAME].settings == {}


def test_taking_back_and_setting_in_one_rule(llama: list[Weight]) -> None:
    decisions = decide(llama, rules=[Rule(pattern="lm_head", keep=False, bits=8, symmetric=False)])
    assert decisions["lm_head"].settings == {"bits": 8, "symmetric": False}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("k_porj", "'k_proj'"),
        ("lm_haed", "'lm_head'"),
        ("model.layers.0.self_attn.k_prj", f"'{NAME}'"),
        ("re:.*embed_token$", "'embed_tokens'"),
        ("k_proj.weight", "'k_proj'"),
    ],
)
@pytest.mark.parametrize("through", ["skip", "rules"])
def test_unmatched_pattern_names_the_nearest(pattern: str, near: str, through: str, llama: list[Weight]) -> None:
    fields = {"skip": [pattern]} if through == "skip" else {"rules": [Rule(pattern=pattern, bits=8)]}
    with pytest.raises(PatternError, match="matches none of the model's 16 weights") as caught:
        decide(llama, **fields)
    assert near in str(caught.value)
    assert caught.value.code == "HFC201"


def test_rule_that_says_nothing(llama: list[Weight]) -> None:
    with pytest.raises(RuleError, match="'k_proj' changes nothing"):
        decide(llama, rules=[Rule(pattern="k_proj")])


@pytest.mark.parametrize("setting", [{"bits": 8}, {"group_size": 32}, {"symmetric": True}])
def test_rule_that_contradicts_itself(setting: dict[str, Any], llama: list[Weight]) -> None:
    with pytest.raises(RuleError, match=f"keeps weights and also sets {next(iter(setting))}"):
        decide(llama, rules=[Rule(pattern="k_proj", keep=True, **setting)])


def test_rule_that_reaches_only_kept_weights(llama: list[Weight]) -> None:
    with pytest.raises(RuleError, match="every weight it matches is kept") as caught:
        decide(llama, rules=[Rule(pattern="lm_head", bits=8)])
    assert "keep=False" in caught.value.fix
    with pytest.raises(RuleError, match=r"kept \(rule 'self_attn'\)"):
        decide(llama, skip=["self_attn"], rules=[Rule(pattern="k_proj", bits=8)])


def test_rule_that_reaches_some_kept_weights_is_fine(llama: list[Weight]) -> None:
    decisions = decide(llama, rules=[Rule(pattern="*", bits=8)])
    assert decisions["lm_head"].keep
    assert decisions[NAME].settings == {"bits": 8}


def test_a_later_rule_may_rescue_an_earlier_one(llama: list[Weight]) -> None:
    rules = [Rule(pattern="lm_head", bits=8), Rule(pattern="lm_head", keep=False)]
    assert decide(llama, rules=rules)["lm_head"].settings == {"bits": 8}


def test_order_of_decisions_is_the_model_s(llama: list[Weight]) -> None:
    decisions = resolve(QuantFields(), llama)
    assert list(decisions) == [weight.name for weight in llama]
