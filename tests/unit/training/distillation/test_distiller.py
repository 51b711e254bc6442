"""What is known of a teacher: its type, its weights, and the inputs that only it takes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

import hf_compress as hfc
from hf_compress.core.errors import ConfigError, ResumeError
from hf_compress.training.distillation import DistillationCallback, DistillationConfig, DistillationTrainer
from hf_compress.training.distillation.distiller import Distiller
from tests._utils.tiny import SEED, tiny
from tests.unit.training.distillation.runs import CASES, ENCODER, arguments, built, classified, distilled, logged


def test_types_are_checked_when_built() -> None:
    teacher = tiny("bert-classifier")
    with pytest.raises(ConfigError, match=r"a dict, not a DistillationConfig.*DistillationConfig\(\*\*"):
        DistillationTrainer(model=teacher, teacher=teacher, distillation={"alpha": 1.0})
    with pytest.raises(ConfigError, match="a dict, not a DistillationConfig"):
        DistillationCallback(teacher, {"alpha": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a str, not a tokenizer.*AutoTokenizer\.from_pretrained"):
        DistillationCallback(teacher, teacher_tokenizer="bert-base-uncased")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_settings_tell_teachers_apart(packed: bool, dtype: torch.dtype) -> None:
    def told(seed: int) -> Any:
        teacher = built("LlamaForCausalLM", "llama", seed).to(dtype)
        if packed:
            teacher = hfc.quantize(teacher, hfc.RTNQuantConfig(bits=4, group_size=32))
        return Distiller(teacher).settings()["teacher"]

    assert told(SEED) == told(SEED)
    assert told(SEED) != told(SEED + 1)


@pytest.mark.touches_rng  # Trainer draws
def test_another_teacher_on_resume_is_refused(tmp_path: Path) -> None:
    case = CASES["sequence"]
    teacher = case.build(2)
    options = {"save_strategy": "steps", "save_steps": 1}
    distilled(tmp_path, case.build(1), teacher, case.rows(), options=options)
    resume = str(tmp_path / "checkpoint-1")
    distilled(tmp_path, case.build(1), copy.deepcopy(teacher), case.rows(), resume=resume, options=options)
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
    with pytest.raises(ResumeError, match="teacher"):
        distilled(tmp_path, case.build(1), teacher, case.rows(), resume=resume, options=options)


def pairs() -> Dataset:
    """Pairs of sentences, as tokens with the number of the sentence."""
    rows = [{name: value.tolist() for name, value in row.items()} for row in classified()]
    return Dataset.from_list([{**row, "token_type_ids": [0] * 6 + [1] * 6} for row in rows])


def student() -> PreTrainedModel:
    """A student that knows no token types."""
    return tiny("distilbert", n_layers=1, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3)


def noted(teacher: PreTrainedModel) -> list[Tensor | None]:
    """Keeps the token types that a teacher is called with."""
    seen: list[Tensor | None] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("token_type_ids"))

    teacher.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.touches_rng  # Trainer draws
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_teacher_sees_inputs_that_only_it_takes(alpha: float, remove: bool, tmp_path: Path) -> None:
    teacher = tiny("bert-classifier", **ENCODER)
    seen = noted(teacher)
    trainer = DistillationTrainer(
        model=student(),
        args=arguments(tmp_path, remove_unused_columns=remove),
        train_dataset=pairs(),
        eval_dataset=pairs(),
        teacher=teacher,
        distillation=DistillationConfig(alpha=alpha),
    )
    trainer.train()
    assert len(seen) == 2
    assert all(types is not None and types.tolist() == [[0] * 6 + [1] * 6] * 4 for types in seen)
    assert trainer.evaluate()["eval_loss"] > 0
    unlabelled = pairs().remove_columns("labels")
    assert trainer.predict(unlabelled).predictions.shape == (4, 3)
    assert logged(trainer)[0] > 0


@pytest.mark.touches_rng  # Trainer draws
@pytest.mark.parametrize("knows", [False, True])
def test_callback_warns_of_token_types(knows: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny("bert-classifier", **ENCODER)
    model = tiny("bert-classifier", num_hidden_layers=1) if knows else student()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=True, max_steps=1),
        train_dataset=pairs(),
        callbacks=[DistillationCallback(teacher)],
    )
    with caplog.at_level(logging.WARNING, "hf_compress"):
        trainer.train()
    assert ("token_type_ids" in caplog.text) != knows
