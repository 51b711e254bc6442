"""What a distillation does: which loss on the outputs, how much of it, and which losses on what lies in between."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from ...core.config import Settings
from ...core.errors import ConfigError
from .hidden import HiddenConfig
from .relations import RelationConfig

Task: TypeAlias = Literal[
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
    "ctc",
    "embeddings",
]
"""What a model's outputs mean. `classification` is one of several classes per row: of a text, an image or a sound."""

_Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class DistillationConfig(Settings):
    """How a student learns from a teacher.

    The loss is (1 - alpha) times the task's own loss, plus alpha times the loss on the outputs, plus the losses on
    hidden states and relations, each with its own weight. Classes and tokens take a divergence between the two
    distributions, softened by a temperature and multiplied with its square, so that gradients keep their size
    (Hinton et al., arXiv:1503.02531, section 2). Several labels at once take it of each label's sigmoid, regression
    takes the squared error, embeddings take the cosine distance or the squared error.

    Attributes:
        temperature: What both logits are divided by; 1 leaves them as they are.
        alpha: Weight of the loss on the outputs. With 1 the task's own loss is not computed, so rows need no labels;
            where they have some, these only tell which tokens count. With 0 the teacher's outputs are not compared:
            it may have another head, or none, to learn from its layers by `hidden` or `relations`, also without
            labels.
        loss: `"forward_kl"` KL(teacher‖student); `"reverse_kl"` KL(student‖teacher); `"jsd"` the generalised
            Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649, equation 1).
        beta: Weight of the teacher in the mixture of `"jsd"`; its end points 0 and 1 are forward and reverse KL.
        chunk: Tokens whose distributions over the vocabulary are in memory at the same time.
        task: What the outputs mean; `"auto"` tells it from the student's class and outputs.
        embedding: Loss of the task `embeddings`.
        pooling: Embedding of the task `embeddings`: `"mean"` of the last hidden states without padding, or the model's
            own `"pooled"` output.
        hidden: Loss on hidden states, or None.
        relations: Loss on relations between queries, keys and values, or None.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type or range.
    """

    temperature: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 2.0
    alpha: _Fraction = 0.5
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: _Fraction = 0.5
    chunk: Annotated[int, Field(strict=True, ge=1)] = 128
    task: Task | Literal["auto"] = "auto"
    embedding: Literal["cosine", "mse"] = "cosine"
    pooling: Literal["mean", "pooled"] = "mean"
    hidden: HiddenConfig | None = None
    relations: RelationConfig | None = None

    @field_validator("beta")
    @classmethod
    def _only_of_jsd(cls, beta: float, info: ValidationInfo) -> float:
        if info.data.get("loss", "jsd") != "jsd":
            raise ConfigError(f"loss={info.data['loss']!r} has no beta, got {beta}.", 'loss="jsd"')
        return beta
