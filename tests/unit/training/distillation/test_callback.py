"""Distillation with a plain Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_compress.core.errors import ConfigError, LossError, TrainerError
from hf_compress.training.distillation import (
    DistillationCallback,
    DistillationConfig,
    HiddenConfig,
    RelationConfig,
)
from tests._utils.tiny import tiny
from tests.unit.training.distillation.runs import (
    CASES,
    Rows,
    arguments,
    classified,
    difference,
    distilled,
    logged,
    parameters,
    texts,
)

pytestmark = pytest.mark.touches_rng  # Trainer draws


def with_callback(
    folder: Path, name: str, config: DistillationConfig, resume: str | None = None, **options: Any
) -> Any:
    """A run of a plain Trainer with the callback, on a student and a teacher of one task."""
    case = CASES[name]
    callback = DistillationCallback(case.build(2), config)
    rows = case.rows()
    return distilled(folder, case.build(1), None, rows, resume=resume, options=options, callbacks=[callback])


@pytest.mark.parametrize(
    ("name", "alpha"), [("sequence", 0.3), ("causal", 0.3), ("causal", 1.0), ("answers", 0.3), ("seq2seq", 1.0)]
)
def test_agrees_with_the_trainer(name: str, alpha: float, tmp_path: Path) -> None:
    case, config = CASES[name], DistillationConfig(alpha=alpha, loss="reverse_kl")
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    ours = with_callback(tmp_path, name, config, **options)
    theirs = distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options=options)
    assert type(ours) is Trainer
    assert logged(ours) == logged(theirs)
    assert difference(parameters(ours), parameters(theirs)) == 0.0


def test_agrees_with_the_trainer_under_autocast(tmp_path: Path) -> None:
    case, config = CASES["causal"], DistillationConfig()
    ours = with_callback(tmp_path, "causal", config, bf16=True)
    theirs = distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options={"bf16": True})
    assert difference(parameters(ours), parameters(theirs)) == 0.0
    full = with_callback(tmp_path, "causal", config)
    assert difference(parameters(ours), parameters(full)) > 0.0


def test_dropout_is_the_same_too(tmp_path: Path) -> None:
    config = DistillationConfig()
    rows = classified()
    students = [tiny("bert-classifier", num_hidden_layers=1) for _ in range(2)]
    callback = DistillationCallback(tiny("bert-classifier"), config)
    ours = distilled(tmp_path, students[0], None, rows, callbacks=[callback])
    theirs = distilled(tmp_path, students[1], tiny("bert-classifier"), rows, config)
    assert difference(parameters(ours), parameters(theirs)) == 0.0


def test_resumed_run_is_the_same(tmp_path: Path) -> None:
    options = {
        **{"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        **{"per_device_train_batch_size": 2},
    }
    config = DistillationConfig()
    whole = with_callback(tmp_path, "sequence", config, **options)
    resumed = with_callback(tmp_path, "sequence", config, str(tmp_path / "checkpoint-2"), **options)
    assert difference(parameters(whole), parameters(resumed)) == 0.0


def test_evaluation_is_that_of_a_plain_trainer(tmp_path: Path) -> None:
    """Also in the middle of training, while the hooks are there."""
    case = CASES["causal"]
    losses = []
    for alpha in (0.0, 1.0):
        callback = DistillationCallback(case.build(2), DistillationConfig(alpha=alpha))
        trainer = Trainer(
            model=case.build(1),
            args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=0.0),
            train_dataset=Rows(case.rows()),
            eval_dataset=Rows(case.rows()),
            callbacks=[callback],
        )
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert losses[0][0] == losses[0][1]


def test_hooks_are_gone_afterwards_and_copies_share_the_teacher(tmp_path: Path) -> None:
    case = CASES["sequence"]
    copies = []

    class Copies(DistillationCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            hooks = [[*one._forward_hooks.values()] for one in (model, copy.deepcopy(model))]
            copies.append(len(hooks[0]) == 1 and hooks[0][0] is hooks[1][0])

    student, callback = case.build(1), Copies(case.build(2))
    distilled(tmp_path, student, None, case.rows(), callbacks=[callback])
    assert copies == [True, True]
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    names = set(case.build(1).state_dict())
    assert set(student.state_dict()) == names


def test_added_late_it_works_as_well(tmp_path: Path) -> None:
    case, config = CASES["sequence"], DistillationConfig()
    trainer = Trainer(model=case.build(1), args=arguments(tmp_path), train_dataset=Rows(case.rows()))
    trainer.add_callback(DistillationCallback(case.build(2), config))
    trainer.train()
    assert difference(parameters(trainer), parameters(with_callback(tmp_path, "sequence", config))) == 0.0


@pytest.mark.parametrize(
    "config", [DistillationConfig(hidden=HiddenConfig()), DistillationConfig(relations=RelationConfig())]
)
def test_losses_on_layers_are_refused(config: DistillationConfig) -> None:
    with pytest.raises(ConfigError, match="loss on outputs only"):
        DistillationCallback(tiny("bert-classifier"), config)


def test_losses_of_the_trainer_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="label_smoothing_factor"):
        with_callback(tmp_path, "sequence", DistillationConfig(), label_smoothing_factor=0.1)
    callback = DistillationCallback(tiny("bert-classifier"))
    with pytest.raises(TrainerError, match="returned no loss"):
        distilled(
            tmp_path,
            tiny("bert-classifier", num_hidden_layers=1),
            None,
            classified(),
            callbacks=[callback],
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs["logits"].mean(),
        )


def test_broken_teacher(tmp_path: Path) -> None:
    teacher = tiny("bert-classifier")
    with torch.no_grad():
        teacher.classifier.bias[0] = torch.nan
    with pytest.raises(LossError, match="teacher's logits"):
        distilled(tmp_path, tiny("bert-classifier"), None, classified(), callbacks=[DistillationCallback(teacher)])


def test_rows_without_labels(tmp_path: Path) -> None:
    """A plain Trainer needs a loss of the model, which the teacher gives."""
    config = DistillationConfig(alpha=1.0)
    rows = texts()
    callback = DistillationCallback(tiny("llama"), config)
    ours = distilled(tmp_path, tiny("llama", num_hidden_layers=1), None, rows, callbacks=[callback])
    theirs = distilled(tmp_path, tiny("llama", num_hidden_layers=1), tiny("llama"), rows, config)
    assert difference(parameters(ours), parameters(theirs)) == 0.0


@pytest.mark.slow
def test_compiled_student(tmp_path: Path) -> None:
    pytest.importorskip("torch._dynamo")
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    ours = with_callback(tmp_path, "causal", DistillationConfig(), **options)
    plain = with_callback(tmp_path, "causal", DistillationConfig())
    assert logged(ours) == pytest.approx(logged(plain), rel=1e-5)


def test_settings_tell_of_the_teacher() -> None:
    small, large = (DistillationCallback(tiny("llama", num_hidden_layers=n)).settings() for n in (1, 2))
    assert small["teacher"] != large["teacher"]
