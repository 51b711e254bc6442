"""Perplexity of language models over windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.errors import EvaluationDataError, MeasurementError

from .forward import evaluating, output_of
from .quality_data import check_ids, check_positive
from .quality_results import CausalLMQuality, Perplexity
from .statistics import check_count, finite, t_quantile

_CHUNK_ELEMENTS = 2**22  # of logits turned to float64 at a time: 32 MiB


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
    check_windows((model,), windows, batch_size)
    with evaluating(model):
        sums = [
            sum(_taken(rows.double().log_softmax(-1), ids) for rows, ids in _chunks(logits, targets))
            for logits, targets in _window_logits(model, windows, batch_size)
        ]
    counts = [len(window) - 1 for window in windows]
    nll = finite(sum(sums), "negative log-likelihood") / sum(counts)
    return Perplexity(
        perplexity=_exp(nll, "perplexity"),
        nll=nll,
        tokens=sum(counts),
        window_nll=tuple(total / count for total, count in zip(sums, counts, strict=True)),
    )


def perplexity_delta(
    candidate: PreTrainedModel, baseline: PreTrainedModel, windows: Sequence[Tensor], batch_size: int = 8
) -> CausalLMQuality:
    """Perplexities, their paired ratio, KL divergence and agreement of two language models.

    The ratio's interval is a paired t interval over windows of the difference in mean negative log-
    likelihood, exponentiated. Windows weigh by their tokens, as in the perplexity itself, so the variance is
    that of a ratio estimator (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6); with windows of one
    length it is exactly the paired t interval. Windows cut from one text are taken as independent.

    Args:
        candidate: The compressed model.
        baseline: The original.
        windows: Token ids, each [tokens] with at least 2; at least 2 windows.
        batch_size: Windows per forward. Both models' logits of one batch are held at once.

    Raises:
        EvaluationDataError: Too few windows, or windows of the wrong form.
        MeasurementError: Outputs that are not numbers, or vocabularies that differ.
    """
    check_windows((candidate, baseline), windows, batch_size)
    check_count(len(windows), "window")
    with evaluating(candidate, baseline):
        pairs = zip(
            _window_logits(candidate, windows, batch_size),
            _window_logits(baseline, windows, batch_size),
            strict=True,
        )
        rows = [_compare_window(new, old, targets) for (new, targets), (old, _) in pairs]
    table = torch.tensor(rows, dtype=torch.float64)
    counts = torch.tensor([len(window) - 1 for window in windows], dtype=torch.float64)
    tokens = float(counts.sum())
    old, new, kl, agreed = (finite(total, "comparison of logits") / tokens for total in table.sum(0).tolist())
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
        logits = output_of(model, {"input_ids": ids, "attention_mask": mask}, "logits", 3)
        for row, length in enumerate(lengths.tolist()):
            yield logits[row, : length - 1], ids[row, 1:length].to(logits.device)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each, so that float64 copies stay small; the first is the widest."""
    rows = max(1, _CHUNK_ELEMENTS // tensors[0].shape[-1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _taken(log_probs: Tensor, ids: Tensor) -> float:
    """Negative log-likelihood of the ids [rows] under [rows, vocabulary], summed."""
    return -float(log_probs.gather(-1, ids.unsqueeze(-1)).sum())


def _compare_window(candidate: Tensor, baseline: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    """Sums over a window's tokens: both negative log-likelihoods, the KL divergence, equal predictions."""
    if baseline.shape != candidate.shape:
        raise MeasurementError(
            f"The baseline's vocabulary is {baseline.shape[-1]} and the candidate's {candidate.shape[-1]}.",
            fix="resize_token_embeddings on both alike",
        )
    sums = [0.0, 0.0, 0.0, 0.0]
    for old, new, ids in _chunks(baseline.to(candidate.device), candidate, targets):
        p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)  # 0 log 0 is 0
        agreed = (p.argmax(-1) == q.argmax(-1)).sum()
        values = (_taken(p, ids), _taken(q, ids), float(terms.sum()), float(agreed))
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums[0], sums[1], sums[2], sums[3]


def _exp(value: float, name: str) -> float:
    """exp, or a typed error where it leaves float64."""
    if value > math.log(torch.finfo(torch.float64).max):
        raise MeasurementError(
            f"The {name} is above 1e308 (its logarithm is {value:.4g}).",
            fix="check the model, or give more windows",
        )
    return math.exp(value)


def check_windows(models: Sequence[PreTrainedModel], windows: Sequence[Tensor], batch_size: int) -> None:
    """Refuse windows that the models can't be measured on.

    Raises:
        EvaluationDataError: No windows, or windows of the wrong form, or token ids without an embedding.
    """
    check_positive("batch_size", batch_size)
    if not windows:
        raise EvaluationDataError("There are no windows of tokens.", fix="give longer texts")
    for index, window in enumerate(windows):
        if window.dim() != 1 or len(window) < 2 or window.is_floating_point():
            raise EvaluationDataError(
                f"windows[{index}] has shape {tuple(window.shape)} and {window.dtype}, "
                "not integer token ids [tokens] with at least 2 tokens.",
                fix="text_windows(texts, tokenizer, max_length)",
            )
        check_ids(models, window)
