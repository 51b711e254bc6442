"""Distillation for any Trainer: one method overridden, nothing copied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from ...core.errors import ConfigError, TrainerError
from ..callback import bare
from .callback import DistillationCallback, DistillationState
from .config import DistillationConfig
from .distiller import Distiller
from .tasks import without_adapters
from .teacher import without_labels

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class DistillationMixin(_Base):
    """Lets the student of a Trainer learn from a teacher.

    To be put in front of `Trainer`, `Seq2SeqTrainer`, or a Trainer of another package: `class Mine(DistillationMixin,
    Seq2SeqTrainer)`. While the student trains, the loss is what `DistillationConfig` says; evaluation computes the
    task's own, so that `eval_loss` compares with that of a run without a teacher. The teacher sees the rows that the
    student sees, under the run's mixed precision, without gradients; its weights keep their data type. It is no part
    of the student, of its checkpoints, of its optimizer or of what DDP wraps.

    All losses are sums over what has a label, divided by the number of labels of the whole optimizer step, so they
    don't depend on padding or on how the step is split into batches. That also holds for the task's own loss of models
    that ignore `num_items_in_batch`. Where the Trainer can't count labels, as for answers to questions or rows without
    labels, each batch counts by its own mean; so it does with `compute_loss_func`, whose loss is taken as it is. CTC's
    own loss with `ctc_loss_reduction="mean"` divides each row by its length, which no number of labels undoes: batches
    count by their labels then, and the split of a step matters; `"sum"` gives the loss per label.

    Columns of the data that only the teacher takes, such as `token_type_ids`, are kept for it.

    Args:
        *args: Of the Trainer.
        teacher: The teacher, of any type, quantized or not; it is moved to the student's device.
        distillation: What the student learns of it; None takes the defaults.
        teacher_tokenizer: The teacher's tokenizer; None takes the one beside its weights, if any.
        **kwargs: Of the Trainer.

    Raises:
        TeacherError: There is no teacher, or the student can't learn from it: it has another vocabulary, other labels,
            or shares weights with the student.
        TrainerError: A `DistillationCallback` would count the loss twice, or the Trainer uses `nn.DataParallel`.
        UnsupportedModelError: Layers are to be compared, but can't be found.
    """

    _signature_columns: list[str] | None  # the Trainer's, which has no type

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        distillation: DistillationConfig | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.distiller = Distiller(teacher, distillation, teacher_tokenizer)
        super().__init__(*args, **kwargs)
        if any(isinstance(one, DistillationCallback) for one in self.callback_handler.callbacks):
            raise TrainerError(
                "There are two teachers: this Trainer's, and that of a DistillationCallback.",
                "leave the callback out",
            )
        self._kept = DistillationState(self.distiller)
        self.add_callback(self._kept)
        self._kept.on_init_end(  # which it has missed
            self.args, self.state, self.control, model=self.model, processing_class=self.processing_class
        )
        self.distiller.teacher.place(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and tell where a checkpoint lies that is not in `output_dir`.

        Args:
            resume_from_checkpoint: Of the Trainer's own method.
            *args: The same.
            **kwargs: The same.

        Raises:
            ResumeError: The checkpoint was written with another configuration or teacher, told by a sample of its
                values, or by another Trainer.
        """
        given = not isinstance(resume_from_checkpoint, bool) and resume_from_checkpoint is not None
        self._kept.resume_from = Path(str(resume_from_checkpoint)) if given else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Predict, without what only the teacher takes.

        Args:
            model: The student.
            inputs: Forward arguments with labels.
            *args: Of the Trainer's own method.
            **kwargs: The same.
        """
        return super().prediction_step(model, self._own_inputs(inputs), *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep columns of the data that only the teacher takes, such as token types."""
        # A private method, but the only place where the Trainer decides on columns, for datasets and collators of any
        # kind; remove_unused_columns=False would keep what nobody takes. So it is extended, and its own result kept.
        unset = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if unset:
            further = sorted(self.distiller.only_taught(self.model))
            self._signature_columns = [*(self._signature_columns or ()), *further]

    def _own_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the student is given of a batch: all but what only the teacher takes."""
        foreign = self.distiller.only_taught(self.model) - {*self.label_names, "labels"}
        return {name: value for name, value in inputs.items() if name not in foreign}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; in training, with the teacher's share.

        Args:
            model: The student, with what accelerate has put around it.
            inputs: Forward arguments with labels.
            return_outputs: Whether to return the student's outputs, too.
            num_items_in_batch: Labels of the whole optimizer step.
            **kwargs: Of the Trainer's own method.

        Returns:
            A scalar, or the scalar and the outputs.

        Raises:
            LossError: The teacher's outputs hold NaN.
        """
        if not model.training:
            return super().compute_loss(
                model,
                self._own_inputs(inputs),
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        batch = dict(inputs)  # the Trainer takes labels out of the one that it is given
        scaled = self._counts_as_scaled(num_items_in_batch)
        items = num_items_in_batch if scaled else None
        with self.distiller.watching(model, self.distiller.teacher.model) as watched:
            task, outputs = self._of_the_student(model, self._own_inputs(inputs), num_items_in_batch, **kwargs)
            taught = self.distiller.teach(model, batch, self.label_names)
        mean = None if self.compute_loss_func is not None else task
        steps = self.current_gradient_accumulation_steps if scaled and items is None else 1
        loss = self.distiller.loss(model, outputs, taught, batch, mean, items, steps, watched)
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP takes the mean over processes
        if mean is None and task is not None:
            loss = loss + (1 - self.distiller.config.alpha) * task
        return (loss, outputs) if return_outputs else loss

    def _of_the_student(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None, **kwargs: Any
    ) -> tuple[Tensor | None, Any]:
        """The task's own loss and the student's outputs; no loss where it would count for nothing.

        Raises:
            ConfigError: There is nothing to compute the task's loss from.
        """
        alpha = self.distiller.config.alpha
        labelled = self.can_return_loss or any(name in inputs for name in (*self.label_names, "labels"))
        if alpha == 1 or (alpha == 0 and self.distiller.layered and not labelled):
            plain = without_adapters(bare(model))
            return None, model(**without_labels(plain, inputs, self.label_names))
        if not labelled:
            raise ConfigError(
                f"alpha={alpha} takes a share of the task's own loss, but the batch holds no labels: "
                f"{', '.join(inputs)}.",
                "add labels, or learn from the teacher only: DistillationConfig(alpha=1.0)",
            )
        own = num_items_in_batch if self.compute_loss_func is not None else None
        made: tuple[Tensor, Any] = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=own, **kwargs
        )
        return made

    def _counts_as_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer takes a loss as one of the whole optimizer step, and doesn't divide it further."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)


class DistillationTrainer(DistillationMixin, Trainer):
    """A `Trainer` whose model learns from a teacher; see `DistillationMixin`."""
