"""What all callbacks share, in real Trainers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import hf_compress as hfc
from hf_compress.core.errors import AlreadyQuantizedError, LossError, ResumeError, TrainerError
from hf_compress.training.callback import CompressionCallback, bare, check_gradients, refuse_sharded
from hf_compress.training.state import FILE, Section, read_section
from tests.conformance.helpers import hashes

pytestmark = pytest.mark.touches_rng  # Trainer seeds


class Small(nn.Module):
    """A classifier that a Trainer takes; `biased` gives it one-dimensional parameters."""

    def __init__(self, biased: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(8, 8, bias=biased), nn.Linear(8, 2, bias=biased)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.second(torch.relu(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    """Sixteen rows; from `bad` on, they hold NaN."""

    def __init__(self, bad: int = 16) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x if index < self.bad else x * torch.nan, "labels": torch.tensor(index % 2)}


class Watching(CompressionCallback):
    """Keeps the first weight, and notes what is asked of it."""

    name = "watching"

    def __init__(self, strength: float = 1.0, resume_from: str | Path | None = None) -> None:
        super().__init__(resume_from)
        self.strength = strength
        self.inserted: list[nn.Module] = []
        self.begun: list[tuple[int, Section | None]] = []

    def insert(self, model: nn.Module) -> None:
        self.inserted.append(model)

    def begin(self, model: nn.Module, state: TrainerState, section: Section | None) -> None:
        self.begun.append((state.global_step, section))

    def settings(self) -> Mapping[str, Any]:
        return {"strength": self.strength}

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {"first": model.get_parameter("first.weight")}


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    given = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "save_strategy": "steps", **values}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **given,
    )


def trainer_of(folder: Path, *callbacks: CompressionCallback, **values: Any) -> Trainer:
    model = values.pop("model", None) or (None if "model_init" in values else Small())
    rest = {key: values.pop(key) for key in ("model_init", "train_dataset") if key in values}
    return Trainer(
        model=model,
        args=arguments(folder, **values),
        callbacks=list(callbacks),
        **{"train_dataset": Rows(), **rest},
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_model_is_prepared_once_and_state_is_in_every_checkpoint(tmp_path: Path) -> None:
    watching = Watching()
    trainer = trainer_of(tmp_path, watching)
    assert watching.inserted == [trainer.model]
    trainer.train()
    assert watching.inserted == [trainer.model]
    assert watching.begun == [(0, None)]
    for step in (2, 4):
        read_section(tmp_path / f"checkpoint-{step}", "watching", {"strength": 1.0}, step)
    kept = read_section(tmp_path / "checkpoint-4", "watching", {"strength": 1.0}, 4).tensors["first"]
    assert torch.equal(kept, trainer.model.get_parameter("first.weight"))


@pytest.mark.parametrize("save_only_model", [False, True])
def test_resumed_run_gets_its_section(save_only_model: bool, tmp_path: Path) -> None:
    trainer_of(tmp_path, Watching(), save_only_model=save_only_model).train()
    watching = Watching()
    trainer_of(tmp_path, watching, max_steps=6, save_only_model=save_only_model).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    step, section = watching.begun[0]
    assert step == 2
    assert section is not None
    assert section.tensors.keys() == {"first"}


def test_moved_directory_resumes(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run", Watching()).train()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    watching = Watching()
    trainer_of(tmp_path / "moved", watching).train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    assert watching.begun[0][0] == 2


def test_another_directory_resumes_with_its_path_and_is_not_guessed(tmp_path: Path) -> None:
    """The callback is not told what `train` was given, and must not take a namesake's state."""
    trainer_of(tmp_path / "run", Watching()).train()
    source = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ResumeError, match="resume_from="):
        trainer_of(tmp_path / "new", Watching()).train(resume_from_checkpoint=source)
    trainer_of(tmp_path / "old", Watching(), seed=1).train()
    with pytest.raises(ResumeError, match=r"another run.*resume_from="):
        trainer_of(tmp_path / "old", Watching()).train(resume_from_checkpoint=source)
    watching = Watching(resume_from=source)
    trainer_of(tmp_path / "old", watching).train(resume_from_checkpoint=source)
    assert watching.begun[0][0] == 2
    wrong = Watching(resume_from=tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ResumeError, match=r"another run"):
        trainer_of(tmp_path / "new", wrong).train(resume_from_checkpoint=source)


def test_changed_configuration_is_refused_and_the_checkpoint_kept(tmp_path: Path) -> None:
    trainer_of(tmp_path, Watching()).train()
    before = hashes(tmp_path)
    trainer = trainer_of(tmp_path, Watching(strength=2.0))
    with pytest.raises(ResumeError, match=r"strength was 1\.0 and is 2\.0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert hashes(tmp_path) == before


def test_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path).train()
    with pytest.raises(ResumeError, match="not written by a run with this callback"):
        trainer_of(tmp_path, Watching()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_callback_added_late_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(Watching())
    before = weights(trainer.model)
    with pytest.raises(TrainerError, match=r"added after.*callbacks=\[Watching"):
        trainer.train()
    assert equal(weights(trainer.model), before)


def test_model_init_must_prepare_what_it_makes(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="model_init has made a new one"):
        trainer_of(tmp_path, Watching(), model_init=Small).train()
    watching = Watching()

    def prepared() -> nn.Module:
        model = Small()
        watching.prepare(model)
        return model

    trainer = trainer_of(tmp_path, watching, model_init=prepared)
    trainer.train()
    assert len(watching.inserted) == 2  # the Trainer makes one when it is built and one when it trains
    assert watching.inserted[1] is trainer.model


def test_one_callback_for_two_trainers_is_refused_where_it_would_mix_them_up(tmp_path: Path) -> None:
    watching = Watching()
    first, second = (trainer_of(tmp_path / name, watching) for name in ("first", "second"))
    with pytest.raises(TrainerError, match="another Trainer has the same callback"):
        first.train()
    second.train()
    assert watching.begun == [(0, None)]


class Sibling(Watching):
    """Of another class, with the same section."""


@pytest.mark.parametrize("kind", [Watching, Sibling])
def test_two_callbacks_with_one_section_are_refused(kind: type[Watching], tmp_path: Path) -> None:
    second = kind(strength=2.0)
    with pytest.raises(TrainerError, match=f"two callbacks that keep 'watching' state.*a {kind.__name__}"):
        trainer_of(tmp_path, Watching(), second)
    assert second.inserted == []
    trainer = trainer_of(tmp_path, Watching())
    second.prepare(trainer.model)
    trainer.add_callback(second)
    with pytest.raises(TrainerError, match="two callbacks"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.remove_callback(second)
    trainer.train()
    trainer.train()


def test_a_resumed_run_keeps_the_length_that_schedules_were_made_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Watching()
    trainer_of(tmp_path, first).train()
    assert first.length == 4
    for steps, source in ((8, 2), (12, 6)):
        again = Watching()
        trainer = trainer_of(tmp_path, again, max_steps=steps)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{source}"))
        assert again.length == 4
        assert f"begun with 4 optimizer steps and now has {steps}" in caplog.text


def test_a_shorter_run_is_refused_where_there_is_a_schedule(tmp_path: Path) -> None:
    trainer_of(tmp_path, Watching()).train()
    trainer = trainer_of(tmp_path, Watching(), max_steps=3)
    with pytest.raises(ResumeError, match="begun with 4 optimizer steps and now has 3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_path_that_nothing_is_resumed_from_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Watching(resume_from=tmp_path / "checkpoint-2"))
    with pytest.raises(TrainerError, match="training starts anew"):
        trainer.train()
    with pytest.raises(TrainerError, match="is no path"):
        Watching(resume_from=5)  # type: ignore[arg-type]


def test_a_section_that_an_earlier_run_left_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, Watching()).train()
    plain = trainer_of(tmp_path, logging_steps=2)
    plain.train()
    again = trainer_of(tmp_path, Watching())
    with pytest.raises(ResumeError, match="earlier run in the same directory"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def _whole(model: nn.Module) -> Any:
    return torch.compile(model)


def _part(model: nn.Module) -> nn.Module:
    model.first = torch.compile(model.first)
    return model


def _in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.parametrize("compiled", [_whole, _part, _in_place])
def test_compiled_model_is_refused(compiled: Any) -> None:
    watching = Watching()
    with pytest.raises(TrainerError, match="compiled already"):
        watching.prepare(compiled(Small()))
    assert watching.inserted == []


def test_quantized_model_is_refused() -> None:
    model = hfc.quantize(Small(), hfc.RTNQuantConfig(bits=8, group_size="channel"))
    with pytest.raises(AlreadyQuantizedError, match="packed weights can't be trained"):
        Watching().prepare(model)


@pytest.mark.parametrize("biased", [True, False])
def test_nan_stops_before_the_weights_and_loses_no_checkpoint(biased: bool, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Watching(), model=Small(biased), max_steps=40, save_steps=1, train_dataset=Rows(15))
    with pytest.raises(LossError, match=r"gradient of first\.(bias|weight) is NaN"):
        trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    last = trainer.state.global_step
    if last:  # by the order of the rows
        kept = read_section(tmp_path / f"checkpoint-{last}", "watching", {"strength": 1.0}, last).tensors["first"]
        assert torch.equal(kept, trainer.model.get_parameter("first.weight"))


def test_loss_scaling_skips_such_steps_itself(tmp_path: Path) -> None:
    model, args = Small(), arguments(tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    event = (args, TrainerState(), TrainerControl())
    with pytest.raises(LossError):
        Watching().on_pre_optimizer_step(*event, model=model)
    args.fp16 = True
    Watching().on_pre_optimizer_step(*event, model=model)


def test_gradients_are_checked_where_there_are_any() -> None:
    model = Small()
    check_gradients(model, 0)
    model.second.bias.grad = torch.tensor([0.0, torch.nan])
    model.first.bias.grad = torch.zeros(8)
    with pytest.raises(LossError, match=r"second\.bias .* after 3 optimizer steps"):
        check_gradients(model, 3)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharding_that_accelerate_tells_of(
    kind: DistributedType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, Watching())  # which has made the state
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    assert AcceleratorState().distributed_type == kind
    with pytest.raises(TrainerError, match=f"whole weights; {kind.value}"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    with pytest.raises(TrainerError, match="without a sharding plugin"):
        refuse_sharded("A mask")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fsdp", True, "FSDP"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "DeepSpeed"),
        ("_n_gpu", 2, "nn.DataParallel"),
    ],
)
def test_sharding_that_arguments_ask_for(name: str, value: Any, said: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    watching, event = Watching(), (args, TrainerState(), TrainerControl())
    with pytest.raises(TrainerError, match=said):
        watching.on_init_end(*event, model=Small())
    assert watching.inserted == []


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_are_refused_and_ddp_is_looked_through() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = Small()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert bare(wrapped) is model
    assert bare(torch.compile(wrapped)) is model
    refuse_sharded("A mask", model=bare(wrapped))
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    sharded.first.weight = nn.Parameter(distribute_tensor(sharded.first.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TrainerError, match="tensor parallelism"):
        refuse_sharded("A mask", model=sharded)


def test_hyperparameter_search_keeps_no_state_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its checkpoints are in directories whose names callbacks are not told."""
    trainer = trainer_of(tmp_path, Watching())
    (tmp_path / "run-0" / "checkpoint-2").mkdir(parents=True)
    trainer.state.global_step = 2
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    assert "can't be resumed" in caplog.text
    assert not list(tmp_path.rglob(FILE))
