"""Evaluation data: from what a user has to batches of tensors."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hf_compress.calibration.data_model import vocabulary
from hf_compress.core.errors import EvaluationDataError, UnsupportedModelError, nearest

from .quality_results import TASKS
from .statistics import is_count

if TYPE_CHECKING:
    from datasets import Dataset

    # Any: a tensor, or what an image processor takes (PIL is no dependency of ours).
    Data: TypeAlias = Sequence[str] | Sequence[tuple[str, int]] | Sequence[tuple[Any, int]] | Dataset
    Processor: TypeAlias = PreTrainedTokenizerBase | ImageProcessingMixin

_DEFAULT_MAX_LENGTH = 256
_LABELLED = 'data=[("a text", 0), ("another", 1)]'


@dataclass(frozen=True)
class Examples:
    """Data in one form: texts or pixels, with labels or without.

    Attributes:
        texts: The texts, or empty.
        pixels: Tensors [channels, height, width], or empty.
        labels: One for each text or image, not yet checked; None if the data has none.
    """

    texts: tuple[str, ...] = ()
    pixels: tuple[Tensor, ...] = ()
    labels: tuple[object, ...] | None = None


def read_examples(data: Data, processor: Processor | None = None) -> Examples:
    """Bring data to one form.

    Args:
        data: See `evaluate_quality`.
        processor: An image processor turns inputs that are neither texts nor tensors into pixels.

    Raises:
        EvaluationDataError: The data is empty, or mixed, or of unknown form.
    """
    items: list[object] = list(data) if isinstance(data, (list, tuple)) else _dataset_items(data)
    if not items:
        raise EvaluationDataError("There is no evaluation data: it is empty.", fix=_LABELLED)
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) == len(items):
        return Examples(texts=texts)
    inputs, labels = [], []
    for index, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise EvaluationDataError(f"data[{index}] is a {type(item).__name__}, no (text, label).", fix=_LABELLED)
        inputs.append(item[0])
        labels.append(item[1])
    if all(isinstance(text, str) for text in inputs):
        return Examples(texts=tuple(inputs), labels=tuple(labels))
    if all(isinstance(pixels, Tensor) for pixels in inputs):
        return Examples(pixels=tuple(inputs), labels=tuple(labels))
    if isinstance(processor, ImageProcessingMixin):
        return Examples(pixels=tuple(_pixels(image, processor) for image in inputs), labels=tuple(labels))
    kinds = ", ".join(sorted({type(value).__name__ for value in inputs}))
    raise EvaluationDataError(
        f"Inputs are of type {kinds}, not all str or all Tensor.",
        fix="for images, pass tokenizer=AutoImageProcessor.from_pretrained(id), or pixel tensors",
    )


def _pixels(image: object, processor: ImageProcessingMixin) -> Tensor:
    """[channels, height, width]: a tensor as it is, anything else through the image processor."""
    pixels = image if isinstance(image, Tensor) else processor(image, return_tensors="pt")["pixel_values"][0]
    if not isinstance(pixels, Tensor):
        raise EvaluationDataError(
            f"{type(processor).__name__} gave {type(pixels).__name__} and no tensor.", fix="pass pixel tensors"
        )
    return pixels


def _dataset_items(data: object) -> list[object]:
    from datasets import Dataset  # here, since it takes a second to import

    if not isinstance(data, Dataset):
        raise EvaluationDataError(
            f"Evaluation data is a {type(data).__name__}.",
            fix=f"a list or datasets.Dataset, such as {_LABELLED}",
        )
    if "text" not in data.column_names:
        raise EvaluationDataError(
            f"The dataset has columns {data.column_names} and none is 'text'.",
            fix=f'data.rename_column("{(data.column_names or ["sentence"])[0]}", "text")',
        )
    texts = list(data["text"])
    return list(zip(texts, data["label"], strict=True)) if "label" in data.column_names else texts


def class_labels(model: PreTrainedModel, examples: Examples) -> Tensor:
    """[examples], int64 in [0, num_labels)."""
    count = model.config.num_labels
    if model.config.problem_type not in (None, "single_label_classification") or count < 2:
        raise UnsupportedModelError(
            f"Accuracy needs one of several classes; this model has num_labels={count} "
            f"and problem_type={model.config.problem_type!r}.",
            fix='task="embedding"',
        )
    if examples.labels is None:
        raise EvaluationDataError("Accuracy needs labels, and the data has none.", fix=_LABELLED)
    labels = []
    for index, label in enumerate(examples.labels):
        try:
            labels.append(operator.index(label))  # type: ignore[arg-type]  # checked by the except
        except TypeError as error:
            raise EvaluationDataError(
                f"The label of data[{index}] is {label!r}, no integer.", fix=_LABELLED
            ) from error
        if not 0 <= labels[-1] < count:
            raise EvaluationDataError(
                f"The label of data[{index}] is {labels[-1]}, but the model has num_labels={count}.",
                fix=f"labels from 0 to {count - 1}, in the order of model.config.id2label",
            )
    return torch.tensor(labels)


def text_length(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, requested: int | None) -> int:
    """Tokens per text: what was asked for, or 256, or fewer if the tokenizer or a model takes fewer.

    Raises:
        EvaluationDataError: More tokens were asked for than a model has positions.
    """
    positions = [config_value(model, "max_position_embeddings") for model in models]
    limit = min((value for value in positions if isinstance(value, int)), default=None)
    if requested is None:
        return min(value for value in (_DEFAULT_MAX_LENGTH, tokenizer.model_max_length, limit) if value is not None)
    if requested < 2 or (limit is not None and requested > limit):
        raise EvaluationDataError(
            f"max_length={requested} is not from 2 to the model's {limit} positions.",
            fix=f"max_length={limit or 2}",
        )
    return requested


def config_value(model: PreTrainedModel, name: str) -> object:
    """A value of the text config under its common name; None where this architecture has none."""
    config = model.config.get_text_config()
    return config.to_dict().get(config.attribute_map.get(name, name))


def text_batches(
    models: Sequence[PreTrainedModel],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
) -> tuple[list[dict[str, Tensor]], int]:
    """Padded batches, and how many texts were cut."""
    if batch_size > 1 and tokenizer.pad_token_id is None:
        raise EvaluationDataError(
            "The tokenizer has no padding token.", fix="batch_size=1, or set tokenizer.pad_token"
        )
    lengths = [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    if 0 in lengths:
        raise EvaluationDataError(f"data[{lengths.index(0)}] has no tokens.", fix="drop empty texts")
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            list(texts[start : start + batch_size]),
            padding=batch_size > 1,
            padding_side="right",  # on the left it would shift absolute positions
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        check_ids(models, encoded["input_ids"])
        batches.append(dict(encoded))
    return batches, sum(length > max_length for length in lengths)


def pixel_batches(pixels: Sequence[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of images.

    Raises:
        EvaluationDataError: The images are not of one shape [channels, height, width].
    """
    shapes = sorted({tuple(image.shape) for image in pixels})
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise EvaluationDataError(
            f"Pixel tensors have shapes {shapes}, not one shape [channels, height, width].",
            fix='processor(image, return_tensors="pt")["pixel_values"][0]',
        )
    return [
        {"pixel_values": torch.stack(list(pixels[start : start + batch_size]))}
        for start in range(0, len(pixels), batch_size)
    ]


def check_positive(name: str, value: object) -> None:
    """Refuse what is no count from 1 on.

    Raises:
        EvaluationDataError: `value` is no integer, or below 1.
    """
    if not is_count(value):
        raise EvaluationDataError(f"{name}={value!r} is a {type(value).__name__}, no integer.", fix=f"{name}=8")
    if value < 1:
        raise EvaluationDataError(f"{name}={value} is below 1.", fix=f"{name}=8")


def check_arguments(task: object, max_length: object, batch_size: object) -> None:
    """Refuse arguments that fit no model.

    Raises:
        EvaluationDataError: An unknown task, or a length or batch size of the wrong type or size.
    """
    if task is not None and task not in TASKS:
        known = " or ".join(f'"{name}"' for name in TASKS)
        raise EvaluationDataError(
            f"task={task!r} is none that can be measured. {nearest(str(task), TASKS)}".rstrip(), fix=f"task={known}"
        )
    check_positive("batch_size", batch_size)
    if max_length is not None and not is_count(max_length):
        raise EvaluationDataError(
            f"max_length={max_length!r} is a {type(max_length).__name__}, no integer.", fix="max_length=256"
        )


def check_padding(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    """Refuse classifiers that would read the wrong token.

    Decoders classify by the last token that isn't padding, which they tell by its id. Encoders go by the
    attention mask, so any id does.

    Raises:
        EvaluationDataError: A decoder's padding id is not the tokenizer's.
    """
    for model in filter(_reads_last_token, models):
        known = config_value(model, "pad_token_id")
        if batch_size > 1 and tokenizer.pad_token_id is not None and known != tokenizer.pad_token_id:
            raise EvaluationDataError(
                f"The tokenizer pads with id {tokenizer.pad_token_id}, but the model's pad_token_id is {known}.",
                fix=f"batch_size=1, or model.config.pad_token_id = {tokenizer.pad_token_id} on both models",
            )


def _reads_last_token(model: PreTrainedModel) -> bool:
    """Whether it is a decoder, by its forward (it takes a cache) or its family (causal and never masked)."""
    family = model.config.get_text_config().model_type
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    caches = {"past_key_values", "use_cache"} & set(inspect.signature(type(model).forward).parameters)
    return causal or bool(caches) or bool(model.config.is_encoder_decoder)


def check_ids(models: Sequence[PreTrainedModel], ids: Tensor) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        EvaluationDataError: An id is negative or too large.
    """
    for model in models:
        known = vocabulary(model)
        if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise EvaluationDataError(
                f"Token ids run from {int(ids.min())} to {int(ids.max())}, but the model has {known} embeddings.",
                fix="pass the tokenizer that belongs to the model",
            )
