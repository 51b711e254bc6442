"""`QATCallback` in real trainings: phases, resuming, checkpoints, and what comes out at the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

import hf_compress as hfc
from hf_compress.apply.planning import is_quantized
from hf_compress.checkpoint.handover import training_plan_of
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import (
    AlreadyQuantizedError,
    ConfigError,
    LossError,
    ResumeError,
    TrainerError,
    UnsupportedModelError,
)
from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from hf_compress.training.qat.convert import convert
from hf_compress.training.qat.modules import fake_modules
from hf_compress.training.qat.norms import FrozenNorm
from tests._utils.tiny import output, tiny, tiny_inputs
from tests.conformance.helpers import reference_logits, stock_logits, tensors_on_disk

from .runs import MIDDLE, STEPS, rows, same, state, stored, trainer_of

pytestmark = [
    pytest.mark.touches_rng,  # Trainer seeds and draws
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]

INT4 = {"bits": 4, "group_size": 32}
STATIC = {"bits": 8, "group_size": "channel", "activation_bits": 8, "activation_strategy": "tensor"}


class Watch(TrainerCallback):
    """Takes notes after the callbacks that are listed before it."""

    def __init__(self) -> None:
        self.phases: list[tuple[bool, bool]] = []
        self.norms: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seen = {(module.hfc_phase.quantize, module.hfc_phase.observe) for _, module in fake_modules(model)}
        self.phases.append(*seen)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms += [
            next((m.running_mean.clone() for m in model.modules() if isinstance(m, nn.BatchNorm2d)), torch.empty(0))
        ]

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.logits.append(output(model, tiny_inputs(model)))


@pytest.mark.parametrize(
    ("moments", "expected"),
    [
        ({"start": 2, "freeze": 4}, [(False, True)] * 2 + [(True, True)] * 2 + [(True, False)] * 2),
        ({"start": 1 / 3, "freeze": 1.0}, [(False, True)] * 2 + [(True, True)] * 4),
        ({}, [(True, True)] * 5 + [(True, False)]),
    ],
)
def test_phases_follow_the_optimizer_steps(
    moments: dict[str, Any], expected: list[tuple[bool, bool]], tmp_path: Path
) -> None:
    watch = Watch()
    callbacks = [QATCallback(QATConfig(**INT4, **moments)), watch]
    trainer_of(tiny("bert-classifier"), "bert", tmp_path, callbacks, gradient_accumulation_steps=2).train()
    assert watch.phases == expected


def test_batch_norms_freeze_with_the_observers(tmp_path: Path) -> None:
    """The Trainer puts the model into training mode at every step; running statistics stand still all the same."""
    watch, model = Watch(), tiny("resnet")
    trainer = trainer_of(model, "resnet", tmp_path, [QATCallback(QATConfig(**STATIC, freeze=4)), watch])
    trainer.train()
    moved = [not torch.equal(before, after) for before, after in zip(watch.norms, watch.norms[1:], strict=False)]
    assert moved == [True, True, True, False, False]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(isinstance(module, FrozenNorm) for module in norms)
    assert all(type(module) is nn.BatchNorm2d and module.training == model.training for module in norms)


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rounding straight through, dropout": ("bert-classifier", INT4, {}),
    "asymmetric": ("bert-classifier", {**INT4, "symmetric": False, "start": 2}, {}),
    "learned scales, accumulated": (
        "bert-classifier",
        {**INT4, "learn_scales": True},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    ),
    "static inputs, checkpointed activations": ("llama", STATIC, {"activation_checkpointing": True}),
    "static inputs, learned scales, start behind the checkpoint": (
        "bert-classifier",
        {**STATIC, "learn_scales": True, "start": 4, "freeze": 5},
        {},
    ),
    "inputs per token, autocast": (
        "llama",
        {"bits": 8, "group_size": "channel", "activation_bits": 8},
        {"bf16": True},
    ),
    "batch norms frozen at the checkpoint": ("resnet", {**STATIC, "freeze": 3}, {}),
}


@pytest.mark.parametrize("run", RUNS)
def test_resumed_equals_uninterrupted(run: str, tmp_path: Path) -> None:
    _check_resuming(*RUNS[run], tmp_path)


def _check_resuming(family: str, fields: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    """Difference of all tensors 0.0, those of the packed model and those of the last float checkpoint."""
    whole = tiny(family)
    start = state(whole)
    trainer_of(whole, family, tmp_path / "whole", [QATCallback(QATConfig(**fields))], **options).train()
    resumed = tiny(family)
    trainer = trainer_of(resumed, family, tmp_path / "resumed", [QATCallback(QATConfig(**fields))], **options)
    trainer.train(resume_from_checkpoint=str(_copied(tmp_path / "whole", tmp_path / "resumed")))
    assert same(state(whole), state(resumed))
    last, again = (stored(tmp_path / name / f"checkpoint-{STEPS}") for name in ("whole", "resumed"))
    assert same(last, again)
    trained = [name for name in start if name in last and not torch.equal(start[name], last[name])]
    assert len(trained) > 10


def _copied(source: Path, target: Path) -> Path:
    """The checkpoint in the middle, in the directory of another run."""
    target.mkdir(exist_ok=True)
    (source / f"checkpoint-{MIDDLE}").rename(target / f"checkpoint-{MIDDLE}")
    return target / f"checkpoint-{MIDDLE}"


@pytest.mark.slow
def test_resumed_equals_uninterrupted_compiled(tmp_path: Path) -> None:
    family, fields, _ = RUNS["static inputs, learned scales, start behind the checkpoint"]
    _check_resuming(family, fields, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, tmp_path)


@pytest.mark.parametrize("fields", [INT4, {**INT4, "learn_scales": True}, STATIC], ids=["plain", "lsq", "static"])
@pytest.mark.parametrize("family", ["bert-classifier", "llama-tied"])
def test_checkpoints_are_plain_float_models(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family)
    plain = state(model)
    config = QATConfig(**fields, embeddings="int8" if family == "llama-tied" and fields is INT4 else "keep")
    trainer_of(model, family, tmp_path, [QATCallback(config, convert=False)]).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    kind = getattr(transformers, type(model).__name__)
    loaded, info = kind.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(".hfc_" in name for name in info["unexpected_keys"])
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    now = state(model)
    assert same(state(loaded), {name: now[name] for name in plain})
    assert {name for name in now if name not in plain} == {name for name in now if ".hfc_" in name}


def test_learned_scales_are_trained_without_weight_decay(tmp_path: Path) -> None:
    model = tiny("bert-classifier")
    callback = QATCallback(QATConfig(**INT4, learn_scales=True), convert=False)
    trainer = trainer_of(model, "bert", tmp_path, [callback], weight_decay=0.1)
    trainer.train()
    named = dict(model.named_parameters())
    scales = [value for name, value in named.items() if ".hfc_" in name]
    assert len(scales) == len(list(fake_modules(model))) > 0
    decayed = {
        id(value) for group in trainer.optimizer.param_groups if group["weight_decay"] for value in group["params"]
    }
    assert decayed
    given = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert all(id(value) in given and id(value) not in decayed for value in scales)
    assert any(bool(value.detach().any()) for value in scales)  # they start at 0


@pytest.mark.parametrize("fields", [INT4, STATIC], ids=["int4", "w8a8-static"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
def test_what_is_saved_is_what_quantize_would_save(
    fields: dict[str, Any], bf16: bool, tmp_path: Path, worker: CleanWorker
) -> None:
    """The Trainer's last words, transformers' and ours: one format, equal logits in a process without us."""
    model = tiny("bert-classifier")
    trainer = trainer_of(model, "bert", tmp_path / "run", [QATCallback(QATConfig(**fields))], bf16=bf16)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "own")
    proof = hfc.save(model, tmp_path / "proven", worker=worker)
    assert proof.level == "full"
    for name in ("own", "proven"):
        assert same(tensors_on_disk(tmp_path / "saved"), tensors_on_disk(tmp_path / name))
    inputs = tiny_inputs(model)
    given, expected = stock_logits(worker, tmp_path / "saved", model, inputs), reference_logits(model.eval(), inputs)
    # Weight-only is exact; with quantized inputs both sides round alike, sums may be taken in another order.
    torch.testing.assert_close(
        given, expected, rtol=0, atol=0 if fields is INT4 else 1e-5 * float(expected.abs().max())
    )
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    if fields is INT4:
        peer = hfc.quantize(tiny("bert-classifier"), hfc.RTNQuantConfig(**INT4))
        peer.save_pretrained(tmp_path / "peer")
        assert written == json.loads((tmp_path / "peer" / "config.json").read_text())["quantization_config"]
        assert tensors_on_disk(tmp_path / "peer").keys() == tensors_on_disk(tmp_path / "saved").keys()


def test_evaluation_sees_the_model_of_the_phase_and_then_the_packed_one(tmp_path: Path) -> None:
    watch, model = Watch(), tiny("bert-classifier")
    callbacks = [QATCallback(QATConfig(bits=2, group_size=32, start=2)), watch]
    options = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    trainer = trainer_of(model, "bert", tmp_path, callbacks, **options)
    trainer.train()
    dense, packed = (
        tiny("bert-classifier"),
        hfc.quantize(tiny("bert-classifier"), hfc.RTNQuantConfig(bits=2, group_size=32)),
    )
    inputs = tiny_inputs(dense)
    before, after = output(dense, inputs), reference_logits(packed, inputs)
    assert not torch.equal(before, after)
    trainer.evaluate()
    expected = [before, after, after, after]  # at the steps 2, 4, 6, and when all is over
    assert [torch.equal(seen, wanted) for seen, wanted in zip(watch.logits, expected, strict=True)] == [True] * 4


def test_the_best_model_is_the_one_that_is_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first of both, which loading has to bring back
        "save_only_model": True,
    }
    model = tiny("bert-classifier")
    callback = QATCallback(QATConfig(**STATIC, start=1))
    trainer = trainer_of(model, "bert", tmp_path, [callback], **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Evaluations before step 1 measure the float model" in caplog.text
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == f"checkpoint-{MIDDLE}"
    again = tiny("bert-classifier")
    QATCallback(QATConfig(**STATIC, start=1)).prepare(again)
    again.load_state_dict(stored(best))
    assert same(state(convert(again)), state(model))


def test_a_second_training_is_refused_unless_nothing_was_packed(tmp_path: Path) -> None:
    model = tiny("bert-classifier")
    trainer = trainer_of(model, "bert", tmp_path / "a", [QATCallback(QATConfig(**INT4))], save_strategy="no")
    trainer.train()
    with pytest.raises(TrainerError, match=r"converted at the end of an earlier training.*convert=False"):
        trainer.train()
    again = tiny("bert-classifier")
    callback = QATCallback(QATConfig(**INT4), convert=False)
    trainer = trainer_of(again, "bert", tmp_path / "b", [callback], save_strategy="no", bf16=True)
    trainer.train()
    first = state(again)
    trainer.train()
    assert not same(first, state(again))
    assert "forward" in vars(again)  # accelerate's, which casts
    assert convert(again) is again
    assert is_quantized(again)
    assert "forward" not in vars(again)


def test_training_that_ends_too_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    callbacks = [QATCallback(QATConfig(**INT4, start=4)), Stop()]
    with caplog.at_level(logging.WARNING):
        trainer_of(tiny("bert-classifier"), "bert", tmp_path, callbacks, save_strategy="no").train()
    assert "Training ended after step 1, fake quantization starts at 4" in caplog.text


@pytest.mark.parametrize("ends", ["early", "early, converted later", "best"])
def test_scales_that_were_never_trained_are_those_of_the_weights_at_the_end(ends: str, tmp_path: Path) -> None:
    """Converted before `start`, learned scales are round to nearest's of today's weights, not of those before."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = ends != "best" and state.global_step == MIDDLE

    model = tiny("bert-classifier")
    config = QATConfig(bits=3, group_size=32, learn_scales=True, start=4, freeze=5)
    options: dict[str, Any] = {"learning_rate": 0.1}
    if ends == "best":
        options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": MIDDLE}
        options |= {"metric_for_best_model": "step", "greater_is_better": False}
    callback = QATCallback(config, convert="later" not in ends)
    trainer = trainer_of(model, "bert", tmp_path, [callback, Stop()], **options)
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    trainer.train()
    if "later" in ends:
        convert(model)
    peer = BertForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{MIDDLE}")
    hfc.quantize(peer, hfc.RTNQuantConfig(bits=3, group_size=32))
    assert same(state(model), state(peer))


def test_a_run_of_another_length_keeps_its_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`start=0.5` of six steps stays step 3: what is fake-quantized already is not trained in floating point again."""
    config = QATConfig(**INT4, start=0.5)
    trainer_of(tiny("bert-classifier"), "bert", tmp_path, [QATCallback(config)]).train()
    for done, steps in ((3, 7), (3, 14), (9, 10)):  # the last from a checkpoint of a resumed run
        watch, begun = Watch(), QATCallback(config)
        trainer = trainer_of(tiny("bert-classifier"), "bert", tmp_path, [begun, watch], max_steps=steps)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{done}"))
        assert begun.length == STEPS
        assert watch.phases == [(True, step < 5) for step in range(done, steps)]
        assert f"begun with 6 optimizer steps and now has {steps}" in caplog.text


# --- bad input ---


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="no QATConfig"):
        QATCallback(hfc.RTNQuantConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="convert='yes'"):
        QATCallback(QATConfig(), convert="yes")  # type: ignore[arg-type]
    with pytest.raises(TrainerError, match=r"no configuration.*quantization_config=QATConfig"):
        QATCallback().prepare(tiny("bert-classifier"))
    with pytest.raises(TrainerError, match="has not prepared a model"):
        QATCallback().settings()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 5, "freeze": 0.1}, "start=5 is step 5, behind freeze=0.1, step 1 of 6"),
        ({"freeze": 7}, "freeze=7 lies beyond the end of training, which has 6 optimizer steps"),
        ({"start": 7, "freeze": 1.0}, "start=7 lies beyond the end"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_the_first_step(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny("bert-classifier")
    trainer = trainer_of(model, "bert", tmp_path, [QATCallback(QATConfig(**INT4, **fields))])
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert same(before, state(model))


def test_static_inputs_need_a_step_to_be_seen(tmp_path: Path) -> None:
    trainer = trainer_of(tiny("bert-classifier"), "bert", tmp_path, [QATCallback(QATConfig(**STATIC, freeze=0))])
    with pytest.raises(ConfigError, match="no step is left to see the ranges"):
        trainer.train()


def test_models_that_cannot_be_prepared(tmp_path: Path) -> None:
    callback = QATCallback(QATConfig(**INT4))
    quantized = hfc.quantize(tiny("bert-classifier"), hfc.RTNQuantConfig(**INT4))
    with pytest.raises(AlreadyQuantizedError, match="start from the original model"):
        callback.prepare(quantized)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized"):  # the Trainer's own
        trainer_of(quantized, "bert", tmp_path, [callback])
    compiled: Any = torch.compile(tiny("bert-classifier"))
    with pytest.raises(TrainerError, match=r"compiled already.*torch_compile=True"):
        trainer_of(compiled, "bert", tmp_path, [callback])
    peft = pytest.importorskip("peft")
    for adapted in (peft.get_peft_model, lambda model, config: model.add_adapter(config) or model):
        model = adapted(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(UnsupportedModelError, match=r"adapter at .*train adapters on a packed model"):
            callback.prepare(model)
        with pytest.raises(UnsupportedModelError, match="has an adapter at"):
            QATCallback().prepare(model)


@pytest.mark.parametrize("when", ["before the Trainer", "after the Trainer", "after the training"])
def test_adapters_on_a_prepared_model_are_refused_before_it_is_trained(when: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["query"])
    model = tiny("bert-classifier")
    QATCallback(QATConfig(**INT4)).prepare(model)
    if when == "before the Trainer":
        wrapped = peft.get_peft_model(model, adapter)  # which changes the model too, as `add_adapter` does
        for adapted in (model, wrapped):
            with pytest.raises(UnsupportedModelError, match="has an adapter at"):
                trainer_of(adapted, "bert", tmp_path, [QATCallback()])
        return
    trainer = trainer_of(model, "bert", tmp_path, [QATCallback(convert=False)], save_strategy="no")
    if when == "after the training":
        trainer.train()
    model.add_adapter(adapter)
    with pytest.raises(UnsupportedModelError, match="has an adapter at"):
        convert(model)
    with pytest.raises(UnsupportedModelError, match="has an adapter at"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callback_that_comes_late_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tiny("bert-classifier"), "bert", tmp_path, [])
    trainer.add_callback(QATCallback(QATConfig(**INT4)))
    with pytest.raises(TrainerError, match="added after the Trainer had been built"):
        trainer.train()


def test_model_init_prepares_itself(tmp_path: Path) -> None:
    callback = QATCallback(QATConfig(**INT4))
    options = {"model_init": lambda: tiny("bert-classifier"), "save_strategy": "no"}
    with pytest.raises(TrainerError, match=r"prepare\(model\) of the callback inside of model_init"):
        trainer_of(None, "bert", tmp_path, [callback], **options).train()

    def made() -> BertForSequenceClassification:
        model = tiny("bert-classifier")
        callback.prepare(model)
        return model

    trainer = trainer_of(None, "bert", tmp_path, [callback], **{**options, "model_init": made})
    trainer.train()
    assert is_quantized(trainer.model)


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer_of(tiny("bert-classifier"), "bert", tmp_path, [QATCallback(QATConfig(**INT4))], max_steps=3).train()
    for fields, message in (({"bits": 3, "group_size": 32}, "bits was 4 and is 3"), ({**INT4, "freeze": 5}, "freeze")):
        trainer = trainer_of(tiny("bert-classifier"), "bert", tmp_path, [QATCallback(QATConfig(**fields))])
        with pytest.raises(ResumeError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    """The checkpoint before it is there, and the weights are those of the last step."""
    model = tiny("resnet")
    trainer = trainer_of(model, "resnet", tmp_path, [QATCallback(QATConfig(**STATIC))], save_steps=1, max_steps=8)
    trainer.train_dataset = [{**row, "pixel_values": row["pixel_values"] * float("nan")} for row in rows("resnet")]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(LossError, match="NaN or infinite after 0 optimizer steps"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert training_plan_of(model) is not None
