"""When is pruned, and how many values: functions of the optimizer steps done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_compress.core.errors import ConfigError
from hf_compress.training.pruning.config import PruningConfig
from hf_compress.training.pruning.schedule import Schedule
from hf_compress.training.pruning.targets import Target, find_targets


def targets(config: PruningConfig) -> tuple[Target, ...]:
    with torch.device("meta"):  # no values, so nothing is drawn
        model = nn.Sequential(nn.Linear(40, 25), nn.Linear(24, 10))
    return find_targets(model, config)


def test_cubic_values_at_the_steps_that_are_due() -> None:
    config = PruningConfig(sparsity=0.8, initial=0.1, start=10, end=25, every=4)
    schedule = Schedule(config, 100)
    assert [step for step in range(101) if schedule.is_due(step)] == [10, 14, 18, 22, 25]
    for step in (10, 14, 18, 22, 25):
        s = 0.8 + (0.1 - 0.8) * (1 - (step - 10) / 15) ** 3
        assert schedule.demanded(targets(config), step) == [round(1000 * s), round(240 * s)]
    assert schedule.demanded(targets(config), None) == [800, 192]


def test_last_due_is_the_last_step_that_was_due() -> None:
    schedule = Schedule(PruningConfig(start=3, end=11, every=3), 20)
    due = [step for step in range(21) if schedule.is_due(step)]
    for step in range(21):
        assert schedule.last_due(step) == max((one for one in due if one <= step), default=None)
        assert schedule.is_fixed(step) == (step >= 11)


def test_patterns_fill_groups_one_by_one() -> None:
    config = PruningConfig(pattern="2:4", start=0, end=8, every=1)
    schedule = Schedule(config, 10)
    per_group = [schedule.demanded(targets(config), step)[0] / 250 for step in range(9)]
    assert per_group == [0, 1, 1, 2, 2, 2, 2, 2, 2]  # round(4 · 0.5 · (1 - (1 - t/8)³))


def test_global_count_is_that_of_all() -> None:
    config = PruningConfig(sparsity=0.3, scope="global", start=0, end=0)
    assert sum(Schedule(config, 10).demanded(targets(config), 0)) == 372


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"end": 21}, "end=21 lies beyond the end of training, which has 20"),
        ({"start": 30, "end": 40}, "start=30 lies beyond"),
        ({"start": 15, "end": 0.5}, "start=15 is step 15, behind end=0.5, step 10 of 20"),
        ({"method": "movement", "start": 0, "end": 0}, "nothing has moved yet"),
        ({"method": "movement", "start": 0, "initial_scores": "zero"}, "nothing has moved yet"),
    ],
)
def test_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(PruningConfig(**values), 20)
    assert said in str(caught.value)
