"""What measurements of quality give: numbers with their uncertainty."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["classification", "causal-lm", "embedding"]
TASKS: tuple[Task, ...] = get_args(Task)

CONFIDENCE = 0.95
"""Of all intervals of quality."""


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
