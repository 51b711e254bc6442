"""What all callbacks share: they prepare the model before the optimizer is made, and refuse what can't work early."""

from __future__ import annotations

import json
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..apply.planning import is_quantized
from ..core.errors import AlreadyQuantizedError, LossError, ResumeError, TrainerError
from .restore import restore
from .state import TRAINER_STATE, Section, read_section, write_section

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_CALLBACKS = "hfc_callbacks"

logger = logging.getLogger(__name__)


class CompressionCallback(TrainerCallback):
    """Base of the callbacks of this package.

    A subclass implements `prepare`, and may implement `begin`, `tensors`, and Trainer's events; those that it
    overrides call `super()`.

    Args:
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.

    Attributes:
        length: Optimizer steps of the run, which schedules are resolved for; once training has begun. Of a run that
            is resumed, those that it was begun with: what has happened at a step stays there.
    """

    name: ClassVar[str]
    """Of its section in a checkpoint's state file."""
    scheduled: ClassVar[bool] = True
    """Whether its configuration says when something happens in a run."""

    def __init__(self, resume_from: str | Path | None = None) -> None:
        if not isinstance(resume_from, str | Path | None):
            raise TrainerError(f"resume_from={resume_from!r} is no path.", 'resume_from="run/checkpoint-500"')
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.length = 0
        self._prepared: weakref.ref[nn.Module] | None = None

    def prepare(self, model: nn.Module) -> None:
        """Prepare a model for training, once; the Trainer's own is prepared when it is built.

        To be called in a `model_init` function, whose models the Trainer shows to no callback in time.

        Args:
            model: The model, float, on any device.

        Raises:
            HFCompressError: The model can't be prepared; it is unchanged.
        """
        if self.is_prepared(model):
            return
        if is_quantized(model):
            raise AlreadyQuantizedError(
                f"{type(model).__name__} is quantized already, and packed weights can't be trained.",
                "start from the original model",
            )
        _refuse_compiled(model)
        self.insert(model)
        self._prepared = weakref.ref(model)

    def insert(self, model: nn.Module) -> None:
        """What `prepare` does to a model that is fit for it."""

    def is_prepared(self, model: nn.Module) -> bool:
        """Whether `prepare` has been called with this model last."""
        return self._prepared is not None and self._prepared() is model

    def begin(self, model: nn.Module, state: TrainerState, section: Section | None) -> None:
        """Resolve schedules, and take up what a checkpoint holds, before the first step.

        Args:
            model: The model, with the checkpoint's weights where training is resumed.
            state: The Trainer's state.
            section: What was kept, where training is resumed.
        """

    def settings(self) -> Mapping[str, Any]:
        """The configuration as JSON types, which must not change when training is resumed."""
        raise NotImplementedError

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What a checkpoint must keep beside the model's weights."""
        return {}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Prepare the model: the Trainer is built, the optimizer not yet made, no checkpoint read.

        Raises:
            TrainerError: The model is compiled or will be sharded, several devices get copies of it in one process, or
                the Trainer has such a callback already.
        """
        if model is not None:
            refuse_sharded(type(self).__name__, args, model)
            self._refuse_second(state)
            self.prepare(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what can't work, and take up a checkpoint's state.

        Raises:
            TrainerError: The callback has not seen this model before its optimizer was made, or it is sharded.
            ResumeError: The checkpoint lacks our state, or was written with another configuration.
        """
        if model is None:
            raise TrainerError("The Trainer has no model.", "pass model=... to the Trainer")
        name = type(self).__name__
        refuse_sharded(name, args, bare(model))
        self._refuse_second(state)
        if self._prepared is None:
            raise TrainerError(
                f"{name} was added after the Trainer had been built, too late to prepare the model.",
                f"pass it as Trainer(..., callbacks=[{name}(...)])",
            )
        if not self.is_prepared(bare(model)):
            raise TrainerError(
                f"The Trainer trains another model than the one that {name} has prepared: model_init has made a new "
                "one, or another Trainer has the same callback.",
                "call prepare(model) of the callback inside of model_init, before it returns the model; a callback of "
                "its own for each Trainer",
            )
        section = None
        if state.global_step:
            folder = self.resume_from or _checkpoint(args, state)
            _check_same_run(folder, state, name)
            restore(folder, bare(model))
            section = read_section(folder, self.name, self.settings(), state.global_step)
        elif self.resume_from is not None:
            raise TrainerError(
                f"{name} has resume_from={str(self.resume_from)!r}, and training starts anew.",
                "trainer.train(resume_from_checkpoint=...) with that path, or leave resume_from out",
            )
        self.length = state.max_steps if section is None else section.length
        if self.scheduled:
            self._check_length(state)
        self.begin(bare(model), state, section)

    def _check_length(self, state: TrainerState) -> None:
        """Keep the schedule of a run that is resumed with another number of steps.

        Raises:
            ResumeError: It is over before the schedule is.
        """
        name = type(self).__name__
        if self.length > state.max_steps:
            raise ResumeError(
                f"The run was begun with {self.length} optimizer steps and now has {state.max_steps}: the schedule of "
                f"{name} would not come to its end.",
                f"TrainingArguments(max_steps={self.length}) or more, or start anew from the checkpoint's weights",
            )
        if self.length < state.max_steps:
            logger.warning(
                "The run was begun with %d optimizer steps and now has %d: fractions in the configuration of %s still "
                "are those of %d.",
                *(self.length, state.max_steps, name, self.length),
            )

    def _refuse_second(self, state: TrainerState) -> None:
        """Refuse another callback with a section of this name; the state, which all events share, says who is there.

        Raises:
            TrainerError: There is one.
        """
        taken: dict[str, CompressionCallback] = vars(state).setdefault(_CALLBACKS, {})
        if taken.setdefault(self.name, self) is not self:
            raise TrainerError(
                f"The Trainer has two callbacks that keep {self.name!r} state in its checkpoints, the second a "
                f"{type(self).__name__}.",
                "one of them, with all rules in its configuration",
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop before NaN gradients reach the weights.

        Raises:
            LossError: A gradient is NaN or infinite; with float16's loss scaling, which skips such steps, never.
        """
        if model is not None and not args.fp16:
            check_gradients(model, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Read what the Trainer has left out of the best model, where it has loaded one."""
        best = state.best_model_checkpoint
        if model is not None and args.load_best_model_at_end and best is not None and not is_quantized(bare(model)):
            restore(Path(best), bare(model))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put our section into the checkpoint that was just written.

        Raises:
            WriteError: The disk is full. The checkpoint is whole but for our section.
        """
        if model is None or not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            logger.warning(
                "There is no %s, as in a hyperparameter search, so %s keeps no state: that trial can't be resumed.",
                folder,
                type(self).__name__,
            )
            return
        kept = Section(self.settings(), state.global_step, self.tensors(bare(model)), self.length)
        write_section(folder, self.name, kept)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def bare(model: nn.Module) -> nn.Module:
    """A model out of what `torch.compile`, DDP and the like have put around it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return bare(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else bare(inner)


def _check_same_run(folder: Path, state: TrainerState, name: str) -> None:
    """Refuse a checkpoint of the right step but of another run, as an output directory that was used before has.

    Two runs are told apart by what they have logged.

    Raises:
        ResumeError: It isn't the one that the Trainer has resumed from.
    """
    fix = f'{name}(..., resume_from="PATH") with the path that trainer.train(resume_from_checkpoint=...) gets'
    try:
        logged = TrainerState.load_from_json(str(folder / TRAINER_STATE)).log_history
    except (OSError, ValueError, TypeError) as error:
        raise ResumeError(f"{folder} is no checkpoint of the Trainer ({type(error).__name__}).", fix) from None
    if json.dumps(logged) != json.dumps(state.log_history[: len(logged)]):  # as text: NaN is not equal to itself
        raise ResumeError(f"{folder} belongs to another run than the checkpoint that training is resumed from.", fix)


def _refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that torch.compile has seen, whose parts go by other names or run code made before.

    Raises:
        TrainerError: It is compiled; says where.
    """
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise TrainerError(
                f"{path or 'The model'} is compiled already, and has to be prepared before.",
                "leave torch.compile out and pass TrainingArguments(torch_compile=True)",
            )


def refuse_sharded(name: str, args: TrainingArguments | None = None, model: nn.Module | None = None) -> None:
    """Refuse to train pieces or copies of parameters.

    Args:
        name: Of what can't work with them, for the message.
        args: The Trainer's arguments, which tell before accelerate does.
        model: The model, whose parameters may be sharded from the start.

    Raises:
        TrainerError: The run uses FSDP, DeepSpeed, Megatron, tensor parallelism or `nn.DataParallel`.
    """
    kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    found = [kind.value] if kind in _SHARDED else []
    if args is not None:
        asked = {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed, "nn.DataParallel": args.n_gpu > 1}
        found += [what for what, given in asked.items() if given]
    if model is not None and any(_is_sharded(value) for value in model.parameters()):
        found.append("tensor parallelism")
    if found:
        raise TrainerError(
            f"{name} works on whole weights; {found[0]} trains pieces or copies of them.",
            "train with DDP: accelerate launch --multi_gpu, without a sharding plugin; or on one device",
        )


def _is_sharded(value: Tensor) -> bool:
    """Whether a parameter is a DTensor; there is none where the module was never imported."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(value, vars(loaded).get("DTensor", ()))


def check_gradients(model: nn.Module, step: int) -> None:
    """Refuse to take a step with gradients that are not finite.

    A loss that is NaN or infinite makes all of them so; looking at the one-dimensional ones costs next to nothing.

    Raises:
        LossError: One is not finite.
    """
    small = list(_small_gradients(model))
    if not small:
        return
    finite = torch.stack([torch.isfinite(gradient).all().to(small[0][1].device) for _, gradient in small])
    if bool(finite.all()):  # one look for all: each makes a GPU wait
        return
    name = small[finite.tolist().index(False)][0]
    raise LossError(
        f"The gradient of {name} is NaN or infinite after {step} optimizer steps: so is the loss. The weights are "
        "those of the last step, checkpoints are untouched.",
        "lower the learning rate, or look for the batch that causes it",
    )


def _small_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients of parameters of one dimension; the first one of any where there are none."""
    given = [(name, value.grad) for name, value in model.named_parameters() if value.grad is not None]
    small = [(name, gradient) for name, gradient in given if gradient.ndim <= 1]
    yield from small or given[:1]
