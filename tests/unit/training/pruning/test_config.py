"""What pruning can be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from hf_compress.core.errors import ConfigError
from hf_compress.training.pruning.config import PruningConfig, PruningRule


def test_sparsity_follows_from_the_pattern() -> None:
    assert PruningConfig().sparsity == 0.5
    assert PruningConfig(pattern="1:4").sparsity == 0.75
    assert PruningConfig(pattern="1:3", sparsity=2 / 3).group == (1, 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": 50}, "sparsity=50"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": "0.5"}, "sparsity='0.5'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "has a sparsity of 0.5"),
        ({"pattern": "4:2"}, "not N:M"),
        ({"pattern": "4:4"}, "not N:M"),
        ({"pattern": "0:4"}, "not N:M"),
        ({"pattern": "half"}, "not N:M"),
        ({"pattern": "2:4", "scope": "global"}, "no global threshold"),
        ({"initial": 0.6}, "initial=0.6 is above sparsity=0.5"),
        ({"start": 0.8, "end": 0.7}, "start=0.8 lies behind end=0.7"),
        ({"start": 8, "end": 7}, "start=8 lies behind end=7"),
        ({"start": -1}, "start=-1"),
        ({"end": 1.5}, "end=1.5"),
        ({"every": 0}, "every=0"),
        ({"method": "wanda"}, "method='wanda'"),
        ({"score_learning_rate": 0.0}, "score_learning_rate=0.0"),
        ({"sparcity": 0.5}, "Did you mean 'sparsity'"),
        ({"skip": "head"}, "is not a list"),
        ({"rules": [{"pattern": "query", "sparcity": 0.5}]}, "sparcity"),
        ({"rules": [{"pattern": "query", "sparsity": 2.0}]}, "sparsity=2.0"),
        ({"pattern": "2:4", "rules": [{"pattern": "query", "sparsity": 0.2}]}, "can't be with pattern='2:4'"),
        ({"scope": "global", "rules": [{"pattern": "query", "sparsity": 0.2}]}, "can't be with scope='global'"),
    ],
)
def test_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruningConfig(**values)
    assert said in str(caught.value)
    assert caught.value.fix


def test_frozen_and_serialisable() -> None:
    config = PruningConfig(method="movement", rules=[PruningRule(pattern="query", sparsity=0.25)], start=3, end=0.5)
    assert PruningConfig(**config.model_dump(mode="json")) == config
    assert config.rules[0].settings() == {"sparsity": 0.25}
