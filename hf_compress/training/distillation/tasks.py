"""What the outputs of each kind of model mean: which of them count, and how far a student's are from a teacher's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from ...calibration.padding import key_mask, mask_names, row_count
from ...core.errors import TeacherError, TrainerError, UnsupportedModelError
from .config import DistillationConfig, Task
from .losses import LOWEST, Divergence

IGNORED = -100
"""A label that doesn't count."""

Outputs = Mapping[str, Any]

_POOLED = ("sentence_embedding", "text_embeds", "image_embeds", "pooler_output")
_BY_LOSS: dict[str | None, Task] = {
    "ForCTC": "ctc",
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "token_classification",
}
_BY_CLASS: tuple[tuple[Mapping[str, Any], Task], ...] = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal_lm"),
    (MODEL_FOR_CTC_MAPPING_NAMES, "ctc"),
    (MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked_lm"),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "token_classification"),
)


@runtime_checkable
class _CountsFrames(Protocol):
    """A speech model that tells how many frames it makes of a sound."""

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor) -> Tensor: ...


@runtime_checkable
class _CountsSubsampled(Protocol):
    """The same under the other name that transformers has for it."""

    def _get_subsampling_output_length(self, input_lengths: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Outcome:
    """How far a student's outputs are from a teacher's, not yet divided by anything.

    Attributes:
        total: Sum over what counts, a scalar, float32 or wider.
        items: What it is to be divided by, for each row, int64; counted as the Trainer counts labels.
    """

    total: Tensor
    items: Tensor


@dataclass(frozen=True)
class Pair:
    """The outputs of both models for one batch.

    Attributes:
        student: The student's outputs.
        teacher: The teacher's.
        batch: Forward arguments with the labels.
        model: The student, without wrappers.
        config: The configuration.
        size: Leading entries of the vocabulary that both models know; None where they have the same.
    """

    student: Outputs
    teacher: Outputs
    batch: Mapping[str, Any]
    model: nn.Module
    config: DistillationConfig
    size: int | None = None

    def own(self, name: str = "logits") -> Tensor:
        """Logits of the student.

        Raises:
            TrainerError: It returns none.
        """
        found = self.student.get(name)
        if not isinstance(found, Tensor):
            raise TrainerError(
                f"{type(self.model).__name__} returned no {name}, only {', '.join(self.student)}.",
                "train without use_liger_kernel, or choose the task that fits: DistillationConfig(task=...)",
            )
        return found

    def logits(self, name: str = "logits") -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, of equal shape but for entries beyond `size`.

        Raises:
            TrainerError: The student returns none.
            TeacherError: The teacher's have another shape.
        """
        own, other = self.own(name), self.teacher.get(name)
        if not isinstance(other, Tensor):
            raise TeacherError(f"The teacher returned no {name}, only {', '.join(self.teacher)}.", _SAME_HEAD)
        if own.shape[:-1] != other.shape[:-1] or (self.size is None and own.shape != other.shape):
            raise TeacherError(
                f"The student's {name} have the shape {tuple(own.shape)}, the teacher's {tuple(other.shape)}.",
                _SAME_HEAD,
            )
        return own, other.to(own.device)

    @property
    def labels(self) -> Tensor | None:
        """The labels, where there are any."""
        found = self.batch.get("labels")
        return found if isinstance(found, Tensor) else None


_SAME_HEAD = "take a teacher with the student's head, which reads the same inputs"


def task_of(model: nn.Module, outputs: Outputs, labels: Tensor | None) -> Task:
    """The task, told from a model's class and outputs.

    Args:
        model: The student, without wrappers.
        outputs: Its outputs.
        labels: Its labels, where there are any.

    Raises:
        UnsupportedModelError: It can't be told.
    """
    if "start_logits" in outputs and "end_logits" in outputs:
        return "question_answering"
    logits = outputs.get("logits")
    if not isinstance(logits, Tensor):
        if "last_hidden_state" in outputs or any(name in outputs for name in _POOLED):
            return "embeddings"
    elif logits.ndim == 2:
        return _row_task(model, logits, labels)
    elif logits.ndim == 3 and isinstance(model, PreTrainedModel):
        found = _token_task(model)
        if found is not None:
            return found
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else "no tensor"
    raise UnsupportedModelError(
        f"The task of {type(model).__name__} can't be told: it returns {', '.join(outputs)}; logits: {shape}.",
        'name it, for example DistillationConfig(task="token_classification")',
    )


def _row_task(model: nn.Module, logits: Tensor, labels: Tensor | None) -> Task:
    """The task of a model with one set of logits per row, as transformers' own loss tells it."""
    kind = model.config.problem_type if isinstance(model, PreTrainedModel) else None
    if kind == "regression" or logits.shape[-1] == 1:
        return "regression"
    if kind == "multi_label_classification":
        return "multi_label"
    several = kind is None and labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "multi_label" if several else "classification"


def _token_task(model: PreTrainedModel) -> Task | None:
    """The task of a model with logits for each token."""
    if model.config.is_encoder_decoder:
        return "seq2seq_lm"
    name = type(model).__name__
    known = next((task for names, task in _BY_CLASS if name in names.values()), None)
    if known is not None:
        return known
    loss: str | None = model.loss_type
    return "causal_lm" if LOSS_MAPPING.get(loss) is ForCausalLMLoss else _BY_LOSS.get(loss)


def compare(pair: Pair) -> Outcome:
    """How far a student's outputs are from a teacher's, by the task's own rules.

    With alpha=0 what counts is only told from the student's outputs, so the teacher needs no head that compares.

    Raises:
        HFCompressError: The outputs don't fit together or to the task, or the task can't be told.
    """
    task = pair.config.task
    if task == "auto":
        task = task_of(pair.model, pair.student, pair.labels)
    rule = _RULES[task]
    _check_dimensions(pair, task, rule.dimensions)
    counted = rule.counted(pair)
    items = rule.items(pair, counted)
    if pair.config.alpha == 0:
        return Outcome(_nothing(pair.student), items)
    return Outcome(rule.total(pair if task in _OVER_VOCABULARY else replace(pair, size=None), counted), items)


@dataclass(frozen=True)
class _Rule:
    """How the outputs of a task are compared.

    Attributes:
        counted: Which of the student's outputs count, bool, the rows first.
        total: The sum over them.
        items: What it is to be divided by, for each row, int64.
        dimensions: Those of the logits; None where they may have any, or there are none.
    """

    counted: Callable[[Pair], Tensor]
    total: Callable[[Pair, Tensor], Tensor]
    items: Callable[[Pair, Tensor], Tensor]
    dimensions: int | None = None


def _check_dimensions(pair: Pair, task: Task, dimensions: int | None) -> None:
    """Refuse a task that is not that of the student: its labels would be read as those of other outputs.

    Raises:
        TrainerError: The logits have more or fewer dimensions.
    """
    logits = pair.student.get("logits")
    if dimensions is None or not isinstance(logits, Tensor) or logits.ndim == dimensions:
        return
    raise TrainerError(
        f"The task {task!r} takes logits of {dimensions} dimensions, but those of {type(pair.model).__name__} have "
        f"the shape {tuple(logits.shape)}.",
        'name the task that fits, or let it be told: DistillationConfig(task="auto")',
    )


def _as_counted(pair: Pair, counted: Tensor) -> Tensor:
    """As many items as outputs count."""
    return counted.reshape(len(counted), -1).sum(dim=1)


def _nothing(outputs: Outputs) -> Tensor:
    """0 with a gradient of zeros for the student, so that a batch without labels has a backward pass, too."""
    floating = (value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point())
    return _wide(next(value for value in floating if value.ndim).reshape(-1)[:0].sum())


def _answers(pair: Pair) -> Tensor:
    """Each row counts once, labelled or not."""
    return torch.ones_like(pair.own("start_logits")[:, 0], dtype=torch.bool)


def _vectors(pair: Pair) -> Tensor:
    """One embedding per row."""
    own = _embedding(pair, pair.student)
    return torch.ones(len(own), dtype=torch.bool, device=own.device)


def _classes(pair: Pair) -> Tensor:
    """One class per row."""
    return _labelled(pair, pair.own()[..., 0])


def _values(pair: Pair) -> Tensor:
    """Several labels or numbers per row."""
    return _labelled(pair, pair.own())


def _tokens(pair: Pair) -> Tensor:
    """Each token that has a label; each that is no padding, where no row has labels."""
    return _labelled(pair, pair.own()[..., 0], _own_mask(pair))


def _next_tokens(pair: Pair) -> Tensor:
    """Each token whose successor has a label; each that has a successor, without labels."""
    own = pair.own()[..., 0]
    shifted = pair.batch.get("shift_labels")
    if isinstance(shifted, Tensor):
        return _counted(shifted, own)
    if pair.labels is not None:
        return _counted(_successors(pair.labels, IGNORED), own)
    kept = _own_mask(pair)
    kept = torch.ones_like(own, dtype=torch.bool) if kept is None else kept.to(own.device)
    return kept & _successors(kept, False)


def _frames(pair: Pair) -> Tensor:
    """Each frame of a sound."""
    own = pair.own()[..., 0]
    kept = _frame_mask(pair, own.shape[1])
    return torch.ones_like(own, dtype=torch.bool) if kept is None else kept.to(own.device)


def _labels_of_frames(pair: Pair, counted: Tensor) -> Tensor:
    """As many items as labels, as a CTC loss per label; as frames, without labels."""
    if pair.labels is None:
        return _as_counted(pair, counted)
    return (pair.labels != IGNORED).sum(dim=1).to(counted.device)


def _diverge(pair: Pair, counted: Tensor) -> Tensor:
    """The divergence of distributions: over classes, tokens, or the labels of a frame, the blank included."""
    own, other = pair.logits()
    return _divergence(pair, own, other, counted)


def _diverge_labels(pair: Pair, counted: Tensor) -> Tensor:
    """The divergence of each label's sigmoid, which is a softmax over the logit and 0."""
    own, other = (torch.stack((value, torch.zeros_like(value)), dim=-1) for value in pair.logits())
    return _divergence(pair, own, other, counted)


def _square(pair: Pair, counted: Tensor) -> Tensor:
    """The squared error of numbers."""
    own, other = pair.logits()
    return ((_wide(own) - _wide(other)).square() * counted).sum()


def _diverge_spans(pair: Pair, counted: Tensor) -> Tensor:
    """The divergence of start and end of an answer: distributions over the tokens of a row, without padding."""
    kept = _own_mask(pair)
    totals = []
    for name in ("start_logits", "end_logits"):
        own, other = pair.logits(name)
        if kept is not None:
            own, other = (value.masked_fill(~kept, _lowest(value)) for value in (own, other))
        totals.append(_divergence(pair, own, other, counted))
    return (totals[0] + totals[1]) / 2


def _apart(pair: Pair, counted: Tensor) -> Tensor:
    """The distance of one embedding per row."""
    own, other = (_wide(_embedding(pair, outputs)) for outputs in (pair.student, pair.teacher))
    other = other.to(own.device)
    if own.shape != other.shape:
        raise TeacherError(
            f"The student's embeddings have {own.shape[-1]} features, the teacher's {other.shape[-1]}.",
            "learn from its hidden states, which are projected: alpha=0.0, hidden=HiddenConfig()",
        )
    if pair.config.embedding == "cosine":
        return (1 - torch.cosine_similarity(own, other, dim=-1)).sum()
    return (own - other).square().mean(dim=-1).sum()


_RULES: dict[Task, _Rule] = {
    "classification": _Rule(_classes, _diverge, _as_counted, 2),
    "multi_label": _Rule(_values, _diverge_labels, _as_counted, 2),
    "regression": _Rule(_values, _square, _as_counted),
    "token_classification": _Rule(_tokens, _diverge, _as_counted, 3),
    "question_answering": _Rule(_answers, _diverge_spans, _as_counted),
    "masked_lm": _Rule(_tokens, _diverge, _as_counted, 3),
    "causal_lm": _Rule(_next_tokens, _diverge, _as_counted, 3),
    "seq2seq_lm": _Rule(_tokens, _diverge, _as_counted, 3),
    "ctc": _Rule(_frames, _diverge, _labels_of_frames, 3),
    "embeddings": _Rule(_vectors, _apart, _as_counted),
}
_OVER_VOCABULARY: tuple[Task, ...] = ("masked_lm", "causal_lm", "seq2seq_lm")


def _divergence(pair: Pair, own: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """The sum of the divergence where it counts: logits with one dimension more than the mask."""
    rows = counted.reshape(-1).nonzero().squeeze(1)
    kind = Divergence.of(pair.config, pair.size)
    return kind(own.reshape(-1, own.shape[-1]), other.reshape(-1, other.shape[-1]), rows).sum()


def _labelled(pair: Pair, like: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Which of some values have a label; without labels, those that `otherwise` says, or all."""
    if pair.labels is not None:
        return _counted(pair.labels, like)
    return torch.ones_like(like, dtype=torch.bool) if otherwise is None else otherwise.to(like.device)


def _counted(labels: Tensor, like: Tensor) -> Tensor:
    """Which labels count, in the shape of what they belong to.

    Raises:
        TrainerError: There are more or fewer of them.
    """
    if labels.numel() != like.numel():
        raise TrainerError(
            f"There are labels of the shape {tuple(labels.shape)}, but the logits, classes left out, have the shape "
            f"{tuple(like.shape)}.",
            "check the data, or name the task: DistillationConfig(task=...)",
        )
    return labels.reshape(like.shape).to(like.device) != IGNORED


def _successors(values: Tensor, last: int | bool) -> Tensor:
    """What follows each token; `last` after the last one."""
    return torch.nn.functional.pad(values[..., 1:], (0, 1), value=last)


def _own_mask(pair: Pair) -> Tensor | None:
    """Which tokens are no padding, of what the outputs belong to."""
    name, _ = mask_names(pair.model, pair.batch)
    mask = pair.batch.get(name)
    return key_mask(mask, row_count(pair.batch)) if isinstance(mask, Tensor) else None


def _frame_mask(pair: Pair, frames: int) -> Tensor | None:
    """Which frames are no padding: rows × frames, by the model's own arithmetic; None without a mask."""
    mask = pair.batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    heard = mask.sum(dim=-1)
    if isinstance(pair.model, _CountsFrames):
        lengths = pair.model._get_feat_extract_output_lengths(heard)
    elif isinstance(pair.model, _CountsSubsampled):
        lengths = pair.model._get_subsampling_output_length(heard)
    else:
        raise UnsupportedModelError(
            f"{type(pair.model).__name__} doesn't tell how many frames it makes of a sound, so padding can't be left "
            "out.",
            "use rows of equal length without attention_mask",
        )
    return torch.arange(frames, device=mask.device) < lengths.to(mask.device).unsqueeze(1)


def _embedding(pair: Pair, outputs: Outputs) -> Tensor:
    """The embedding of each row.

    Raises:
        TeacherError: The outputs hold none.
    """
    if pair.config.pooling == "pooled":
        found = next((outputs[name] for name in _POOLED if isinstance(outputs.get(name), Tensor)), None)
    else:
        found = outputs.get("last_hidden_state")
    if not isinstance(found, Tensor):
        raise TeacherError(
            f"The outputs {', '.join(outputs)} hold no embedding of the kind pooling={pair.config.pooling!r}.",
            'pooling="mean"' if pair.config.pooling == "pooled" else 'pooling="pooled"',
        )
    if found.ndim != 3:  # one vector per row, or a convolutional model's channels × height × width
        return found.flatten(2).mean(dim=2) if found.ndim > 3 else found
    kept = _own_mask(pair)
    if kept is None or kept.shape != found.shape[:2]:
        return found.mean(dim=1)
    kept = kept.to(found.device).unsqueeze(-1)
    return torch.where(kept, found, found.new_zeros(())).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def _wide(value: Tensor) -> Tensor:
    """A value in float32, or in float64 where it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _lowest(value: Tensor) -> float:
    """What stands for minus infinity in logits of some type."""
    return max(LOWEST, torch.finfo(value.dtype).min)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model
