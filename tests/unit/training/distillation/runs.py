"""Short training runs: a tiny student and teacher for each task, their rows, and the loss written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_compress.training.distillation import DistillationConfig, DistillationTrainer
from tests._utils.tiny import SEED, tiny, tiny_config

Row = dict[str, Tensor]

ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Without dropout, so that the loss of a training step can be computed again."""
SPEECH = {
    **{f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")},
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "pad_token_id": 0,
}


class Rows(Dataset[Row]):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(kind: str, family: str, seed: int = SEED, **overrides: Any) -> PreTrainedModel:
    """A tiny model of a class that `tiny` has no entry for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, kind)(tiny_config(family, **overrides))
    return model.eval()


def texts(count: int = 4, longest: int = 12, low: int = 5) -> list[Row]:
    """Rows of tokens, padded on the right, of different lengths."""
    made = []
    for index in range(count):
        length = longest - 2 * (index % 3)
        ids = torch.randint(low, 128, (longest,), generator=generator(index))
        mask = (torch.arange(longest) < length).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def labelled_tokens(count: int = 4, every: int = 1, classes: int = 128) -> list[Row]:
    """Rows with a label for each of some tokens, -100 for the others."""
    made = []
    for index, row in enumerate(texts(count)):
        labels = torch.randint(0, classes, row["input_ids"].shape, generator=generator(100 + index))
        keep = (row["attention_mask"] == 1) & (torch.arange(len(labels)) % every == 0)
        made.append({**row, "labels": torch.where(keep, labels, -100)})
    return made


def classified(count: int = 4, classes: int = 3) -> list[Row]:
    return [{**row, "labels": torch.tensor(index % classes)} for index, row in enumerate(texts(count))]


def translated() -> list[Row]:
    return [{**row, "labels": labels["labels"][:7]} for row, labels in zip(texts(), labelled_tokens(), strict=True)]


def pictures(size: int = 16) -> list[Row]:
    return [
        {"pixel_values": torch.randn(3, size, size, generator=generator(i)), "labels": torch.tensor(i)}
        for i in range(4)
    ]


def sounds() -> list[Row]:
    made = []
    for index in range(4):
        mask = (torch.arange(400) < 400 - 80 * (index % 3)).long()
        values = torch.randn(400, generator=generator(index)) * mask
        labels = torch.randint(1, 32, (5,), generator=generator(index))
        labels[5 - index % 2 :] = -100
        made.append({"input_values": values, "attention_mask": mask, "labels": labels})
    return made


def stacked(rows: Sequence[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# The losses, written out.


def kl(own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher‖student), over the last dimension, float64."""
    q = torch.softmax(own.double() / temperature, -1)
    p = torch.softmax(other.double() / temperature, -1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


Oracle = Callable[[Any, Any, Row, float], tuple[Tensor, float]]
"""Of the outputs of student and teacher, the batch and the temperature: the sum, and what it is divided by."""


def over_rows(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    return kl(own.logits, other.logits, temperature).sum(), len(own.logits)


def over_labels(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    keep = batch["labels"] != -100
    return kl(own.logits, other.logits, temperature)[keep].sum(), int(keep.sum())


def over_next(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    keep = batch["labels"][:, 1:] != -100
    return kl(own.logits[:, :-1], other.logits[:, :-1], temperature)[keep].sum(), int(keep.sum())


def over_sigmoids(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    q, p = (torch.sigmoid(one.logits.double() / temperature) for one in (own, other))
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return temperature**2 * each.sum(), each.numel()


def over_values(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    return (own.logits.double() - other.logits.double()).square().sum(), own.logits.numel()


def over_spans(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    total = torch.zeros((), dtype=torch.float64)
    for row, keep in enumerate(batch["attention_mask"] == 1):
        for name in ("start_logits", "end_logits"):
            total = total + kl(own[name][row][keep], other[name][row][keep], temperature) / 2
    return total, len(own.start_logits)


def over_frames(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    total = torch.zeros((), dtype=torch.float64)
    for row, mask in enumerate(batch["attention_mask"]):
        samples = int(mask.sum())
        frames = ((samples - 8) // 4 + 1 - 3) // 2 + 1  # kernels 8 and 3, strides 4 and 2
        total = total + kl(own.logits[row, :frames], other.logits[row, :frames], temperature).sum()
    return total, int((batch["labels"] != -100).sum())


def over_embeddings(own: Any, other: Any, batch: Row, temperature: float) -> tuple[Tensor, float]:
    total = torch.zeros((), dtype=torch.float64)
    for row, keep in enumerate(batch["attention_mask"] == 1):
        a, b = (one.last_hidden_state[row][keep].double().mean(0) for one in (own, other))
        total = total + 1 - (a @ b) / (a.norm() * b.norm())
    return total, len(own.last_hidden_state)


@dataclass(frozen=True)
class Case:
    """A task.

    Attributes:
        task: Its name in the configuration.
        build: Builds a model of so many layers.
        rows: Its rows.
        oracle: The loss on outputs.
        alpha: Of the configuration.
        ctc: Whether the task's own loss is a sum over the batch.
    """

    task: str
    build: Callable[[int], PreTrainedModel]
    rows: Callable[[], list[Row]]
    oracle: Oracle
    alpha: float = 0.5
    ctc: bool = False


def _several(index: int, row: Row) -> Row:
    return {**row, "labels": torch.tensor([index % 2, 1, (index + 1) % 2], dtype=torch.float32)}


CASES = {
    "sequence": Case(
        "classification",
        lambda n: tiny("bert-classifier", num_hidden_layers=n, **ENCODER),
        classified,
        over_rows,
    ),
    "image": Case("classification", lambda n: tiny("vit", num_hidden_layers=n), pictures, over_rows),
    "multi-label": Case(
        "multi_label",
        lambda n: tiny("bert-classifier", num_hidden_layers=n, problem_type="multi_label_classification", **ENCODER),
        lambda: [_several(index, row) for index, row in enumerate(texts())],
        over_sigmoids,
    ),
    "regression": Case(
        "regression",
        lambda n: tiny("bert-classifier", num_hidden_layers=n, num_labels=1, **ENCODER),
        lambda: [{**row, "labels": torch.tensor(0.1 * index)} for index, row in enumerate(texts())],
        over_values,
    ),
    "token": Case(
        "token_classification",
        lambda n: built("BertForTokenClassification", "bert", num_hidden_layers=n, num_labels=5, **ENCODER),
        lambda: labelled_tokens(every=2, classes=5),
        over_labels,
    ),
    "answers": Case(
        "question_answering",
        lambda n: built("BertForQuestionAnswering", "bert", num_hidden_layers=n, **ENCODER),
        lambda: [{**row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(3)} for row in texts()],
        over_spans,
    ),
    "masked": Case(
        "masked_lm",
        lambda n: tiny("bert-mlm", num_hidden_layers=n, **ENCODER),
        lambda: labelled_tokens(every=3),
        over_labels,
    ),
    "causal": Case("causal_lm", lambda n: tiny("llama", num_hidden_layers=n), labelled_tokens, over_next),
    "gpt2": Case(
        "causal_lm",
        lambda n: tiny("gpt2", n_layer=n, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        labelled_tokens,
        over_next,
    ),
    "seq2seq": Case("seq2seq_lm", lambda n: tiny("t5", num_layers=n, dropout_rate=0.0), translated, over_labels),
    "speech": Case(
        "seq2seq_lm",
        lambda n: tiny("whisper", decoder_layers=n),
        lambda: [
            {"input_features": torch.randn(8, 24, generator=generator(i)), "labels": row["labels"][:6]}
            for i, row in enumerate(labelled_tokens())
        ],
        over_labels,
    ),
    "ctc": Case(
        "ctc",
        lambda n: tiny("wav2vec2", num_hidden_layers=n, vocab_size=32, ctc_loss_reduction="sum", **SPEECH),
        sounds,
        over_frames,
        ctc=True,
    ),
    "embeddings": Case(
        "embeddings", lambda n: tiny("bert", num_hidden_layers=n, **ENCODER), texts, over_embeddings, alpha=1.0
    ),
}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Two steps over all rows, with plain gradient descent; each step logged."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **options,
        }
    )


def distilled(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Sequence[Row],
    config: DistillationConfig | None = None,
    kind: type[Trainer] = DistillationTrainer,
    resume: str | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Trainer:
    """A run of a Trainer; without a teacher, of a plain one."""
    taught = {} if teacher is None else {"teacher": teacher, "distillation": config or DistillationConfig()}
    kind = Trainer if teacher is None and kind is DistillationTrainer else kind
    trainer = kind(
        model=student, args=arguments(folder, **(options or {})), train_dataset=Rows(rows), **taught, **more
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any two values."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
