"""What all callbacks share: they prepare the model before the optimizer is made, and refuse what can't work early."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..apply.planning import is_quantized
from ..core.errors import AlreadyQuantizedError, LossError, TrainerError
from .state import Section, read_section, write_section

if TYPE_CHECKING:
    from torch.optim import Optimizer

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class CompressionCallback(TrainerCallback):
    """Base of the callbacks of this package.

    A subclass implements `prepare`, and may implement `begin`, `tensors`, and Trainer's events; those that it
    overrides call `super()`.

    Args:
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.
    """

    name: ClassVar[str]
    """Of its section in a checkpoint's state file."""

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = None if resume_from is None else Path(resume_from)
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
        """Prepare the model: the Trainer is built, the optimizer not yet made, no checkpoint read."""
        if model is not None:
            self.prepare(bare(model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what can't work, and take up a checkpoint's state.

        Raises:
            TrainerError: The callback has not seen this model before its optimizer was made, or it is sharded.
            ResumeError: The checkpoint lacks our state, or was written with another configuration.
        """
        if model is None:
            raise TrainerError("The Trainer has no model.", "pass model=... to the Trainer")
        refuse_sharded(type(self).__name__)
        name = type(self).__name__
        if self._prepared is None:
            raise TrainerError(
                f"{name} was added after the Trainer had been built, too late to prepare the model.",
                f"pass it as Trainer(..., callbacks=[{name}(...)])",
            )
        if not self.is_prepared(bare(model)):
            raise TrainerError(
                f"The Trainer trains another model than the one that {name} has prepared, as model_init makes it.",
                f"call {name}.prepare(model) inside of model_init, before it returns the model",
            )
        section = None
        if state.global_step:
            section = read_section(self._folder(args, state), self.name, self.settings(), state.global_step)
        self.begin(bare(model), state, section)

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

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put our section into the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if model is None or not state.is_world_process_zero or not folder.is_dir():
            return
        write_section(folder, self.name, Section(self.settings(), state.global_step, self.tensors(bare(model))))

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that training is resumed from."""
        return self.resume_from or _checkpoint(args, state)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def bare(model: nn.Module) -> nn.Module:
    """A model out of what `torch.compile`, DDP and the like have put around it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return bare(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else bare(inner)


def refuse_sharded(name: str) -> None:
    """Refuse to train sharded parameters.

    Raises:
        TrainerError: The run uses FSDP, DeepSpeed or Megatron, whose parameters are pieces or copies of the model's.
    """
    kind = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    if kind in _SHARDED:
        raise TrainerError(
            f"{name} works on whole weights; {kind.value} trains pieces or copies of them.",
            "train with DDP: accelerate launch --multi_gpu, without a sharding plugin",
        )


def check_gradients(model: nn.Module, step: int) -> None:
    """Refuse to take a step with gradients that are not finite.

    A loss that is NaN or infinite makes all of them so; looking at the one-dimensional ones costs nothing.

    Raises:
        LossError: One is not finite.
    """
    for name, gradient in _small_gradients(model):
        if not bool(torch.isfinite(gradient).all()):
            raise LossError(
                f"The gradient of {name} is NaN or infinite after {step} optimizer steps: so is the loss. The weights "
                "are those of the last step, checkpoints are untouched.",
                "lower the learning rate, or look for the batch that causes it",
            )


def _small_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients of parameters of one dimension; the first one of any where there are none."""
    given = [(name, value.grad) for name, value in model.named_parameters() if value.grad is not None]
    small = [(name, gradient) for name, gradient in given if gradient.ndim <= 1]
    yield from small or given[:1]
