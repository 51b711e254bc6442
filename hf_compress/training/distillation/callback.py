"""Distillation without another Trainer class: a forward hook puts the teacher's loss into the student's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
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

if TYPE_CHECKING:
    from torch.optim import Optimizer


class DistillationState(CompressionCallback):
    """What the mixin and the callback share: checks before the first step, and what checkpoints keep.

    Args:
        distiller: The teacher and what is learned of it.
        resume_from: Directory of the checkpoint that training is resumed from, where it is not
            `output_dir/checkpoint-STEP`.
    """

    name: ClassVar[str] = "distillation"

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
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the student also where it is another one than at first, as `model_init` makes it."""
        if model is not None:
            self.prepare(bare(model))
        super().on_train_begin(args, state, control, model, optimizer, **kwargs)

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
    smoothing and `compute_loss_func`.

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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the teacher beside the student, and add the hooks.

        Raises:
            TrainerError: The Trainer would compute the loss itself.
        """
        super().on_train_begin(args, state, control, model, optimizer, **kwargs)
        if args.label_smoothing_factor:
            raise TrainerError(
                f"With label_smoothing_factor={args.label_smoothing_factor} the Trainer computes the loss itself.",
                "use DistillationTrainer(teacher=..., distillation=...)",
            )
        if "hf_device_map" not in vars(self.distiller.teacher.model):
            self.distiller.teacher.model.to(args.device)
        if model is not None:
            self._hook(bare(model))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Remove the hooks."""
        self._unhook()

    def _unhook(self) -> None:
        """Remove the hooks, if there are any."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, model: nn.Module) -> None:
        """Add the hooks: one keeps the number of items from the model, the other one adds the loss.

        The model then returns a mean over the batch, which is scaled here, as the mixin does. They are functions, not
        methods: a copy of the model copies its hooks, but not what functions refer to, such as the teacher.
        """
        self._unhook()
        names = find_labels(type(without_adapters(model)))
        running: list[dict[str, Any]] = []

        @torch.compiler.disable
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not module.training or args:
                return None
            running[:] = [dict(kwargs)]
            if self.distiller.config.alpha == 1:
                return args, without_labels(without_adapters(module), kwargs, names)
            return args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

        @torch.compiler.disable
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._with_loss(module, output, running.pop(), names) if module.training and running else None

        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    def _with_loss(self, model: nn.Module, output: Any, batch: dict[str, Any], names: list[str]) -> Outputs:
        """The outputs with the loss that the student is to learn from."""
        items_of_step = batch.pop("num_items_in_batch", None)
        with _as_the_student(next(model.parameters()).device):
            taught = self.distiller.teach(model, batch, names)
        task = output.get("loss") if isinstance(output, Mapping) else None
        if task is None and self.distiller.config.alpha < 1:
            raise TrainerError(
                f"{type(model).__name__} returned no loss in training: the batch holds {', '.join(batch)}.",
                "add labels, use DistillationTrainer with compute_loss_func, or DistillationConfig(alpha=1.0)",
            )
        loss = self.distiller.loss(model, output, taught, batch, task, items_of_step)
        return type(output)(**{**output, "loss": loss})


def _as_the_student(device: torch.device) -> AbstractContextManager[None]:
    """The mixed precision that accelerate gives the student."""
    types = {"fp16": torch.float16, "bf16": torch.bfloat16}
    found = types.get(str(AcceleratorState().mixed_precision))
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=found, enabled=found is not None)
    return context
