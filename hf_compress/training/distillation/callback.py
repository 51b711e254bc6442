"""Distillation without another Trainer class: a forward hook puts the teacher's loss into the student's outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import find_labels

from ...core.errors import ConfigError, TrainerError
from ..callback import CompressionCallback, bare
from ..state import Section
from .config import DistillationConfig
from .distiller import Distiller
from .tasks import Outputs, without_adapters
from .teacher import without_labels

logger = logging.getLogger(__name__)


class DistillationState(CompressionCallback):
    """What the mixin and the callback share: checks before the first step, and what checkpoints keep.

    Args:
        distiller: The teacher and what is learned of it.
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.
    """

    name: ClassVar[str] = "distillation"
    scheduled: ClassVar[bool] = False

    def __init__(self, distiller: Distiller, resume_from: str | Path | None = None) -> None:
        super().__init__(resume_from)
        self.distiller = distiller
        self._tokenizer: Any = None

    def insert(self, model: nn.Module) -> None:
        """Check that the student can learn from the teacher; the student stays as it is."""
        self.distiller.prepare(model, self._tokenizer)

    def begin(self, model: nn.Module, state: TrainerState, section: Section | None) -> None:
        """Take up projections, where training is resumed."""
        if section is not None and self.distiller.matching is not None:
            self.distiller.matching.projections.load(section.tensors, next(model.parameters()).device)

    def settings(self) -> Mapping[str, Any]:
        """The configuration and what the teacher is."""
        return self.distiller.settings()

    def tensors(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The projections and their moments, which are no part of the student."""
        return {} if self.distiller.matching is None else self.distiller.matching.projections.tensors()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the student, and refuse what the losses can't work with.

        Raises:
            TrainerError: The Trainer would compile layers that are to be compared, or shard or copy the student.
            TeacherError: The student can't learn from the teacher.
        """
        layered = self.distiller.config.hidden is not None or self.distiller.config.relations is not None
        if args.torch_compile and layered:
            raise TrainerError(
                "Layers inside of compiled code can't be observed, but hidden or relations ask for it.",
                "torch_compile=False, or hidden=None, relations=None",
            )
        self._tokenizer = kwargs.get("processing_class")
        super().on_init_end(args, state, control, model, **kwargs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the student also where it is another one than at first, as `model_init` makes it."""
        if model is not None and self._prepared is not None:  # else it was added too late, which the base refuses
            self.prepare(bare(model))
        super().on_train_begin(args, state, control, model, **kwargs)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the projections take their step, with the learning rate of the student's."""
        super().on_pre_optimizer_step(args, state, control, model, **kwargs)
        optimizer = kwargs.get("optimizer")
        if self.distiller.matching is None or optimizer is None:
            return
        scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self.distiller.matching.projections.step(optimizer.param_groups[0]["lr"], scale)


class DistillationCallback(DistillationState):
    """Lets the model of a plain Trainer learn from a teacher's outputs, in training only.

    While it trains, what the model returns as its loss holds the teacher's share; `eval_loss` is the task's own. It
    agrees bit by bit with `DistillationTrainer`, which alone knows losses on hidden states and relations, label
    smoothing, `compute_loss_func` and Trainers that compute the loss themselves.

    Hooks on the model do it. They act in the first forward pass with gradients of each batch of training, and do
    nothing any more where training is interrupted after it, or between steps. A Trainer that takes several such passes
    for a batch learns from the teacher in the first one only; it needs the mixin.

    Args:
        teacher: The teacher, of any type, quantized or not.
        config: What the student learns of it.
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.
        teacher_tokenizer: The teacher's tokenizer; None takes the one beside its weights, if any.

    Raises:
        TeacherError: The teacher is no model, or has no values.
        ConfigError: The configuration asks for more than the loss on outputs.
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: DistillationConfig | None = None,
        resume_from: str | Path | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(Distiller(teacher, config, teacher_tokenizer), resume_from)
        if self.distiller.config.hidden is not None or self.distiller.config.relations is not None:
            raise ConfigError(
                "DistillationCallback knows the loss on outputs only, not hidden and relations.",
                "use DistillationTrainer(teacher=..., distillation=...)",
            )
        self._handles: list[RemovableHandle] = []
        self._hooks = _Hooks()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the teacher beside the student, and add the hooks.

        Raises:
            TrainerError: The Trainer would compute the loss itself.
        """
        super().on_train_begin(args, state, control, model, **kwargs)
        if args.label_smoothing_factor:
            raise TrainerError(
                f"With label_smoothing_factor={args.label_smoothing_factor} the Trainer computes the loss itself.",
                "use DistillationTrainer(teacher=..., distillation=...)",
            )
        self.distiller.teacher.place(args.device)
        if model is not None:
            self._warn_of_dropped(model, args)
            self._hook(bare(model))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Remove the hooks."""
        self._unhook()
        super().on_train_end(args, state, control, model, **kwargs)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let the hooks act."""
        self._hooks.reached = False
        self._hooks.live = True

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let the hooks act in the next batch of the step."""
        self._hooks.live = True

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse to take a step that learns nothing of the teacher.

        Raises:
            TrainerError: The Trainer's loss is not the one that the model returned.
            LossError: A gradient is NaN or infinite.
        """
        self._hooks.live = False
        if not self._hooks.reached:
            raise TrainerError(
                "The step learns nothing of the teacher: the Trainer computes a loss of its own, not from the `loss` "
                "of the model's outputs, or doesn't call the model with keyword arguments.",
                "use DistillationTrainer(teacher=..., distillation=...), or put DistillationMixin before your Trainer",
            )
        super().on_pre_optimizer_step(args, state, control, model, **kwargs)

    def _warn_of_dropped(self, model: nn.Module, args: TrainingArguments) -> None:
        """Say where the teacher misses which sentence of a pair a token is of."""
        if args.remove_unused_columns and "token_type_ids" in self.distiller.only_taught(model):
            logger.warning(
                "The teacher takes token_type_ids, but %s doesn't, so the Trainer drops them from the data. For pairs "
                "of sentences use DistillationTrainer, which keeps them for the teacher.",
                type(without_adapters(bare(model))).__name__,
            )

    def _unhook(self) -> None:
        """Remove the hooks, if there are any."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, model: nn.Module) -> None:
        """Add the hooks."""
        self._unhook()
        self._hooks = _Hooks(self.distiller, find_labels(type(without_adapters(model))))
        self._handles = [
            model.register_forward_pre_hook(self._hooks.before, with_kwargs=True),
            model.register_forward_hook(self._hooks.after, with_kwargs=True),
        ]


class _Hooks:
    """What a model does in training steps: one hook keeps the number of items from it, the other one adds the loss.

    The model then returns a mean over the batch, which is scaled here, as the mixin does. A copy of the model shares
    them, and so the teacher; a pickled one has hooks that do nothing.

    Args:
        distiller: The teacher and what is learned of it; None for hooks that do nothing.
        labels: Names of the model's labels.

    Attributes:
        live: Whether they act: from the begin of a batch until its first forward pass with gradients.
        reached: Whether the loss has got a gradient in this step.
    """

    def __init__(self, distiller: Distiller | None = None, labels: Sequence[str] = ()) -> None:
        self.distiller = distiller
        self.labels = labels
        self.live = False
        self.reached = False
        self._running: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        return self

    def __reduce__(self) -> tuple[type[_Hooks], tuple[()]]:
        return _Hooks, ()

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments without what asks for a sum, or for a loss that counts for nothing."""
        self._running = None
        if self.distiller is None or not self.live or not module.training or not torch.is_grad_enabled() or args:
            return None
        self.live = False  # until the next batch begins, which an error may keep it from
        self._running = dict(kwargs)
        if self.distiller.config.alpha == 1:
            return args, without_labels(without_adapters(module), kwargs, self.labels)
        return args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The outputs with the loss that the student is to learn from."""
        if self.distiller is None or self._running is None:
            return None
        batch, self._running = self._running, None
        return self._with_loss(self.distiller, module, output, batch)

    def _with_loss(self, distiller: Distiller, model: nn.Module, output: Any, batch: dict[str, Any]) -> Outputs:
        """The outputs with the loss, which tells when its gradient is computed."""
        items_of_step = batch.pop("num_items_in_batch", None)
        taught = distiller.teach(model, batch, self.labels)
        task = output.get("loss") if isinstance(output, Mapping) else None
        if task is None and distiller.config.alpha < 1:
            raise TrainerError(
                f"{type(model).__name__} returned no loss in training: the batch holds {', '.join(batch)}.",
                "add labels; with compute_loss_func, use DistillationTrainer; for rows without labels, "
                "DistillationConfig(alpha=1.0)",
            )
        loss = distiller.loss(model, output, taught, batch, task, items_of_step)
        if loss.requires_grad:
            loss.register_hook(self._reach)
        return type(output)(**{**output, "loss": loss})

    def _reach(self, gradient: Tensor) -> None:
        """Note that the loss is the one that is learned from."""
        self.reached = True
