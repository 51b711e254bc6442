"""What a configuration accepts, and what it says when it doesn't."""

from __future__ import annotations

from typing import Any

import pytest

from hf_compress.core.errors import ConfigError
from hf_compress.training.distillation import DistillationConfig, HiddenConfig, RelationConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": True}, "alpha=True"),
        ({"loss": "kl"}, "loss='kl'"),
        ({"loss": "jsd", "beta": 2.0}, "beta=2.0"),
        ({"beta": 0.3}, "'forward_kl' has no beta"),
        ({"chunk": 0}, "chunk=0"),
        ({"task": "translation"}, "task='translation'"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
        ({"hidden": {"weight": -1.0}}, "hidden"),
    ],
)
def test_impossible_values(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"\[HFC202\]") as caught:
        DistillationConfig(**values)
    assert said in str(caught.value)


def test_values_go_through_json() -> None:
    config = DistillationConfig(
        temperature=4, alpha=1, loss="jsd", beta=0.25, hidden=HiddenConfig(layers="last"), relations=RelationConfig()
    )
    again = DistillationConfig(**config.model_dump(mode="json"))
    assert again == config
    assert (config.temperature, config.alpha) == (4.0, 1.0)


def test_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DistillationConfig().alpha = 0.0  # type: ignore[misc]
