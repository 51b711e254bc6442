"""What a distillation asks of the outputs: only what it compares, and of the kind that the task means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.errors import ConfigError, TeacherError, TrainerError
from hf_compress.training.distillation import DistillationConfig, HiddenConfig, RelationConfig
from hf_compress.training.distillation.config import Task
from hf_compress.training.distillation.matching import Matching
from tests._utils.tiny import tiny
from tests.unit.training.distillation.runs import (
    CASES,
    ENCODER,
    classified,
    difference,
    distilled,
    labelled_tokens,
    logged,
    parameters,
    stacked,
    texts,
)

pytestmark = pytest.mark.touches_rng  # Trainer draws

LAYERED = {"hidden": HiddenConfig(), "relations": RelationConfig(heads=4)}


def layer_losses(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """The losses on layers, a mean over rows."""
    matching = Matching(student, teacher, LAYERED["hidden"], LAYERED["relations"])
    with torch.no_grad(), matching.watching(student, teacher) as watched:
        student.train()(**batch)
        teacher.eval()(**batch)
        return float(sum(rows.mean() for rows in matching.losses(watched, batch).values()))


def test_embeddings_of_another_width_follow_the_hint(tmp_path: Path) -> None:
    student = tiny("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4, **ENCODER)
    teacher = tiny("bert", **ENCODER)
    assert student.config.hidden_size != teacher.config.hidden_size
    with pytest.raises(TeacherError, match=r"alpha=0\.0, hidden=HiddenConfig\(\)"):
        distilled(tmp_path, student, teacher, texts(), DistillationConfig(alpha=1.0))
    config = DistillationConfig(alpha=0.0, hidden=HiddenConfig())
    losses = logged(distilled(tmp_path, student, teacher, texts(), config))
    assert losses[0] > losses[1] > 0


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("teacher", ["headless", "another head"])
def test_layers_alone_need_no_comparable_head(teacher: str, labelled: bool, tmp_path: Path) -> None:
    student = tiny("bert-classifier", num_hidden_layers=1, **ENCODER)
    other = tiny("bert", **ENCODER) if teacher == "headless" else tiny("bert-classifier", num_labels=5, **ENCODER)
    rows = classified() if labelled else texts()
    expected = layer_losses(student, other, stacked(texts()))
    if labelled:
        with torch.no_grad():
            expected += float(student.train()(**stacked(rows)).loss)
    trainer = distilled(tmp_path, student, other, rows, DistillationConfig(alpha=0.0, **LAYERED))
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)  # float32, in another order


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no labels: input_ids"):
        distilled(tmp_path, tiny("bert-classifier"), tiny("bert"), texts(), DistillationConfig(alpha=0.0))


@pytest.mark.parametrize("name", ["sequence", "causal", "answers"])
def test_alpha_0_is_the_plain_trainer(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    taught = distilled(tmp_path, case.build(1), case.build(2), case.rows(), DistillationConfig(alpha=0.0))
    plain = distilled(tmp_path, case.build(1), None, case.rows())
    assert difference(parameters(taught), parameters(plain)) < 1e-7  # sums of float32 in another order


@pytest.mark.parametrize("hidden", [None, HiddenConfig()])
def test_batch_in_which_nothing_counts(hidden: HiddenConfig | None, tmp_path: Path) -> None:
    case = CASES["masked"]
    first, second = case.rows()[:2]
    rows = [{**first, "labels": torch.full_like(first["labels"], -100)}, second]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    config = DistillationConfig(alpha=0.0, hidden=hidden)
    made = distilled(tmp_path, case.build(1), case.build(2), rows, config, options=options)
    alone = {**options, "gradient_accumulation_steps": 1}
    only = distilled(tmp_path, case.build(1), case.build(2), [second], config, options=alone)
    assert difference(parameters(made), parameters(only)) < 1e-7  # sums of float32 in another order


@pytest.mark.parametrize(
    ("task", "case", "rows", "said"),
    [
        ("causal_lm", "sequence", classified(), r"'causal_lm' takes logits of 3 dimensions.*\(4, 3\)"),
        ("token_classification", "sequence", classified(), "3 dimensions"),
        ("ctc", "sequence", texts(), "3 dimensions"),
        ("classification", "causal", labelled_tokens(), r"2 dimensions.*\(4, 12, 128\)"),
        ("multi_label", "causal", texts(), "2 dimensions"),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_task_of_other_dimensions(task: Task, case: str, rows: Any, said: str, alpha: float, tmp_path: Path) -> None:
    build = CASES[case].build
    config = DistillationConfig(task=task, alpha=alpha, hidden=HiddenConfig())
    with pytest.raises(TrainerError, match=said):
        distilled(tmp_path, build(1), build(2), rows, config)
