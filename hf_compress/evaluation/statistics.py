"""Paired differences between a model and its baseline, with their intervals."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from hf_compress.core.errors import EvaluationDataError, MeasurementError

from .quality_results import CONFIDENCE, ClassificationQuality, EmbeddingQuality

_NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %


def accuracy_delta(candidate_logits: Tensor, baseline_logits: Tensor, labels: Tensor) -> ClassificationQuality:
    """Accuracies and their paired difference.

    The interval is Bonett & Price's adjusted Wald interval (J. Educ. Behav. Stat. 37, 2012, 479-488), which
    adds one to both discordant counts; recommended by Fagerland, Lydersen & Laake (Statist. Med. 33, 2014,
    2850-2875). It keeps a width when no prediction changed, as it must.

    Args:
        candidate_logits: [examples, classes].
        baseline_logits: [examples, classes].
        labels: [examples], integers in [0, classes).

    Raises:
        EvaluationDataError: Shapes that don't fit, no examples, labels out of range.
        MeasurementError: Logits that are not finite.
    """
    _check_logits(candidate_logits, baseline_logits, labels)
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


def embedding_similarity(candidate: Tensor, baseline: Tensor) -> EmbeddingQuality:
    """Cosine of two sets of embeddings, row by row, in float64.

    Args:
        candidate: [texts, width].
        baseline: [texts, width].

    Raises:
        EvaluationDataError: Shapes that differ, or fewer than 2 texts.
        MeasurementError: Embeddings that are zero or not finite.
    """
    if baseline.dim() != 2 or baseline.shape != candidate.shape:
        raise EvaluationDataError(
            f"Embeddings have shapes {tuple(candidate.shape)} and {tuple(baseline.shape)}, not one [texts, width]."
        )
    check_count(len(baseline), "text")
    sides = [side.detach().cpu().double() for side in (candidate, baseline)]
    norms = [side.norm(dim=1) for side in sides]
    if not all(bool((norm > 0).all() and norm.isfinite().all()) for norm in norms):
        raise MeasurementError("An embedding is zero or not finite.", fix="hf-compress diagnose names the layer")
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
    kept = torch.where(weights > 0, hidden.double(), torch.zeros((), dtype=torch.float64, device=hidden.device))
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


def finite(value: float, name: str) -> float:
    """The value.

    Raises:
        MeasurementError: It is NaN or infinite.
    """
    if not math.isfinite(value):
        raise MeasurementError(
            f"The {name} is {value}: the logits hold NaN or infinite values.",
            fix="hf-compress diagnose names the first layer that does",
        )
    return value


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(count: int, what: str) -> None:
    """Refuse fewer than two samples.

    Raises:
        EvaluationDataError: `count` is below 2.
    """
    if count < 2:
        raise EvaluationDataError(
            f"There is {count} {what}; an interval needs at least 2.",
            fix="give more texts, or a smaller max_length",
        )


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


def _check_logits(candidate: Tensor, baseline: Tensor, labels: Tensor) -> None:
    if baseline.dim() != 2 or baseline.shape != candidate.shape or labels.shape != baseline.shape[:1]:
        raise EvaluationDataError(
            f"Logits {tuple(candidate.shape)} and {tuple(baseline.shape)} with labels {tuple(labels.shape)} "
            "are not [examples, classes] twice and [examples]."
        )
    if labels.numel() == 0:
        raise EvaluationDataError("There are no examples.", fix='data=[("a text", 0), ("another", 1)]')
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= baseline.shape[1]:
        raise EvaluationDataError(
            f"Labels from {labels.min()} to {labels.max()}, {labels.dtype}, don't fit {baseline.shape[1]} classes.",
            fix="integers from 0 on",
        )
    for name, logits in (("baseline", baseline), ("candidate", candidate)):
        finite(0.0 if bool(logits.isfinite().all()) else math.nan, f"{name}'s classification")
