"""Distillation through a real Trainer: every task, and what the loss must not depend on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import hf_compress as hfc
from hf_compress.core.errors import ConfigError, LossError, ResumeError, TeacherError, TrainerError
from hf_compress.training.distillation import (
    DistillationCallback,
    DistillationConfig,
    DistillationMixin,
    DistillationTrainer,
    HiddenConfig,
    RelationConfig,
)
from hf_compress.training.distillation.tasks import task_of
from tests._utils.tiny import tiny
from tests.unit.training.distillation.runs import (
    CASES,
    ENCODER,
    Row,
    Rows,
    arguments,
    built,
    classified,
    difference,
    distilled,
    labelled_tokens,
    logged,
    parameters,
    stacked,
    texts,
)

pytestmark = [
    pytest.mark.touches_rng,  # Trainer draws
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]


def outputs(model: PreTrainedModel, batch: Row) -> Any:
    with torch.no_grad():
        return model.train()(**batch)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_one_written_out(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    student, teacher, rows = case.build(1), case.build(2), case.rows()
    batch = stacked(rows)
    own, other = outputs(student, batch), outputs(teacher, batch)
    assert task_of(student, own, batch.get("labels")) == case.task
    total, items = case.oracle(own, other, batch, 2.0)
    expected = case.alpha * float(total) / items
    if case.alpha < 1:
        expected += (1 - case.alpha) * float(own.loss) / (items if case.ctc else 1)
    if name == "gpt2":  # whose labels the Trainer counts before they are shifted
        expected *= items / int((batch["labels"] != -100).sum())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer = distilled(tmp_path, student, teacher, rows, DistillationConfig(alpha=case.alpha))
    # float32 forward passes, sums over up to 128 classes and 48 tokens
    assert logged(trainer)[0] == pytest.approx(expected, rel=2e-4)
    assert logged(trainer)[1] < logged(trainer)[0]
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(value.requires_grad or value.grad is not None for value in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("name", ["sequence", "masked", "causal", "ctc"])
def test_the_split_of_a_step_changes_nothing(name: str, tmp_path: Path) -> None:
    """1 × 4 = 4 × 1, although rows have different numbers of labels."""
    case = CASES[name]
    rows = [*case.rows()[:3], case.rows()[0]]
    results = []
    for size in (4, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        trainer = distilled(tmp_path, case.build(1), case.build(2), rows, options={**split, "max_grad_norm": 0.0})
        results.append((logged(trainer)[0], parameters(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)  # float32 sums in another order
    assert difference(results[0][1], results[1][1]) < 1e-5


def test_the_side_of_padding_changes_nothing(tmp_path: Path) -> None:
    """With rotary positions, which are relative, the models themselves don't care."""
    rows = labelled_tokens()
    turned = []
    for row in rows:
        length = int(row["attention_mask"].sum())
        turned.append({key: torch.cat((value[length:], value[:length])) for key, value in row.items()})
    config = DistillationConfig(alpha=1.0, hidden=HiddenConfig(), relations=RelationConfig())
    losses = []
    for some in (rows, turned):
        trainer = distilled(tmp_path, tiny("llama", num_hidden_layers=1), tiny("llama"), some, config)
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # rotations by other angles, in float32


def test_rows_without_labels_count_by_their_mask(tmp_path: Path) -> None:
    labelled = [{**row, "labels": torch.where(row["attention_mask"] == 1, row["input_ids"], -100)} for row in texts()]
    losses = []
    for rows in (labelled, texts()):
        config = DistillationConfig(alpha=1.0)
        losses.append(logged(distilled(tmp_path, tiny("llama", num_hidden_layers=1), tiny("llama"), rows, config)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("name", ["sequence", "causal"])
def test_without_a_share_it_is_plain_training(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plain = distilled(tmp_path, case.build(1), None, case.rows())
    taught = distilled(tmp_path, case.build(1), case.build(2), case.rows(), DistillationConfig(alpha=0.0))
    assert logged(taught) == pytest.approx(logged(plain), rel=1e-6)  # a mean, or a sum divided by the labels
    assert difference(parameters(taught), parameters(plain)) < 1e-7


@pytest.mark.parametrize("name", ["sequence", "causal", "answers"])
def test_evaluation_is_that_of_a_plain_trainer(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    losses = []
    for kind, taught in ((Trainer, {}), (DistillationTrainer, {"teacher": case.build(2)})):
        trainer = kind(model=case.build(1), args=arguments(tmp_path), train_dataset=Rows(case.rows()), **taught)
        losses.append(trainer.evaluate(Rows(case.rows()))["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("extra", [{"label_smoothing_factor": 0.1}, {}])
def test_losses_of_the_trainer_itself(extra: dict[str, Any], tmp_path: Path) -> None:
    """Label smoothing, and a function of the user's."""
    case = CASES["causal"]

    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        values = torch.nn.functional.cross_entropy(
            outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return values / num_items_in_batch

    more = {} if extra else {"compute_loss_func": mean}
    losses = {}
    for alpha, size in ((0.0, 4), (0.5, 4), (0.5, 1)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        config, options = DistillationConfig(alpha=alpha), {**split, **extra}
        trainer = distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options=options, **more)
        losses[alpha, size] = logged(trainer)[0]
    options = {**extra, "max_steps": 1}
    plain = logged(distilled(tmp_path, case.build(1), None, case.rows(), options=options, **more))[0]
    config = DistillationConfig(alpha=1.0)
    taught = logged(distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options=options, **more))[0]
    assert losses[0.0, 4] == pytest.approx(plain, rel=1e-5)
    assert losses[0.5, 4] == pytest.approx((plain + taught) / 2, rel=1e-5)
    assert losses[0.5, 1] == pytest.approx(losses[0.5, 4], rel=1e-5)


class Eager(Trainer):
    """A Trainer as other packages write them: it takes a name for a model, and changes the inputs."""

    def __init__(self, model: str | PreTrainedModel, args: Any = None, **kwargs: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        super().__init__(model=model, args=args, **kwargs)
        self.entropies: list[float] = []

    def compute_loss(  # type: ignore[no-untyped-def]
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        inputs["use_cache"] = False
        (loss, made) = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.entropies.append(float(torch.distributions.Categorical(logits=made.logits.detach()).entropy().mean()))
        return (loss, made) if return_outputs else loss


class Taught(DistillationMixin, Eager):
    pass


def test_in_front_of_another_trainer(tmp_path: Path) -> None:
    case = CASES["causal"]
    case.build(1).save_pretrained(tmp_path / "student")
    trainer = Taught(
        str(tmp_path / "student"),
        arguments(tmp_path),
        train_dataset=Rows(case.rows()),
        teacher=case.build(2),
        distillation=DistillationConfig(),
    )
    trainer.train()
    plain = distilled(tmp_path, case.build(1), case.build(2), case.rows())
    assert logged(trainer) == logged(plain)
    assert len(trainer.entropies) == 2


class TaughtSeq2Seq(DistillationMixin, Seq2SeqTrainer):
    pass


def test_in_front_of_seq2seq_trainer(tmp_path: Path) -> None:
    case = CASES["seq2seq"]
    options = arguments(tmp_path).to_dict() | {"predict_with_generate": True, "generation_max_length": 5}
    trainer = TaughtSeq2Seq(
        model=case.build(1),
        args=Seq2SeqTrainingArguments(**{key: value for key, value in options.items() if value is not None}),
        train_dataset=Rows(case.rows()),
        teacher=case.build(2),
    )
    trainer.train()
    assert logged(trainer) == logged(distilled(tmp_path, case.build(1), case.build(2), case.rows()))
    assert trainer.predict(Rows(case.rows())).predictions.shape[0] == 4


def test_teacher_is_no_part_of_what_is_saved_or_trained(tmp_path: Path) -> None:
    case = CASES["sequence"]
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = distilled(tmp_path, case.build(1), case.build(2), case.rows(), options=options)
    names = set(case.build(1).state_dict())
    assert set(trainer.model.state_dict()) == names
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == names
    trained = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert trained == {id(one) for one in trainer.model.parameters()}
    assert not trainer.model._forward_hooks


def test_teacher_draws_nothing(tmp_path: Path) -> None:
    """A student with dropout sees the same masks with and without a teacher that would have dropout, too."""
    losses = []
    for teacher in (None, tiny("bert-classifier").train()):
        student = tiny("bert-classifier", num_hidden_layers=1)
        losses.append(logged(distilled(tmp_path, student, teacher, classified(), DistillationConfig(alpha=0.0))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_quantized_teacher_of_its_own_type(tmp_path: Path) -> None:
    case = CASES["causal"]
    teacher = hfc.quantize(tiny("llama", dtype=torch.bfloat16), hfc.RTNQuantConfig(bits=8, group_size=32))
    trainer = distilled(tmp_path, case.build(1), teacher, case.rows(), DistillationConfig(alpha=1.0))
    dense = distilled(tmp_path, case.build(1), case.build(2), case.rows(), DistillationConfig(alpha=1.0))
    assert logged(trainer)[0] == pytest.approx(logged(dense)[0], rel=0.1)
    assert {value.dtype for value in teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [4, 8])
def test_teacher_of_another_library(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    case = CASES["causal"]
    case.build(2).save_pretrained(tmp_path / "teacher")
    asked = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", quantization_config=asked, device_map="cpu")
    trainer = distilled(tmp_path, case.build(1), teacher, case.rows(), DistillationConfig(alpha=1.0))
    losses = logged(trainer)
    assert losses[0] > losses[1] > 0
    assert teacher.hf_quantizer is not None


def test_hidden_states_and_relations_are_added(tmp_path: Path) -> None:
    case = CASES["masked"]
    losses = {}
    for name, extra in {
        "none": {},
        "hidden": {"hidden": HiddenConfig()},
        "both": {"hidden": HiddenConfig(weight=2.0), "relations": RelationConfig(heads=4)},
    }.items():
        config = DistillationConfig(**extra)
        trainer = distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options={"max_steps": 1})
        losses[name] = logged(trainer)[0]
    assert losses["none"] < losses["hidden"] < losses["both"]
    assert losses["both"] - losses["none"] > 2 * (losses["hidden"] - losses["none"])


def test_layers_weigh_the_same_however_a_step_is_split(tmp_path: Path) -> None:
    case = CASES["masked"]
    config = DistillationConfig(hidden=HiddenConfig(), relations=RelationConfig())
    losses = []
    for size in (4, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        losses.append(logged(distilled(tmp_path, case.build(1), case.build(2), case.rows(), config, options=split))[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("hidden", [False, True])
def test_resumed_run_is_the_same(hidden: bool, tmp_path: Path) -> None:
    """With dropout and Adam; with hidden states of another width, so that projections are learned, too."""
    config = DistillationConfig(hidden=HiddenConfig() if hidden else None)
    teacher = tiny("bert-classifier", hidden_size=96) if hidden else tiny("bert-classifier")
    options = {
        **{"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        **{"per_device_train_batch_size": 2, "warmup_steps": 1},
    }
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        student = tiny("bert-classifier", num_hidden_layers=1)
        trainer = distilled(tmp_path, student, teacher, classified(6), config, resume=resume, options=options)
        results.append(parameters(trainer))
        assert trainer.state.global_step == 4
    assert difference(*results) == 0.0
    assert set(load_file(tmp_path / "checkpoint-2" / "model.safetensors")) == set(student.state_dict())
    state = load_file(tmp_path / "checkpoint-2" / "hf_compress_state.safetensors")
    assert bool(state) == hidden
    with pytest.raises(ResumeError, match="alpha"):
        distilled(
            tmp_path,
            tiny("bert-classifier", num_hidden_layers=1),
            teacher,
            classified(6),
            config.model_copy(update={"alpha": 0.9}),
            resume=str(tmp_path / "checkpoint-2"),
            options=options,
        )


def test_resumed_from_another_directory(tmp_path: Path) -> None:
    case = CASES["sequence"]
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = distilled(tmp_path / "run", case.build(1), case.build(2), case.rows(), options=options)
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "moved")
    resumed = distilled(
        tmp_path / "other", case.build(1), case.build(2), case.rows(), resume=str(tmp_path / "moved"), options=options
    )
    assert difference(parameters(whole), parameters(resumed)) == 0.0


def test_a_model_made_by_model_init(tmp_path: Path) -> None:
    case = CASES["sequence"]
    trainer = DistillationTrainer(
        model_init=lambda: case.build(1),
        args=arguments(tmp_path),
        train_dataset=Rows(case.rows()),
        teacher=case.build(2),
    )
    trainer.train()
    assert logged(trainer) == logged(distilled(tmp_path, case.build(1), case.build(2), case.rows()))


def _nan(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    return model


def test_broken_teacher(tmp_path: Path) -> None:
    case = CASES["sequence"]
    student = case.build(1)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(LossError, match=r"\[HFC602\] The teacher's logits hold NaN"):
        distilled(tmp_path, student, _nan(case.build(2)), case.rows())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_broken_student(tmp_path: Path) -> None:
    case = CASES["sequence"]
    with pytest.raises(LossError, match="gradient"):
        distilled(tmp_path, _nan(case.build(1)), case.build(2), case.rows())


def test_set_up_wrongly(tmp_path: Path) -> None:
    case = CASES["sequence"]
    student = case.build(1)
    with pytest.raises(TeacherError, match="no teacher"):
        DistillationTrainer(model=student, args=arguments(tmp_path))
    with pytest.raises(TeacherError, match="is a str"):
        DistillationTrainer(model=student, args=arguments(tmp_path), teacher="bert-base-uncased")
    with pytest.raises(TeacherError, match="the student itself"):
        DistillationTrainer(model=student, args=arguments(tmp_path), teacher=student)
    with pytest.raises(TrainerError, match="two teachers"):
        DistillationTrainer(
            model=student,
            args=arguments(tmp_path),
            teacher=case.build(2),
            callbacks=[DistillationCallback(case.build(2))],
        )
    with pytest.raises(TrainerError, match="compiled"):
        DistillationTrainer(
            model=student,
            args=arguments(tmp_path, torch_compile=True),
            teacher=case.build(2),
            distillation=DistillationConfig(hidden=HiddenConfig()),
        )
    with pytest.raises(ConfigError, match="no labels: input_ids"):
        distilled(tmp_path, tiny("bert-classifier"), case.build(1), texts())


def test_heads_that_differ(tmp_path: Path) -> None:
    rows = labelled_tokens(classes=3)
    teacher = built("BertForTokenClassification", "bert", num_labels=3, **ENCODER)
    with pytest.raises(TeacherError, match=r"student's logits have the shape \(4, 3\), the teacher's \(4, 12, 3\)"):
        distilled(tmp_path, tiny("bert-classifier", **ENCODER), teacher, classified())
    config = DistillationConfig(task="classification", alpha=1.0)
    with pytest.raises(TrainerError, match=r"labels of the shape \(4, 12\)"):
        distilled(tmp_path, tiny("bert-classifier", **ENCODER), tiny("bert-classifier"), rows, config)


def test_settings_are_json(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model=tiny("bert-classifier"), args=arguments(tmp_path), teacher=tiny("bert-classifier")
    )
    settings = trainer.distiller.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["teacher"].startswith("BertForSequenceClassification of ")


def test_adapters_learn_from_a_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = CASES["causal"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig(bits=4, group_size=32))
    model = peft.get_peft_model(base, config)
    trainer = distilled(tmp_path, model, tiny("llama"), case.rows(), DistillationConfig(alpha=1.0))
    losses = logged(trainer)
    assert losses[0] > losses[1] > 0
    assert isinstance(base, transformers.LlamaForCausalLM)
