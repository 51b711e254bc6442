"""One step of distillation, apart from any Trainer: a teacher's outputs, the losses, and what they are divided by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import TeacherError, TrainerError
from ..callback import bare
from .config import DistillationConfig
from .matching import Matching, Watched
from .tasks import Outputs, Pair, compare, without_adapters
from .teacher import Teacher, check_finite, check_pair, without_labels


class Distiller:
    """A teacher, and what a student learns of it.

    Args:
        teacher: The teacher.
        config: The configuration; None takes its defaults.
        tokenizer: The teacher's tokenizer; None takes the one beside its weights, if any.

    Raises:
        TeacherError: There is no teacher, or none with values.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        config: DistillationConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if teacher is None:
            raise TeacherError("There is no teacher.", "pass teacher=AutoModelForSequenceClassification...")
        self.config = config or DistillationConfig()
        self.teacher = Teacher(teacher, tokenizer)
        self.matching: Matching | None = None
        self._size: int | None = None

    def prepare(self, student: nn.Module, tokenizer: Any = None) -> None:
        """Check that a student can learn from the teacher, and find the layers that are compared.

        Args:
            student: The student.
            tokenizer: What the Trainer processes rows with.

        Raises:
            TeacherError: It can't.
        """
        self._size = check_pair(student, self.teacher, tokenizer)
        hidden, relations = self.config.hidden, self.config.relations
        if hidden is not None or relations is not None:
            self.matching = Matching(bare(student), self.teacher.plain, hidden, relations)

    @contextmanager
    def watching(self, *running: nn.Module) -> Iterator[Watched | None]:
        """Collect the layers that are compared, of one forward pass of each model.

        Args:
            *running: The models as they are called, with what accelerate has put around them.

        Raises:
            TrainerError: Layers are compared, and a model is compiled.
        """
        if self.matching is None:
            yield None
            return
        with self.matching.watching(*running) as watched:
            yield watched

    def teach(self, student: nn.Module, batch: Mapping[str, Any], labels: Collection[str]) -> Outputs:
        """The teacher's outputs for a batch.

        Args:
            student: The student, with or without wrappers.
            batch: Forward arguments with labels.
            labels: Names of labels.
        """
        plain = without_adapters(bare(student))
        return self.teacher(without_labels(plain, batch, labels), plain)

    def loss(
        self,
        student: nn.Module,
        outputs: Any,
        taught: Outputs,
        batch: Mapping[str, Any],
        task: Tensor | None = None,
        items_of_step: Tensor | int | None = None,
        steps: int = 1,
        watched: Watched | None = None,
    ) -> Tensor:
        """The loss of a batch, as a part of that of an optimizer step.

        Args:
            student: The student, with or without wrappers.
            outputs: Its outputs for the batch.
            taught: The teacher's.
            batch: Forward arguments with labels.
            task: The task's own loss, a mean over the batch, which is weighted by the items of the batch; None where
                it is not to be added.
            items_of_step: Items of all batches of the optimizer step; None where it is not known, and a batch counts
                by itself.
            steps: Where it is not known, what to divide by then: batches of the optimizer step, or 1 where the
                Trainer divides.
            watched: The layers that are compared.

        Returns:
            A scalar, float32 or wider. The loss of a row's layers counts as often as the row has items, so that the
            sum over the batches of a step does not depend on how it was split.

        Raises:
            TrainerError: The student's outputs are not what the task needs.
            TeacherError: The teacher's outputs don't fit.
            LossError: The teacher's outputs hold NaN.
        """
        if not isinstance(outputs, Mapping):
            raise TrainerError(f"The student returns a {type(outputs).__name__}.", "model.config.return_dict = True")
        plain = without_adapters(bare(student))
        outcome = compare(Pair(outputs, taught, batch, plain, self.config, self._size))
        items = outcome.items.sum()
        known = items * steps if items_of_step is None else torch.as_tensor(items_of_step, device=items.device)
        divisor = known.clamp(min=1)
        loss = self.config.alpha * outcome.total / divisor
        if self.matching is not None and watched is not None:
            for rows in self.matching.losses(watched, batch).values():
                loss = loss + (rows.to(loss.device) * outcome.items).sum() / divisor
        if not bool(torch.isfinite(loss)):
            check_finite(taught)
        if task is None or not bool(items):  # a mean over nothing is NaN
            return loss
        return loss + (1 - self.config.alpha) * _mean(plain, task, items) * (items / divisor)

    def settings(self) -> dict[str, Any]:
        """The configuration and what the teacher is, as JSON types."""
        values = sum(value.numel() for value in (*self.teacher.model.parameters(), *self.teacher.model.buffers()))
        return {
            **self.config.model_dump(mode="json"),
            "teacher": f"{type(self.teacher.plain).__name__} of {values} values",
        }


def _mean(model: nn.Module, loss: Tensor, items: Tensor) -> Tensor:
    """The task's own loss as a mean over its items; that of CTC may be a sum."""
    if not isinstance(model, PreTrainedModel) or "CTC" not in type(model).__name__:
        return loss
    return loss / items if model.config.to_dict().get("ctc_loss_reduction") == "sum" else loss
