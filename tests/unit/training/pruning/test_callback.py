"""Pruning in real Trainers."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_compress.core.errors import ConfigError, LossError, ResumeError, TrainerError, WeightValueError
from hf_compress.modules.swap import packed_tensor
from hf_compress.training.callback import CompressionCallback
from hf_compress.training.pruning import PruningCallback, PruningConfig
from hf_compress.training.qat.callback import QATCallback
from hf_compress.training.qat.config import QATConfig
from hf_compress.training.state import FILE
from tests._utils.tiny import tiny

pytestmark = pytest.mark.touches_rng  # Trainer seeds

NAMES = ("first", "second")


class Small(nn.Module):
    """A classifier that a Trainer takes, with dropout on; 384 and 96 weights."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.drop = nn.Linear(16, 24), nn.Linear(24, 4), nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(self.drop(torch.relu(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    """Sixteen rows; from `bad` on, they hold NaN."""

    def __init__(self, bad: int = 16) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return {"x": x if index < self.bad else x * torch.nan, "labels": torch.tensor(index % 4)}


class Breaking(TrainerCallback):
    """Breaks training off: as Ctrl-C does, or by gradients that are NaN."""

    def __init__(self, step: int, nan: bool = False) -> None:
        self.step, self.nan = step, nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.step == 0:
            raise KeyboardInterrupt

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step and self.nan:
            kwargs["model"].second.bias.register_hook(lambda gradient: gradient * torch.nan)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step and not self.nan:
            raise KeyboardInterrupt


class Half(Rows):
    """Rows in bfloat16."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "x": row["x"].bfloat16()}


class Texts(Rows):
    """Rows for a tiny BERT."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 128, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.tensor(index % 3)}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **values)


def trained(
    folder: Path,
    callbacks: Sequence[TrainerCallback],
    model: nn.Module | None = None,
    data: Rows | None = None,
    resume: Path | None = None,
    **changes: Any,
) -> Trainer:
    trainer = Trainer(
        model=Small() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=Rows() if data is None else data,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def zeros(values: dict[str, Tensor]) -> list[int]:
    return [int((values[f"{name}.weight"] == 0).sum()) for name in NAMES]


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


CONFIGS = {
    "local": PruningConfig(sparsity=0.6, start=2, end=6, every=2),
    "global": PruningConfig(sparsity=0.6, scope="global", start=0, end=6, every=3, initial=0.2),
    "pattern": PruningConfig(pattern="1:4", start=1, end=6, every=1),
    "movement": PruningConfig(method="movement", sparsity=0.6, start=2, end=6, every=2),
    "movement-zero": PruningConfig(
        method="movement", initial_scores="zero", scope="global", sparsity=0.6, start=1, end=6, every=2
    ),
}


@pytest.mark.parametrize("name", ["local", "movement"])
def test_every_checkpoint_has_exactly_the_zeros_of_the_schedule(name: str, tmp_path: Path) -> None:
    """Momentum and weight decay move pruned weights in every step: without upkeep there were no zeros at step 3."""
    callback = PruningCallback(CONFIGS[name])
    trainer = trained(tmp_path, [callback], adam_beta1=0.99)
    half = 0.6 + (0.0 - 0.6) * (1 - 2 / 4) ** 3
    wanted = {1: 0.0, 2: 0.0, 3: 0.0, 4: half, 5: half, 6: 0.6, 7: 0.6, 8: 0.6}
    for step, sparsity in wanted.items():
        assert zeros(saved(tmp_path, step)) == [round(384 * sparsity), round(96 * sparsity)]
    logged = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry}
    assert logged == {step: pytest.approx(sparsity, abs=2 / 480) for step, sparsity in wanted.items()}
    assert callback.report is not None
    assert callback.report.zeros == 230 + 58
    assert [weight.zeros for weight in callback.report.weights] == zeros(values_of(trainer.model))


def test_pruned_weights_stay_pruned(tmp_path: Path) -> None:
    trained(tmp_path, [PruningCallback(CONFIGS["local"])])
    for name in NAMES:
        was = saved(tmp_path, 4)[f"{name}.weight"] == 0
        assert bool((saved(tmp_path, 8)[f"{name}.weight"] == 0)[was].all())


def test_movement_brings_weights_back_with_their_values(tmp_path: Path) -> None:
    """With scores that outweigh magnitudes at once, some weights that were pruned at first are kept at the end."""
    config = PruningConfig(
        method="movement", sparsity=0.5, initial=0.5, start=0, end=7, every=1, score_learning_rate=1.0
    )
    before = values_of(Small())
    trained(tmp_path, [PruningCallback(config)], learning_rate=0.0, weight_decay=0.0)
    first, last = (saved(tmp_path, step)["first.weight"] for step in (1, 8))
    back = (first == 0) & (last != 0)
    assert bool(back.any())
    assert torch.equal(last[back], before["first.weight"][back])


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_gradient_norm_is_that_of_kept_weights(method: Any, tmp_path: Path) -> None:
    """Clipping sees what the optimizer uses. Tolerance: the norm is summed in float32 in another order."""
    config = PruningConfig(method=method, sparsity=0.75, initial=0.75, start=0, end=5)
    whole = {"per_device_train_batch_size": 16, "max_steps": 5, "save_steps": 5}
    trainer = trained(tmp_path, [PruningCallback(config)], Small(dropout=0), **whole)
    logged = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)

    model = Small(dropout=0)
    keep = {}
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_parameter(f"{name}.weight")
            order = weight.abs().flatten().argsort(stable=True)
            keep[name] = torch.ones(weight.numel()).index_fill(0, order[: 3 * weight.numel() // 4], 0).view_as(weight)
            weight.mul_(keep[name])
    rows = [Rows()[index] for index in range(16)]
    model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})["loss"].backward()
    dense = masked = 0.0
    for name, value in model.named_parameters():
        assert value.grad is not None
        dense += float(value.grad.square().sum())
        masked += float((value.grad * keep.get(name.removesuffix(".weight"), 1)).square().sum())
    assert logged == pytest.approx(masked**0.5, rel=1e-5)
    assert logged < 0.9 * dense**0.5


@pytest.mark.parametrize("name", ["local", "movement"])
def test_gradient_accumulation_is_one_large_batch(name: str, tmp_path: Path) -> None:
    """Tolerance: sums of gradients in float32 in another order, which Adam's division enlarges where they are tiny."""
    made = []
    for folder, changes in (
        ("one", {}),
        ("four", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    ):
        callback = PruningCallback(CONFIGS[name])
        trained(tmp_path / folder, [callback], Small(dropout=0), max_steps=8, max_grad_norm=0.5, **changes)
        made.append((saved(tmp_path / folder, 5), load_file(tmp_path / folder / "checkpoint-5" / FILE)))
    (one, kept), (four, other) = made
    for key in one:
        assert torch.equal(one[key] == 0, four[key] == 0)
        assert torch.allclose(one[key], four[key], atol=1e-4)
    assert kept.keys() == other.keys()
    assert len(kept) == (10 if name == "movement" else 0)
    for key in kept:
        assert torch.allclose(kept[key], other[key], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [1, 3, 7])
def test_resumed_run_equals_the_uninterrupted_one(name: str, step: int, tmp_path: Path) -> None:
    """Before, between and after prunings; every parameter, score and moment, bit for bit."""
    whole = trained(tmp_path / "run", [PruningCallback(CONFIGS[name])])
    end = {file.name: load_file(file) for file in (tmp_path / "run" / "checkpoint-8").glob("*.safetensors")}
    last = load_file(tmp_path / "run" / "checkpoint-5" / FILE)
    for later in range(step + 1, 9):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    resumed = trained(
        tmp_path / "run", [PruningCallback(CONFIGS[name])], resume=tmp_path / "run" / f"checkpoint-{step}"
    )
    for key, value in values_of(whole.model).items():
        assert torch.equal(value, values_of(resumed.model)[key])
    for file, tensors in end.items():
        again = load_file(tmp_path / "run" / "checkpoint-8" / file)
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    if step < 5:
        again = load_file(tmp_path / "run" / "checkpoint-5" / FILE)
        assert last.keys() == again.keys()
        assert all(torch.equal(last[key], again[key]) for key in last)
        assert len(last) == (10 if name.startswith("movement") else 0)


def test_zeros_that_are_not_pruned_survive_resuming(tmp_path: Path) -> None:
    """A column of zeros that training fills: which of the zeros are pruned is in the state file."""

    def model() -> Small:
        made = Small()
        with torch.no_grad():
            made.first.weight[:, :8] = 0  # half of them; a quarter is pruned
        made.first.weight.register_hook(lambda gradient: gradient * (torch.arange(16) > 3))  # some stay zero
        return made

    config = PruningConfig(sparsity=0.25, start=0, end=4, initial=0.25)
    trained(tmp_path, [PruningCallback(config)], model())
    assert load_file(tmp_path / "checkpoint-2" / FILE).keys() == {"pruning.first.mask"}
    end = saved(tmp_path, 8)
    for later in range(3, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    trained(tmp_path, [PruningCallback(config)], model(), resume=tmp_path / "checkpoint-2")
    assert all(torch.equal(value, saved(tmp_path, 8)[key]) for key, value in end.items())


@pytest.mark.parametrize("name", ["local", "global", "movement"])
def test_checkpoint_with_other_zeros_is_refused(name: str, tmp_path: Path) -> None:
    trained(tmp_path, [PruningCallback(CONFIGS[name])])
    file = tmp_path / "checkpoint-5" / "model.safetensors"
    values = load_file(file)
    pruned = (values["first.weight"] == 0).nonzero()[0]
    values["first.weight"][tuple(pruned)] = 1.0
    save_file(values, file, metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="is not as the pruning schedule has left it"):
        trained(tmp_path, [PruningCallback(CONFIGS[name])], resume=tmp_path / "checkpoint-5")


def test_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, [PruningCallback(CONFIGS["movement"])])
    file = tmp_path / "checkpoint-3" / FILE
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata()
    save_file({key: value for key, value in load_file(file).items() if "held" not in key}, file, metadata=metadata)
    with pytest.raises(ResumeError, match=r"first\.held of movement pruning is missing"):
        trained(tmp_path, [PruningCallback(CONFIGS["movement"])], resume=tmp_path / "checkpoint-3")


def test_changed_configuration_is_refused_and_another_length_keeps_the_schedule(tmp_path: Path) -> None:
    fractions = PruningConfig(sparsity=0.6, start=0.0, end=0.75, every=2)
    trained(tmp_path, [PruningCallback(fractions)])
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(ResumeError, match=r"sparsity was 0\.6 and is 0\.7"):
        trained(
            tmp_path,
            [PruningCallback(PruningConfig(**{**fractions.model_dump(), "sparsity": 0.7}))],
            resume=checkpoint,
        )
    trained(tmp_path, [PruningCallback(fractions)], resume=checkpoint, max_steps=16)
    assert zeros(saved(tmp_path, 6)) == zeros(saved(tmp_path, 16)) == [230, 58]


def test_checkpoints_load_with_stock_transformers(tmp_path: Path) -> None:
    config = PruningConfig(method="movement", sparsity=0.5, start=1, end=3, every=1)
    trainer = trained(tmp_path, [PruningCallback(config)], tiny("bert-classifier"), Texts(), max_steps=4)
    for step in (2, 4):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"checkpoint-{step}", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trainer.model.state_dict().items())
    assert float((model.bert.pooler.dense.weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("first", ["pruning", "qat"])
@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_zeros_stay_zeros_in_codes(first: str, method: Any, tmp_path: Path) -> None:
    """With quantization-aware training, in both orders of the callbacks: masks before rounding."""
    pruning = PruningCallback(PruningConfig(method=method, sparsity=0.5, start=1, end=3, every=1))
    qat = QATCallback(QATConfig(bits=4, group_size=32))
    order = [pruning, qat] if first == "pruning" else [qat, pruning]
    model = tiny("bert-classifier", num_hidden_layers=1)
    trained(tmp_path, order, model, Texts(), max_steps=4, save_steps=4)
    pruned = saved(tmp_path, 4)["bert.pooler.dense.weight"] == 0
    assert float(pruned.float().mean()) == 0.5
    packed = packed_tensor(model.bert.pooler.dense, "weight").dense()
    assert not packed[pruned].any()
    assert packed[~pruned].any()
    assert pruning.report is not None
    assert pruning.report.sparsity >= 0.5


def test_callbacks_in_any_order_give_the_same_model(tmp_path: Path) -> None:
    made = []
    for first in ("pruning", "qat"):
        pruning = PruningCallback(PruningConfig(sparsity=0.5, start=1, end=3, every=1))
        qat = QATCallback(QATConfig(bits=4, group_size=32), convert=False)
        order = [pruning, qat] if first == "pruning" else [qat, pruning]
        model = tiny("bert-classifier", num_hidden_layers=1)
        trained(tmp_path / first, order, model, Texts(), max_steps=4, save_steps=4)
        made.append(model.state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())


def test_bfloat16_weights_have_exact_counts(tmp_path: Path) -> None:
    config = PruningConfig(sparsity=0.35, start=0, end=0)
    trainer = trained(tmp_path, [PruningCallback(config)], Small().bfloat16(), Half(), max_steps=2)
    assert zeros(values_of(trainer.model)) == [round(384 * 0.35), round(96 * 0.35)]


def test_gradients_are_free_again_at_the_end(tmp_path: Path) -> None:
    trainer = trained(tmp_path, [PruningCallback(PruningConfig(start=0, end=0))], max_steps=2)
    weight = trainer.model.first.weight
    batch = {key: value.unsqueeze(0) for key, value in Rows()[0].items()}
    trainer.model(**batch)["loss"].backward()
    assert bool(weight.grad[weight == 0].any())


def test_early_end_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(CompressionCallback):
        name = "stop"

        def settings(self) -> dict[str, Any]:
            return {}

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            control.should_training_stop = state.global_step >= 3

    with caplog.at_level(logging.WARNING, "hf_compress"):
        trained(tmp_path, [PruningCallback(CONFIGS["local"]), Stop()])
    assert "the mask is final at step 6, training ended after 3" in caplog.text


def test_best_checkpoint_from_before_the_end_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is a denser one, and not pruned after the fact. These random weights lose less the fewer there are."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = Trainer(
        model=Small(),
        args=arguments(tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=1, max_steps=7, **best),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=[PruningCallback(PruningConfig(sparsity=0.9, start=0, end=6, every=2, initial=0.1))],
    )
    with caplog.at_level(logging.WARNING, "hf_compress"):
        trainer.train()
    assert trainer.state.best_global_step == 1
    assert zeros(values_of(trainer.model)) == zeros(saved(tmp_path, 1)) == [38, 10]
    checkpoint = trainer.state.best_model_checkpoint
    assert f"with 48 zeros in the best checkpoint, {checkpoint}, of 432 asked for" in caplog.text


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (PruningConfig(end=9), ConfigError, "end=9 lies beyond the end of training, which has 8"),
        (PruningConfig(method="movement", start=0, end=0), ConfigError, "nothing has moved yet"),
    ],
)
def test_refused_before_the_first_step(
    config: PruningConfig, error: type[Exception], said: str, tmp_path: Path
) -> None:
    model = Small()
    with pytest.raises(error, match=said):
        trained(tmp_path, [PruningCallback(config)], model)
    assert all(torch.equal(value, Small().state_dict()[key]) for key, value in model.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_nan_weights_and_wrong_configurations_are_refused(tmp_path: Path) -> None:
    model = Small()
    model.second.weight.data[1, 2] = torch.inf
    with pytest.raises(WeightValueError, match="second holds 0 NaN and 1 infinite"):
        trained(tmp_path, [PruningCallback()], model)
    with pytest.raises(ConfigError, match="config is a dict"):
        PruningCallback({"sparsity": 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["local", "movement"])
def test_nan_loss_leaves_weights_and_checkpoints(name: str, tmp_path: Path) -> None:
    model = Small()
    with pytest.raises(LossError):
        trained(tmp_path, [PruningCallback(CONFIGS[name])], model, Rows(bad=2))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


class Averaging(torch.optim.SGD):
    """Evaluates another point than the one that is trained, as schedule-free optimizers do."""

    def train(self) -> None:
        """Back to the trained weights."""

    def eval(self) -> None:
        """To the evaluated ones."""
        for group in self.param_groups:
            for value in group["params"]:
                value.data += 1.0


def test_optimizers_that_evaluate_other_weights_are_refused(tmp_path: Path) -> None:
    model = Small()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Rows(),
        callbacks=[PruningCallback(CONFIGS["local"])],
        optimizers=(Averaging(model.parameters(), lr=0.1), None),
    )
    with pytest.raises(TrainerError, match="Averaging evaluates and saves other weights than it trains"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_logged_sparsity_is_counted_in_the_weights(tmp_path: Path) -> None:
    trainer = trained(tmp_path, [PruningCallback(CONFIGS["local"])])
    trainer.log({"note": 1.0})
    assert trainer.state.log_history[-1]["sparsity"] == 0.6
    trainer.model.first.weight.data.fill_(1.0)
    trainer.log({"note": 2.0})
    assert trainer.state.log_history[-1]["sparsity"] == round(58 / 480, 6)


def revived(model: nn.Module) -> bool:
    """Whether zeros of a model have gradients."""
    model.zero_grad()
    model(**{key: value.unsqueeze(0) for key, value in Rows()[0].items()})["loss"].backward()
    return bool(model.first.weight.grad[model.first.weight == 0].any())


@pytest.mark.parametrize("name", ["local", "movement"])
def test_gradients_are_free_after_an_error(name: str, tmp_path: Path) -> None:
    """The callback still lives."""
    model, callback = Small(), PruningCallback(CONFIGS[name])
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    trainer.add_callback(Breaking(5, nan=True))
    with pytest.raises(LossError):
        trainer.train()
    assert zeros(values_of(model)) == zeros(saved(tmp_path, 5)) != [0, 0]
    assert revived(model)


@pytest.mark.parametrize("name", ["local", "movement"])
def test_gradients_are_free_after_an_interruption(name: str, tmp_path: Path) -> None:
    """The callback still lives."""
    model, callback = Small(), PruningCallback(CONFIGS[name])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [callback, Breaking(5)], model)
    assert zeros(values_of(model)) == zeros(saved(tmp_path, 4)) != [0, 0]
    assert revived(model)


class Refusing(TrainerCallback):
    """Raises before a step is taken, as QATCallback does for a loss that is NaN."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", ["local", "movement"])
def test_gradients_are_free_after_the_refusal_of_a_callback_in_front(
    name: str, accumulated: int, tmp_path: Path
) -> None:
    """PruningCallback never learns of the error; the gradients, which are set to None, tell."""
    model, callback = Small(), PruningCallback(CONFIGS[name])
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [Refusing(), callback], model, gradient_accumulation_steps=accumulated)
    assert zeros(values_of(model)) == zeros(saved(tmp_path, 5)) != [0, 0]
    assert revived(model)


def test_gradients_are_free_after_an_interruption_in_a_forward_pass(tmp_path: Path) -> None:
    """From the second backward pass on: nothing tells the first one from that of the step."""

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    class Arming(TrainerCallback):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step == 5:
                self.remove = kwargs["model"].drop.register_forward_pre_hook(interrupt).remove

    model, callback, arming = Small(), PruningCallback(CONFIGS["local"]), Arming()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [callback, arming], model)
    arming.remove()
    revived(model)
    assert revived(model)


def test_gradients_are_free_after_an_error_of_qat(tmp_path: Path) -> None:
    model = tiny("bert-classifier", num_hidden_layers=1)
    pruning = PruningCallback(PruningConfig(start=0, end=0))
    breaking = NotANumber()
    with pytest.raises(LossError):
        trained(tmp_path / "first", [QATCallback(QATConfig(bits=4, group_size=32)), pruning, breaking], model, Texts())
    before = model.bert.pooler.dense._parameters["weight"].detach() == 0
    assert float(before.float().mean()) == 0.5
    breaking.remove()
    trained(tmp_path / "second", [], model, Texts(), max_steps=1)
    after = model.bert.pooler.dense._parameters["weight"].detach() == 0
    assert int(after.sum()) < int(before.sum()) / 2


class NotANumber(TrainerCallback):
    """Makes gradients NaN from the third step on."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 2:
            self.remove = kwargs["model"].classifier.bias.register_hook(lambda gradient: gradient * torch.nan).remove


def test_gradients_are_free_after_an_interruption_once_the_callback_is_gone(tmp_path: Path) -> None:
    model = Small()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [PruningCallback(CONFIGS["local"]), Breaking(5)], model)
    gc.collect()
    assert revived(model)


def test_gradients_are_free_after_the_refusal_of_a_later_callback(tmp_path: Path) -> None:
    model, pruning = Small(), PruningCallback(PruningConfig(start=0, end=0))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, [pruning, Breaking(0)], model)
    assert zeros(values_of(model)) == [192, 48]
    assert revived(model)


def test_values_that_movement_holds_come_back_when_training_starts_anew(tmp_path: Path) -> None:
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    model, callback, breaking = Small(), PruningCallback(CONFIGS["movement"]), Breaking(5)
    args = arguments(tmp_path, **still)
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback, breaking])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert zeros(values_of(model)) != [0, 0]
    breaking.step = 1  # before anything is pruned again
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.equal(value, Small().state_dict()[key]) for key, value in model.state_dict().items())


def test_pruning_the_same_model_from_the_start_again_is_refused(tmp_path: Path) -> None:
    """It would grow back until `start`; another callback, as the message says, keeps the very same zeros."""
    trainer = trained(tmp_path / "first", [PruningCallback(CONFIGS["movement"])])
    before = values_of(trainer.model)
    with pytest.raises(TrainerError, match="has pruned the model in an earlier training"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in values_of(trainer.model).items())
    again = PruningConfig(sparsity=0.6, start=0, end=0)
    trained(tmp_path / "second", [PruningCallback(again)], trainer.model)
    for step in range(1, 9):
        values = saved(tmp_path / "second", step)
        assert all(torch.equal(values[f"{name}.weight"] == 0, before[f"{name}.weight"] == 0) for name in NAMES)


@pytest.mark.parametrize(
    ("key", "damage", "said"),
    [
        ("first.mask", "type", "its mask in the state file"),
        ("first.mask", "shape", "its mask in the state file"),
        ("first.held", "full", "holds values aside for weights that are not pruned"),
        ("first.step", "shape", r"first\.step of movement pruning has the form"),
        ("first.step", "missing", r"first\.step of movement pruning is missing"),
    ],
)
def test_damaged_state_is_refused(key: str, damage: str, said: str, tmp_path: Path) -> None:
    name = "local" if "mask" in key else "movement"
    trained(tmp_path, [PruningCallback(CONFIGS[name])])
    file = tmp_path / "checkpoint-5" / FILE
    with safe_open(file, "pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    pruned = saved(tmp_path, 5)["first.weight"] == 0
    tensors.setdefault("pruning.first.mask", ~pruned)
    value = tensors.pop(f"pruning.{key}")
    if damage != "missing":
        changed = {"type": value.float(), "shape": torch.ones(3, dtype=value.dtype), "full": torch.ones_like(value)}
        tensors[f"pruning.{key}"] = changed[damage]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ResumeError, match=said):
        trained(tmp_path, [PruningCallback(CONFIGS[name])], resume=tmp_path / "checkpoint-5")


class Shared(Small):
    """One layer used three times, by itself or under reentrant checkpointing, which gives its gradient in parts."""

    def __init__(self, parts: bool) -> None:
        super().__init__(dropout=0)
        self.square, self.parts = nn.Linear(16, 16), parts
        self.square.weight.data = torch.linspace(-0.3, 0.3, 256).sin().view(16, 16)
        self.square.bias.data.zero_()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.requires_grad_()
        for _ in range(3):
            x = x + (checkpoint(self._inner, x, use_reentrant=True) if self.parts else self._inner(x))
        return super().forward(x, labels)

    def _inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.square(x))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_scores_of_shared_layers_under_reentrant_checkpointing(accumulated: int, tmp_path: Path) -> None:
    """Tolerance: sums of three gradients in float32 in another order."""
    made = []
    for parts in (False, True):
        folder = tmp_path / str(parts)
        changes = {"max_steps": 4, "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulated}
        config = PruningConfig(method="movement", sparsity=0.6, initial=0.3, start=0, end=4, every=1)
        trained(folder, [PruningCallback(config)], Shared(parts), optim="sgd", **changes)
        made.append(load_file(folder / "checkpoint-3" / FILE))
    for key in made[0]:
        assert torch.allclose(made[0][key], made[1][key], rtol=1e-4, atol=1e-6), key
    assert bool(made[0]["pruning.square.held"].any())


def test_movement_scores_refuse_skipped_steps(tmp_path: Path) -> None:
    callback, model = PruningCallback(CONFIGS["movement"]), Small()
    callback.prepare(model)
    args = TrainingArguments(output_dir=str(tmp_path), fp16=True, use_cpu=True)
    with pytest.raises(TrainerError, match="movement scores can't know"):
        callback.on_train_begin(args, TrainerState(max_steps=8), TrainerControl(), model=model)


def test_pruning_a_packed_model_again_is_refused(tmp_path: Path) -> None:
    callbacks: list[CompressionCallback] = [
        PruningCallback(PruningConfig(start=0, end=1)),
        QATCallback(QATConfig(bits=8, group_size="channel")),
    ]
    trainer = trained(tmp_path, callbacks, tiny("bert-classifier", num_hidden_layers=1), Texts(), max_steps=2)
    with pytest.raises(TrainerError, match="packed"):
        trainer.train()
