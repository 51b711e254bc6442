"""Quality against a baseline that is measured again on the same data, with its uncertainty."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from hf_compress.core.errors import EvaluationDataError, UnsupportedModelError

from .forward import evaluating, output_of
from .language import check_windows, perplexity, perplexity_delta, text_windows
from .quality_data import (
    Examples,
    check_arguments,
    check_padding,
    class_labels,
    pixel_batches,
    read_examples,
    text_batches,
    text_length,
)
from .quality_results import (
    CONFIDENCE,
    CausalLMQuality,
    ClassificationQuality,
    EmbeddingQuality,
    Perplexity,
    QualityResult,
    Task,
)
from .statistics import accuracy_delta, check_count, embedding_similarity, mean_pool, t_quantile

if TYPE_CHECKING:
    from .quality_data import Data, Processor

__all__ = [
    "CONFIDENCE",
    "CausalLMQuality",
    "ClassificationQuality",
    "EmbeddingQuality",
    "Perplexity",
    "QualityResult",
    "Task",
    "accuracy_delta",
    "embedding_similarity",
    "evaluate_quality",
    "infer_task",
    "mean_pool",
    "perplexity",
    "perplexity_delta",
    "prepare_quality",
    "t_quantile",
    "text_windows",
]

_TASKS: tuple[tuple[Task, tuple[dict[str, str | tuple[str, ...]], ...]], ...] = (
    (
        "classification",
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ),
    ("causal-lm", (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
    ("embedding", (MODEL_MAPPING_NAMES,)),
)


def evaluate_quality(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    data: Data,
    tokenizer: Processor | None = None,
    task: Task | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> QualityResult:
    """Measure a compressed model and its baseline on the same data.

    Both run in eval mode and `torch.inference_mode`; their training flags are restored. Texts for a language
    model are split into windows, which never span two texts and each begin with the tokenizer's BOS if it
    sets one; labels are then ignored.

    Args:
        model: The compressed model.
        baseline: The original.
        data: Texts, (text, label) pairs, (image, label) pairs, or a `datasets.Dataset` with columns `text`
            and, for classifiers, `label`. An image is a tensor [channels, height, width] that the model takes
            as it is, or anything that the image processor takes.
        tokenizer: Needed for texts; an image processor for images that aren't tensors.
        task: What to measure; None tells it from the model's class.
        max_length: Tokens per text or window; None means 256, or fewer if the model takes fewer.
        batch_size: Examples per forward.

    Raises:
        EvaluationDataError: Data, labels, tokenizer, task, length or batch size that don't fit.
        UnsupportedModelError: A model with no task that can be measured, or not with this one.
        MeasurementError: Outputs that are not numbers.
    """
    return prepare_quality(model, baseline, data, tokenizer, task, max_length=max_length, batch_size=batch_size)()


def prepare_quality(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    data: Data,
    tokenizer: Processor | None = None,
    task: Task | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> Callable[[], QualityResult]:
    """Check all that `evaluate_quality` is given, without running a model, and return the measurement."""
    check_arguments(task, max_length, batch_size)
    resolved = _common_task(model, baseline) if task is None else task
    examples = read_examples(data, tokenizer)
    if examples.pixels:
        if resolved != "classification":
            raise EvaluationDataError(f"Images can't measure task {resolved!r}.", fix='task="classification"')
        labels, batches = class_labels(model, examples), pixel_batches(examples.pixels, batch_size)
        return lambda: QualityResult(
            task="classification", result=_classify(model, baseline, labels, batches), max_length=None
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise EvaluationDataError(
            f"There are texts, and tokenizer is a {type(tokenizer).__name__}.", fix="AutoTokenizer.from_pretrained(id)"
        )
    return _prepare_texts(model, baseline, examples, tokenizer, resolved, max_length, batch_size)


def _prepare_texts(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int | None,
    batch_size: int,
) -> Callable[[], QualityResult]:
    """Check texts, and return the measurement on them."""
    length = text_length((model, baseline), tokenizer, max_length)
    if task == "causal-lm":
        windows, dropped = text_windows(examples.texts, tokenizer, length)
        check_windows((model, baseline), windows, batch_size)
        check_count(len(windows), "window")
        return lambda: QualityResult(
            task=task,
            result=perplexity_delta(model, baseline, windows, batch_size),
            max_length=length,
            dropped=dropped,
        )
    measure: Callable[[list[dict[str, Tensor]]], ClassificationQuality | EmbeddingQuality]
    if task == "classification":
        measure = functools.partial(_classify, model, baseline, class_labels(model, examples))
        check_padding((model, baseline), tokenizer, batch_size)
    else:
        measure = functools.partial(_embed, model, baseline)
        check_count(len(examples.texts), "text")
        _check_encoders(model, baseline)
    batches, truncated = text_batches((model, baseline), examples.texts, tokenizer, length, batch_size)
    return lambda: QualityResult(task=task, result=measure(batches), max_length=length, truncated=truncated)


def infer_task(model: PreTrainedModel) -> Task:
    """What can be measured on this model, by its class as transformers' auto mappings list it.

    Raises:
        UnsupportedModelError: No transformers model, or none of the three kinds.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is no transformers model.", fix="pass an AutoModelFor...'s result"
        )
    classes = {parent.__name__ for parent in type(model).__mro__}
    for task, mappings in _TASKS:
        for entry in chain.from_iterable(mapping.values() for mapping in mappings):
            if classes & ({entry} if isinstance(entry, str) else set(entry)):
                return task
    raise UnsupportedModelError(
        f"What to measure on a {type(model).__name__} is not known.",
        fix='pass task="classification", "causal-lm" or "embedding"',
    )


def _common_task(model: PreTrainedModel, baseline: PreTrainedModel) -> Task:
    task, other = infer_task(model), infer_task(baseline)
    if task != other:
        raise UnsupportedModelError(f"The model is for {task}, its baseline for {other}.", fix="load both alike")
    return task


def _check_encoders(*models: PreTrainedModel) -> None:
    for model in models:
        if model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"A {type(model).__name__} is encoder and decoder.",
                fix="model.get_encoder() and its baseline's",
            )


def _classify(
    model: PreTrainedModel, baseline: PreTrainedModel, labels: Tensor, batches: Sequence[dict[str, Tensor]]
) -> ClassificationQuality:
    with evaluating(model, baseline):
        sides = [
            torch.cat([output_of(side, batch, "logits", 2).cpu() for batch in batches]) for side in (model, baseline)
        ]
    return accuracy_delta(sides[0], sides[1], labels)


def _embed(
    model: PreTrainedModel, baseline: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> EmbeddingQuality:
    with evaluating(model, baseline):
        sides = [
            torch.cat(
                [
                    mean_pool(output_of(side.base_model, batch, "last_hidden_state", 3), batch["attention_mask"]).cpu()
                    for batch in batches
                ]
            )
            for side in (model, baseline)
        ]
    return embedding_similarity(sides[0], sides[1])
