"""Distillation with a plain Trainer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

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
    stacked,
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
            copies.append(len(hooks[0]) == 1 and hooks[0] == hooks[1])

    student, callback = case.build(1), Copies(case.build(2))
    distilled(tmp_path, student, None, case.rows(), callbacks=[callback])
    assert copies == [True, True]
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    names = set(case.build(1).state_dict())
    assert set(student.state_dict()) == names


def test_added_late_it_is_refused(tmp_path: Path) -> None:
    case = CASES["sequence"]
    trainer = Trainer(model=case.build(1), args=arguments(tmp_path), train_dataset=Rows(case.rows()))
    trainer.add_callback(DistillationCallback(case.build(2)))
    with pytest.raises(TrainerError, match="DistillationCallback was added after the Trainer had been built"):
        trainer.train()


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    case = CASES["sequence"]
    callbacks = [DistillationCallback(case.build(2)) for _ in range(2)]
    with pytest.raises(TrainerError, match="two callbacks that keep 'distillation' state"):
        distilled(tmp_path, case.build(1), None, case.rows(), callbacks=callbacks)


class OwnLoss(Trainer):
    """Computes the loss from the logits."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"])


@pytest.mark.parametrize(
    ("kind", "alpha", "more"),
    [
        (OwnLoss, 0.5, {}),
        (OwnLoss, 1.0, {}),
        (Trainer, 1.0, {"compute_loss_func": lambda outputs, labels, **kwargs: outputs["logits"].mean()}),
    ],
)
def test_loss_that_is_not_the_models_is_refused_before_a_step(
    kind: type[Trainer], alpha: float, more: dict[str, Any], tmp_path: Path
) -> None:
    student, callback = CASES["sequence"].build(1), DistillationCallback(CASES["sequence"].build(2))
    callback.distiller.config = DistillationConfig(alpha=alpha)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    with pytest.raises(TrainerError, match="learns nothing of the teacher"):
        distilled(tmp_path, student, None, classified(), kind=kind, callbacks=[callback], **more)
    assert all(torch.equal(before[name], value) for name, value in student.named_parameters())


class LooksFirst(Trainer):
    """Looks at the outputs without gradients before it computes the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model(**inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_forward_pass_without_gradients_is_not_taught(tmp_path: Path) -> None:
    case, runs = CASES["sequence"], []
    for kind in (Trainer, LooksFirst):
        callback = DistillationCallback(case.build(2))
        runs.append(distilled(tmp_path, case.build(1), None, case.rows(), kind=kind, callbacks=[callback]))
    assert difference(*map(parameters, runs)) == 0.0


class Interrupted(Trainer):
    """Stops training between a forward and a backward pass."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        super().compute_loss(*args, **kwargs)
        raise KeyboardInterrupt


class Interrupting(TrainerCallback):
    """Stops training between steps, as a user does."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class Stumbling(torch.autograd.Function):
    """Stops training in a backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise MemoryError


@pytest.mark.parametrize("where", ["step", "forward", "loss", "backward", "teacher"])
def test_hooks_are_dead_after_an_interruption(where: str, tmp_path: Path) -> None:
    """The model's loss is its own again."""
    case = CASES["sequence"]
    student, teacher = case.build(1), case.build(2)
    batch = stacked(case.rows())
    more: list[TrainerCallback] = [Interrupting()] if where == "step" else []
    handles = []
    if where in ("forward", "teacher"):
        stopped = student if where == "forward" else teacher
        handles = [stopped.classifier.register_forward_hook(_stop)]
    elif where == "backward":
        handles = [student.classifier.register_forward_hook(lambda _, __, output: Stumbling.apply(output))]
    kind = Interrupted if where == "loss" else Trainer
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        distilled(tmp_path, student, None, case.rows(), kind=kind, callbacks=[DistillationCallback(teacher), *more])
    for handle in handles:
        handle.remove()
    made = student.train()(**batch)  # with gradients, as in training
    own = torch.nn.functional.cross_entropy(made.logits, batch["labels"])
    assert float(made.loss.detach()) == float(own.detach())


def _stop(module: torch.nn.Module, args: Any, output: Any) -> None:
    raise KeyboardInterrupt


def test_pickled_in_training(tmp_path: Path) -> None:
    """Without the teacher, and with hooks that do nothing."""
    sizes, losses = [], []

    class Pickles(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            file = io.BytesIO()
            torch.save(model, file)
            sizes.append(file.tell())
            file.seek(0)
            batch = stacked(case.rows())
            made = torch.load(file, weights_only=False).train()(**batch)
            own = torch.nn.functional.cross_entropy(made.logits, batch["labels"])
            losses.append((float(made.loss.detach()), float(own.detach())))

    case = CASES["sequence"]
    callback = DistillationCallback(case.build(2))
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1}
    student = case.build(1)
    torch.save(student, plain := io.BytesIO())
    distilled(tmp_path, student, None, case.rows(), options=options, callbacks=[callback, Pickles()])
    assert len(losses) == 1
    assert losses[0][0] == losses[0][1]
    values = sum(value.numel() for value in callback.distiller.teacher.model.parameters())
    assert sizes[0] < plain.tell() + values  # bytes; the teacher has four for each value, and some are gradients


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
