"""Quality against a baseline that is measured again on the same data, with its uncertainty."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from hf_compress.core.errors import EvaluationDataError, MeasurementError, UnsupportedModelError

if TYPE_CHECKING:
    from datasets import Dataset

    Data: TypeAlias = Sequence[str] | Sequence[tuple[str, int]] | Sequence[tuple[Tensor, int]] | Dataset

Task = Literal["classification", "causal-lm", "embedding"]

CONFIDENCE = 0.95
_NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %
_DEFAULT_MAX_LENGTH = 256
_CHUNK_ELEMENTS = 2**22  # of logits turned to float64 at a time: 32 MiB
_LABELLED = 'data=[("a text", 0), ("another", 1)]'
_TASKS: tuple[tuple[Task, tuple[dict[str, str | tuple[str, ...]], ...]], ...] = (
    (
        "classification",
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ),
    ("causal-lm", (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
    ("embedding", (MODEL_MAPPING_NAMES,)),
)


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ClassificationQuality(_Result):
    """Accuracy of a classifier and its baseline on the same examples.

    Args:
        examples: Number of examples.
        baseline_accuracy: Fraction in [0, 1].
        candidate_accuracy: Fraction in [0, 1].
        difference: Candidate minus baseline accuracy.
        difference_low: Lower end of its paired 95 % interval.
        difference_high: Upper end.
        lost: Examples only the baseline has right.
        gained: Examples only the candidate has right.
        agreement: Fraction of examples with the same prediction, right or wrong.
    """

    kind: Literal["classification"] = "classification"
    examples: int
    baseline_accuracy: float
    candidate_accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    lost: int
    gained: int
    agreement: float


class CausalLMQuality(_Result):
    """Perplexity of a language model and its baseline on the same windows.

    Args:
        windows: Number of windows.
        tokens: Predicted tokens.
        baseline_perplexity: exp of the mean negative log-likelihood per token.
        candidate_perplexity: The same of the candidate.
        ratio: Candidate / baseline; above 1 the candidate is worse.
        ratio_low: Lower end of its paired 95 % interval.
        ratio_high: Upper end.
        kl: Mean KL(baseline || candidate) per token, in nats.
        agreement: Fraction of tokens with the same most likely prediction.
    """

    kind: Literal["causal-lm"] = "causal-lm"
    windows: int
    tokens: int
    baseline_perplexity: float
    candidate_perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float
    kl: float
    agreement: float


class EmbeddingQuality(_Result):
    """Cosine between the embeddings of a model and of its baseline, text by text.

    Args:
        texts: Number of texts.
        mean: Mean cosine.
        mean_low: Lower end of its 95 % interval (Student's t over texts).
        mean_high: Upper end, at most 1.
        min: The worst text.
        p5: 5th percentile, linear interpolation.
    """

    kind: Literal["embedding"] = "embedding"
    texts: int
    mean: float
    mean_low: float
    mean_high: float
    min: float
    p5: float


class Perplexity(_Result):
    """Perplexity of one language model.

    Args:
        perplexity: exp of `nll`.
        nll: Mean negative log-likelihood per predicted token, in nats.
        tokens: Predicted tokens.
        window_nll: Mean negative log-likelihood per token of each window, in nats.
    """

    perplexity: float
    nll: float
    tokens: int
    window_nll: tuple[float, ...]


class QualityResult(_Result):
    """What compression cost in quality.

    Args:
        task: What was measured.
        result: The numbers, by task.
        max_length: Tokens per text or window; None for images.
        truncated: Texts cut at `max_length`. Texts for a language model are split instead, and 0 here.
        dropped: Texts or rests of texts with nothing to predict.
        confidence: Of the intervals.
    """

    task: Task
    result: Annotated[ClassificationQuality | CausalLMQuality | EmbeddingQuality, Field(discriminator="kind")]
    max_length: int | None
    truncated: int = 0
    dropped: int = 0
    confidence: float = CONFIDENCE


def evaluate_quality(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        data: Texts, (text, label) pairs, (pixel tensor [channels, height, width], label) pairs, or a
            `datasets.Dataset` with columns `text` and, for classifiers, `label`.
        tokenizer: Needed for texts.
        task: What to measure; None tells it from the model's class.
        max_length: Tokens per text or window; None means 256, or fewer if the model takes fewer.
        batch_size: Examples per forward.

    Raises:
        EvaluationDataError: Data, labels, tokenizer or length that don't fit.
        UnsupportedModelError: A model with no task that can be measured.
        MeasurementError: Outputs that are not numbers.
    """
    resolved = task or _common_task(model, baseline)
    _check_positive("batch_size", batch_size)
    examples = _examples(data)
    if examples.pixels:
        if resolved != "classification":
            raise EvaluationDataError(f"Images can't measure task {resolved!r}.", fix='task="classification"')
        labels = _labels(model, examples)
        result = _classify(model, baseline, labels, _pixel_batches(examples.pixels, batch_size))
        return QualityResult(task=resolved, result=result, max_length=None)
    if tokenizer is None:
        raise EvaluationDataError(
            "There are texts but no tokenizer.", fix="AutoTokenizer.from_pretrained(id)"
        )
    return _evaluate_texts(model, baseline, examples, tokenizer, resolved, max_length, batch_size)


def _evaluate_texts(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    examples: _Examples,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int | None,
    batch_size: int,
) -> QualityResult:
    length = _text_length((model, baseline), tokenizer, max_length)
    if task == "causal-lm":
        windows, dropped = text_windows(examples.texts, tokenizer, length)
        delta = perplexity_delta(baseline, model, windows, batch_size)
        return QualityResult(task=task, result=delta, max_length=length, dropped=dropped)
    if task == "classification":
        labels = _labels(model, examples)
        _check_padding((model, baseline), tokenizer, batch_size)
    batches, truncated = _text_batches((model, baseline), examples.texts, tokenizer, length, batch_size)
    result: ClassificationQuality | EmbeddingQuality
    if task == "classification":
        result = _classify(model, baseline, labels, batches)
    else:
        result = _embed(model, baseline, batches)
    return QualityResult(task=task, result=result, max_length=length, truncated=truncated)


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


def accuracy_delta(
    baseline_logits: Tensor, candidate_logits: Tensor, labels: Tensor
) -> ClassificationQuality:
    """Accuracies and their paired difference.

    The interval is Bonett & Price's adjusted Wald interval (J. Educ. Behav. Stat. 37, 2012, 479-488), which
    adds one to both discordant counts; recommended by Fagerland, Lydersen & Laake (Statist. Med. 33, 2014,
    2850-2875). It keeps a width when no prediction changed, as it must.

    Args:
        baseline_logits: [examples, classes].
        candidate_logits: [examples, classes].
        labels: [examples], integers in [0, classes).

    Raises:
        EvaluationDataError: Shapes that don't fit, no examples, labels out of range.
        MeasurementError: Logits that are not finite.
    """
    _check_logits(baseline_logits, candidate_logits, labels)
    predictions = [logits.detach().cpu().argmax(-1) for logits in (baseline_logits, candidate_logits)]
    right, candidate_right = (prediction == labels.cpu() for prediction in predictions)
    count = labels.numel()
    lost, gained = int((right & ~candidate_right).sum()), int((candidate_right & ~right).sum())
    p_lost, p_gained = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    centre = p_gained - p_lost
    width = _NORMAL_QUANTILE * math.sqrt((p_lost + p_gained - centre**2) / (count + 2))
    return ClassificationQuality(
        examples=count,
        baseline_accuracy=int(right.sum()) / count,
        candidate_accuracy=int(candidate_right.sum()) / count,
        difference=(gained - lost) / count,
        difference_low=max(-1.0, centre - width),
        difference_high=min(1.0, centre + width),
        lost=lost,
        gained=gained,
        agreement=int((predictions[0] == predictions[1]).sum()) / count,
    )


def perplexity(model: PreTrainedModel, windows: Sequence[Tensor], batch_size: int = 8) -> Perplexity:
    """Perplexity over windows of tokens; each token but a window's first is predicted from those before it.

    Log-probabilities and sums are in float64.

    Args:
        model: A causal language model.
        windows: Token ids, each [tokens] with at least 2; padded here, and padding is not counted.
        batch_size: Windows per forward.

    Raises:
        EvaluationDataError: No windows, or windows of the wrong form.
        MeasurementError: Outputs that are not numbers.
    """
    _check_windows((model,), windows, batch_size)
    with _evaluating(model):
        sums = [
            sum(_taken(rows.double().log_softmax(-1), ids) for rows, ids in _chunks(logits, targets))
            for logits, targets in _window_logits(model, windows, batch_size)
        ]
    counts = [len(window) - 1 for window in windows]
    nll = _finite(sum(sums), "negative log-likelihood") / sum(counts)
    return Perplexity(
        perplexity=_exp(nll, "perplexity"),
        nll=nll,
        tokens=sum(counts),
        window_nll=tuple(total / count for total, count in zip(sums, counts, strict=True)),
    )


def perplexity_delta(
    baseline: PreTrainedModel, candidate: PreTrainedModel, windows: Sequence[Tensor], batch_size: int = 8
) -> CausalLMQuality:
    """Perplexities, their paired ratio, KL divergence and agreement of two language models.

    The ratio's interval is a paired t interval over windows of the difference in mean negative log-
    likelihood, exponentiated. Windows weigh by their tokens, as in the perplexity itself, so the variance is
    that of a ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6); with windows of one
    length it is exactly the paired t interval. Windows cut from one text are taken as independent.

    Args:
        baseline: The original.
        candidate: The compressed one.
        windows: Token ids, each [tokens] with at least 2; at least 2 windows.
        batch_size: Windows per forward. Both models' logits of one batch are held at once.

    Raises:
        EvaluationDataError: Too few windows, or windows of the wrong form.
        MeasurementError: Outputs that are not numbers, or vocabularies that differ.
    """
    _check_windows((baseline, candidate), windows, batch_size)
    _check_count(len(windows), "window")
    with _evaluating(baseline, candidate):
        pairs = zip(
            _window_logits(baseline, windows, batch_size),
            _window_logits(candidate, windows, batch_size),
            strict=True,
        )
        rows = [_compare_window(first, second, targets) for (first, targets), (second, _) in pairs]
    table = torch.tensor(rows, dtype=torch.float64)
    counts = torch.tensor([len(window) - 1 for window in windows], dtype=torch.float64)
    tokens = float(counts.sum())
    old, new, kl, agreed = (
        _finite(total, "comparison of logits") / tokens for total in table.sum(0).tolist()
    )
    difference = new - old
    errors = (table[:, 1] - table[:, 0] - difference * counts) / counts.mean()
    deviation = math.sqrt(float((errors**2).sum()) / (len(windows) * (len(windows) - 1)))
    width = t_quantile(len(windows) - 1) * deviation
    return CausalLMQuality(
        windows=len(windows),
        tokens=int(tokens),
        baseline_perplexity=_exp(old, "baseline's perplexity"),
        candidate_perplexity=_exp(new, "candidate's perplexity"),
        ratio=_exp(difference, "ratio of perplexities"),
        ratio_low=_exp(difference - width, "ratio of perplexities"),
        ratio_high=_exp(difference + width, "ratio of perplexities"),
        kl=max(0.0, kl),  # rounding may leave it a hair below
        agreement=agreed,
    )


def embedding_similarity(baseline: Tensor, candidate: Tensor) -> EmbeddingQuality:
    """Cosine of two sets of embeddings, row by row, in float64.

    Args:
        baseline: [texts, width].
        candidate: [texts, width].

    Raises:
        EvaluationDataError: Shapes that differ, or fewer than 2 texts.
        MeasurementError: Embeddings that are zero or not finite.
    """
    if baseline.dim() != 2 or baseline.shape != candidate.shape:
        raise EvaluationDataError(
            f"Embeddings have shapes {tuple(baseline.shape)} and {tuple(candidate.shape)}, "
            "not one [texts, width]."
        )
    _check_count(len(baseline), "text")
    sides = [side.detach().cpu().double() for side in (baseline, candidate)]
    norms = [side.norm(dim=1) for side in sides]
    if not all(bool((norm > 0).all() and norm.isfinite().all()) for norm in norms):
        raise MeasurementError(
            "An embedding is zero or not finite.", fix="hf-compress diagnose names the layer"
        )
    cosines = ((sides[0] * sides[1]).sum(1) / (norms[0] * norms[1])).clamp(-1, 1)
    mean = float(cosines.mean())
    width = t_quantile(len(cosines) - 1) * float(cosines.std()) / math.sqrt(len(cosines))
    return EmbeddingQuality(
        texts=len(cosines),
        mean=mean,
        mean_low=max(-1.0, mean - width),
        mean_high=min(1.0, mean + width),
        min=float(cosines.min()),
        p5=float(cosines.quantile(0.05)),
    )


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that the mask keeps, in float64.

    Args:
        hidden: [batch, tokens, width].
        mask: [batch, tokens], 1 for tokens and 0 for padding.

    Returns:
        [batch, width]; NaN for a row without tokens.
    """
    weights = mask.to(hidden.device, torch.float64).unsqueeze(-1)
    # where, not a product: padding may hold NaN.
    kept = torch.where(
        weights > 0, hidden.double(), torch.zeros((), dtype=torch.float64, device=hidden.device)
    )
    return (kept * weights).sum(1) / weights.sum(1)


def t_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by bisection on its exact distribution.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 16.0  # 12.71 at one degree of freedom is the largest
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def text_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Tensor], int]:
    """Split each text into consecutive windows for `perplexity`.

    Args:
        texts: The texts; no window spans two.
        tokenizer: If it begins a text with its BOS, so does each window.
        max_length: Tokens per window, at least 2.

    Returns:
        Windows of token ids, each [tokens], and how many were dropped for having under 2 tokens.
    """
    windows: list[list[int]] = []
    for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        prefix = [token for token in ids[:1] if token == tokenizer.bos_token_id]
        body, step = ids[len(prefix) :], max_length - len(prefix)
        windows += [prefix + body[start : start + step] for start in range(0, len(body), step)] or [[]]
    kept = [torch.tensor(window) for window in windows if len(window) > 1]
    return kept, len(windows) - len(kept)


@dataclass(frozen=True)
class _Examples:
    texts: tuple[str, ...] = ()
    pixels: tuple[Tensor, ...] = ()
    labels: tuple[object, ...] | None = None


def _examples(data: Data) -> _Examples:
    items: list[object] = list(data) if isinstance(data, (list, tuple)) else _dataset_items(data)
    if not items:
        raise EvaluationDataError("There is no evaluation data: it is empty.", fix=_LABELLED)
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) == len(items):
        return _Examples(texts=texts)
    inputs, labels = [], []
    for index, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise EvaluationDataError(
                f"data[{index}] is a {type(item).__name__}, no (text, label).", fix=_LABELLED
            )
        inputs.append(item[0])
        labels.append(item[1])
    if all(isinstance(text, str) for text in inputs):
        return _Examples(texts=tuple(inputs), labels=tuple(labels))
    if all(isinstance(pixels, Tensor) for pixels in inputs):
        return _Examples(pixels=tuple(inputs), labels=tuple(labels))
    kinds = ", ".join(sorted({type(value).__name__ for value in inputs}))
    raise EvaluationDataError(
        f"Inputs are of type {kinds}, not all str or all Tensor.",
        fix='for images, pass (processor(image, return_tensors="pt")["pixel_values"][0], label)',
    )


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


def _labels(model: PreTrainedModel, examples: _Examples) -> Tensor:
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


def _common_task(model: PreTrainedModel, baseline: PreTrainedModel) -> Task:
    task, other = infer_task(model), infer_task(baseline)
    if task != other:
        raise UnsupportedModelError(
            f"The model is for {task}, its baseline for {other}.", fix="load both alike"
        )
    return task


def _text_length(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, requested: int | None
) -> int:
    positions = [_config_value(model, "max_position_embeddings") for model in models]
    limit = min((value for value in positions if isinstance(value, int)), default=None)
    if requested is None:
        return min(
            value for value in (_DEFAULT_MAX_LENGTH, tokenizer.model_max_length, limit) if value is not None
        )
    if requested < 2 or (limit is not None and requested > limit):
        raise EvaluationDataError(
            f"max_length={requested} is not from 2 to the model's {limit} positions.",
            fix=f"max_length={limit or 2}",
        )
    return requested


def _config_value(model: PreTrainedModel, name: str) -> object:
    """A value of the text config under its common name; None where this architecture has none."""
    config = model.config.get_text_config()
    return config.to_dict().get(config.attribute_map.get(name, name))


def _text_batches(
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
        _check_ids(models, encoded["input_ids"])
        batches.append(dict(encoded))
    return batches, sum(length > max_length for length in lengths)


def _pixel_batches(pixels: Sequence[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
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


def _classify(
    model: PreTrainedModel, baseline: PreTrainedModel, labels: Tensor, batches: Sequence[dict[str, Tensor]]
) -> ClassificationQuality:
    with _evaluating(model, baseline):
        sides = [
            torch.cat([_output(side, batch, "logits").cpu() for batch in batches])
            for side in (baseline, model)
        ]
    return accuracy_delta(sides[0], sides[1], labels)


def _embed(
    model: PreTrainedModel, baseline: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> EmbeddingQuality:
    for side in (model, baseline):
        if side.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"A {type(side).__name__} is encoder and decoder.",
                fix="model.get_encoder() and its baseline's",
            )
    with _evaluating(model, baseline):
        sides = [
            torch.cat(
                [
                    mean_pool(
                        _output(side.base_model, batch, "last_hidden_state"), batch["attention_mask"]
                    ).cpu()
                    for batch in batches
                ]
            )
            for side in (baseline, model)
        ]
    return embedding_similarity(sides[0], sides[1])


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval and inference mode; every sub-module's own training flag is put back."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _output(model: nn.Module, inputs: dict[str, Tensor], name: str) -> Tensor:
    """One output of a forward. Inputs that the model has no parameter for (token types) are left out."""
    known = inspect.signature(type(model).forward).parameters
    device = next(
        (tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu")
    )
    placed = {key: value.to(device) for key, value in inputs.items() if key in known}
    output = model(**placed, **({"use_cache": False} if "use_cache" in known else {}))
    value = output.get(name) if isinstance(output, ModelOutput) else None
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"A {type(model).__name__} gave no {name}.", fix="pass the task that it is for"
        )
    return value


def _window_logits(
    model: PreTrainedModel, windows: Sequence[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each window the logits [tokens - 1, vocabulary] and the tokens [tokens - 1] that they predict.

    Padding goes right, where causal attention can't see it, so any id does and slicing takes it off.
    """
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([window.long().cpu() for window in batch], batch_first=True)
        lengths = torch.tensor([len(window) for window in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = _output(model, {"input_ids": ids, "attention_mask": mask}, "logits")
        for row, length in enumerate(lengths.tolist()):
            yield logits[row, : length - 1], ids[row, 1:length].to(logits.device)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each, so that float64 copies stay small; the first is the widest."""
    rows = max(1, _CHUNK_ELEMENTS // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _taken(log_probs: Tensor, ids: Tensor) -> float:
    """Negative log-likelihood of the ids [rows] under [rows, vocabulary], summed."""
    return -float(log_probs.gather(-1, ids.unsqueeze(-1)).sum())


def _compare_window(
    baseline: Tensor, candidate: Tensor, targets: Tensor
) -> tuple[float, float, float, float]:
    """Sums over a window's tokens: both negative log-likelihoods, the KL divergence, equal predictions."""
    if baseline.shape != candidate.shape:
        raise MeasurementError(
            f"The baseline's vocabulary is {baseline.shape[-1]} and the candidate's {candidate.shape[-1]}.",
            fix="resize_token_embeddings on both alike",
        )
    sums = [0.0, 0.0, 0.0, 0.0]
    for old, new, ids in _chunks(baseline, candidate.to(baseline.device), targets):
        p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)  # 0 log 0 is 0
        agreed = (p.argmax(-1) == q.argmax(-1)).sum()
        values = (_taken(p, ids), _taken(q, ids), float(terms.sum()), float(agreed))
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums[0], sums[1], sums[2], sums[3]


def _t_probability(value: float, freedom: int) -> float:
    """P(|T| <= value), a finite sum for whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for factor in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (factor - 1) / factor
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _exp(value: float, name: str) -> float:
    """exp, or a typed error where it leaves float64."""
    if value > math.log(torch.finfo(torch.float64).max):
        raise MeasurementError(
            f"The {name} is above 1e308 (its logarithm is {value:.4g}).",
            fix="check the model, or give more windows",
        )
    return math.exp(value)


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise MeasurementError(
            f"The {name} is {value}: the logits hold NaN or infinite values.",
            fix="hf-compress diagnose names the first layer that does",
        )
    return value


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise EvaluationDataError(f"{name}={value} is below 1.", fix=f"{name}=8")


def _check_padding(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    """Decoder classifiers read the last token that isn't padding, silently the wrong one if ids differ."""
    for model in models:
        known = _config_value(model, "pad_token_id")
        if batch_size > 1 and tokenizer.pad_token_id is not None and known != tokenizer.pad_token_id:
            raise EvaluationDataError(
                f"The tokenizer pads with id {tokenizer.pad_token_id}, "
                f"but the model's pad_token_id is {known}.",
                fix=f"batch_size=1, or model.config.pad_token_id = {tokenizer.pad_token_id} on both models",
            )


def _check_count(count: int, what: str) -> None:
    if count < 2:
        raise EvaluationDataError(
            f"There is {count} {what}; an interval needs at least 2.",
            fix="give more texts, or a smaller max_length",
        )


def _check_logits(baseline: Tensor, candidate: Tensor, labels: Tensor) -> None:
    if baseline.dim() != 2 or baseline.shape != candidate.shape or labels.shape != baseline.shape[:1]:
        raise EvaluationDataError(
            f"Logits {tuple(baseline.shape)} and {tuple(candidate.shape)} with labels {tuple(labels.shape)} "
            "are not [examples, classes] twice and [examples]."
        )
    if labels.numel() == 0:
        raise EvaluationDataError("There are no examples.", fix=_LABELLED)
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= baseline.shape[1]:
        raise EvaluationDataError(
            f"Labels from {labels.min()} to {labels.max()}, {labels.dtype}, don't fit "
            f"{baseline.shape[1]} classes.",
            fix="integers from 0 on",
        )
    for name, logits in (("baseline", baseline), ("candidate", candidate)):
        _finite(0.0 if bool(logits.isfinite().all()) else math.nan, f"{name}'s classification")


def _check_windows(models: Sequence[PreTrainedModel], windows: Sequence[Tensor], batch_size: int) -> None:
    _check_positive("batch_size", batch_size)
    if not windows:
        raise EvaluationDataError("There are no windows of tokens.", fix="give longer texts")
    for index, window in enumerate(windows):
        if window.dim() != 1 or len(window) < 2 or window.is_floating_point():
            raise EvaluationDataError(
                f"windows[{index}] has shape {tuple(window.shape)} and {window.dtype}, "
                "not integer token ids [tokens] with at least 2 tokens.",
                fix="text_windows(texts, tokenizer, max_length)",
            )
        _check_ids(models, window)


def _check_ids(models: Sequence[PreTrainedModel], ids: Tensor) -> None:
    for model in models:
        embedding = model.get_input_embeddings()
        if (
            isinstance(embedding, nn.Embedding)
            and not 0 <= int(ids.min()) <= int(ids.max()) < embedding.num_embeddings
        ):
            raise EvaluationDataError(
                f"Token ids run from {int(ids.min())} to {int(ids.max())}, but the model has "
                f"{embedding.num_embeddings} embeddings.",
                fix="pass the tokenizer that belongs to the model",
            )
