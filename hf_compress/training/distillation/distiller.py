"""One step of distillation, apart from any Trainer: a teacher's outputs, the losses, and what they are divided by."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import ConfigError, TeacherError, TrainerError
from ..callback import bare
from .config import DistillationConfig
from .matching import Matching, Watched
from .tasks import Outputs, Pair, compare, without_adapters
from .teacher import Teacher, check_finite, check_pair, without_labels

_SAMPLE = 64
"""Values of each of a teacher's tensors that its checksum is of."""


class Distiller:
    """A teacher, and what a student learns of it.

    Args:
        teacher: The teacher.
        config: The configuration; None takes its defaults.
        tokenizer: The teacher's tokenizer; None takes the one beside its weights, if any.

    Raises:
        TeacherError: There is no teacher, or none with values.
        ConfigError: The configuration or the tokenizer is something else.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        config: DistillationConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if teacher is None:
            raise TeacherError("There is no teacher.", "pass teacher=AutoModelForSequenceClassification...")
        if config is not None and not isinstance(config, DistillationConfig):
            raise ConfigError(
                f"The configuration is a {type(config).__name__}, not a DistillationConfig.",
                "DistillationConfig(**values)" if isinstance(config, Mapping) else "DistillationConfig(alpha=0.5)",
            )
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                f"teacher_tokenizer is a {type(tokenizer).__name__}, not a tokenizer.",
                "teacher_tokenizer=AutoTokenizer.from_pretrained(...)",
            )
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
        self._size = check_pair(student, self.teacher, tokenizer, outputs=self.config.alpha > 0)
        if self.layered:
            self.matching = Matching(bare(student), self.teacher.plain, self.config.hidden, self.config.relations)

    @property
    def layered(self) -> bool:
        """Whether layers are compared."""
        return self.config.hidden is not None or self.config.relations is not None

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

    def only_taught(self, student: nn.Module) -> frozenset[str]:
        """Names of the arguments that the teacher takes and a student doesn't, such as token types.

        Args:
            student: The student, with or without wrappers.
        """
        return self.teacher.alone_takes(without_adapters(bare(student)))

    def settings(self) -> dict[str, Any]:
        """The configuration and what the teacher is, as JSON types."""
        return {**self.config.model_dump(mode="json"), "teacher": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        """What tells a teacher from another one: its class, its size, and a checksum of values all over its tensors.

        Some values of each tensor, evenly spaced, so that a large teacher costs no more than a small one; training
        changes nearly all values of what it trains.
        """
        values, checksum = 0, 0
        for value in (*self.teacher.model.parameters(), *self.teacher.model.buffers()):
            values += value.numel()
            flat = value.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // _SAMPLE)].contiguous().cpu()
            checksum = zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), checksum)
        return f"{type(self.teacher.plain).__name__} of {values} values, checksum {checksum:08x}"


def _mean(model: nn.Module, loss: Tensor, items: Tensor) -> Tensor:
    """The task's own loss as a mean over its items; that of CTC may be a sum.

    With `ctc_loss_reduction="mean"` it is a mean over rows, each divided by its length, and is left so: as the loss of
    a batch it is the stock one, but batches of a step are weighted by their labels, not by their rows.
    """
    if not isinstance(model, PreTrainedModel) or "CTC" not in type(model).__name__:
        return loss
    return loss / items if model.config.to_dict().get("ctc_loss_reduction") == "sum" else loss
