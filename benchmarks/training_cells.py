"""What the cells of `benchmarks.training` train and how they are judged."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import hf_compress as hfc
from benchmarks.peers.texts import calibration_ids, test_ids
from examples.reference import sentiment
from examples.reference.smollm2 import off_grid_smollm2
from hf_compress.evaluation.language import perplexity_delta
from hf_compress.evaluation.size import resident_bytes
from hf_compress.evaluation.statistics import accuracy_delta

LENGTH = sentiment.Recipe.max_length
"""Most tokens of a text of the classifier."""
BATCH = 32
ROWS = 64
"""Rows per forward of the evaluation."""
SMOKE_STEPS = 2
SMOKE_ROWS = 64

HIDDEN = {"layers": "uniform", "loss": "cosine", "weight": 1.0}
"""Beside the two logits of a text, which say little: what every layer of the student holds for every token."""

Callbacks = Callable[[], list[Any]]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        callbacks: Makes the callbacks.
        epochs: Over the 5,217 training rows, batches of 32 rows of about equal length.
        learning_rate: The highest, after a tenth of the steps, then linear to 0; AdamW without weight decay.
        alpha: Weight of the teacher's answers, the rest are the labels; hidden states count beside both. None trains
            without a teacher.
        temperature: Of the teacher's answers.
        dropout: Whether the student's dropout is on.
        layers: Encoder layers of the student; None keeps all.
    """

    callbacks: Callbacks
    epochs: float
    learning_rate: float
    alpha: float | None
    temperature: float = 2.0
    dropout: bool = False
    layers: int | None = None


def qat(**fields: Any) -> Callbacks:
    """The callback of quantization-aware training."""
    return lambda: [hfc.QATCallback(hfc.QATConfig(**fields))]


def prune(method: str, sparsity: float) -> Callbacks:
    """The callback of pruning: up to 60 % of the run, the rest fine-tunes what is left."""
    return lambda: [
        hfc.PruningCallback(hfc.PruningConfig(method=method, sparsity=sparsity, start=0.05, end=0.6, every=5))
    ]


def _weights(bits: int, group_size: int, learning_rate: float) -> Recipe:
    """Weights only, learned scales, the teacher alone: no label is seen, so only rounding is healed."""
    callbacks = qat(bits=bits, group_size=group_size, learn_scales=True)
    return Recipe(callbacks, epochs=1, learning_rate=learning_rate, alpha=1.0)


RECIPES: Mapping[str, Recipe] = {
    "qat W4 g64": _weights(4, 64, 5e-5),
    "qat W4 g128": _weights(4, 128, 5e-5),
    "qat W3 g64": _weights(3, 64, 1e-4),
    "qat W3 g128": _weights(3, 128, 1e-4),
    "qat W2 g64": _weights(2, 64, 2e-4),
    "qat W8A8": Recipe(
        qat(bits=8, group_size="channel", activation_bits=8, activation_strategy="tensor", start=0.1),
        epochs=1,
        learning_rate=2e-5,
        alpha=1.0,
    ),
    "magnitude 50": Recipe(prune("magnitude", 0.5), epochs=1, learning_rate=1e-4, alpha=0.5, dropout=True),
    "magnitude 85": Recipe(prune("magnitude", 0.85), epochs=2, learning_rate=1e-4, alpha=0.5, dropout=True),
    "movement 85": Recipe(prune("movement", 0.85), epochs=2, learning_rate=1e-4, alpha=0.5, dropout=True),
    "student": Recipe(list, epochs=3, learning_rate=2e-4, alpha=0.5, dropout=True, layers=3),
    "control": Recipe(list, epochs=1, learning_rate=1e-4, alpha=None, dropout=True),
}
"""By kind of cell. The control is trained alike with labels alone: what more training brings by itself."""

ROUNDED: Mapping[str, Callable[[], hfc.QuantConfig]] = {
    **{
        f"rtn W{bits} g{size}": lambda bits=bits, size=size: hfc.RTNQuantConfig(bits=bits, group_size=size)
        for bits, size in ((4, 64), (4, 128), (3, 64), (3, 128), (2, 64))
    },
    "rtn W8A8 dynamic": hfc.Int8DynamicQuantConfig,
}
"""Rounding to nearest, without training."""


def classifier(kind: str, seed: int, smoke: bool) -> Cell:
    """Train a classifier by its recipe and judge it on the held-out rows.

    Args:
        kind: A key of `RECIPES`.
        seed: Of the order of rows, dropout and all else.
        smoke: Two steps and few rows.
    """
    recipe, source = RECIPES[kind], sentiment.classifier()
    teacher = AutoModelForSequenceClassification.from_pretrained(source)
    student = _student(recipe, teacher)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        trainer = _trainer(recipe, student, teacher, _arguments(recipe, Path(folder), seed, smoke), smoke)
        trainer.train()
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "zeros": zeros(student),
        "resident_bytes": resident_bytes(student),
        **judged(student, smoke),
    }


def _student(recipe: Recipe, teacher: PreTrainedModel) -> PreTrainedModel:
    """The model to train: the teacher's copy, all of it or some layers, its embeddings frozen."""
    if recipe.layers is None:
        student = AutoModelForSequenceClassification.from_pretrained(sentiment.classifier())
    else:
        student = hfc.student_from_teacher(teacher, layers=recipe.layers)
    student.get_input_embeddings().requires_grad_(False)
    if not recipe.dropout:
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return student


def _arguments(recipe: Recipe, folder: Path, seed: int, smoke: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=SMOKE_STEPS if smoke else -1,
        per_device_train_batch_size=BATCH,
        learning_rate=recipe.learning_rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _trainer(
    recipe: Recipe, student: PreTrainedModel, teacher: PreTrainedModel, arguments: TrainingArguments, smoke: bool
) -> Trainer:
    """Stock Trainer, or ours where there is a teacher."""
    common = {
        "model": student,
        "args": arguments,
        "train_dataset": training_rows(smoke),
        "data_collator": DataCollatorWithPadding(tokenizer()),
        "callbacks": recipe.callbacks(),
    }
    if recipe.alpha is None:
        return Trainer(**common)
    distillation = hfc.DistillationConfig(alpha=recipe.alpha, temperature=recipe.temperature, hidden=HIDDEN)
    return hfc.DistillationTrainer(**common, teacher=teacher, distillation=distillation)


def rounded(kind: str, smoke: bool) -> Cell:
    """Round a classifier to nearest and judge it; `fp32` is the original."""
    source = sentiment.classifier()
    if kind == "fp32":
        model = AutoModelForSequenceClassification.from_pretrained(source)
    else:
        model = hfc.quantize(source, ROUNDED[kind]())
    return {"resident_bytes": resident_bytes(model), **judged(model, smoke)}


@functools.cache
def tokenizer() -> Any:
    """The classifier's."""
    return AutoTokenizer.from_pretrained(sentiment.classifier())


@functools.cache
def training_rows(smoke: bool) -> Dataset:
    """Token ids and labels."""
    rows = sentiment.training_rows()[: SMOKE_ROWS if smoke else None]
    encoded = tokenizer()([text for text, _ in rows], truncation=True, max_length=LENGTH)
    return Dataset.from_dict({**encoded, "labels": [label for _, label in rows]})


@functools.cache
def held_out(smoke: bool) -> list[tuple[str, int]]:
    """Text and label of the rows that nothing was trained on."""
    rows = sentiment.held_out()
    return rows[:: len(rows) // SMOKE_ROWS] if smoke else rows


@torch.inference_mode()
def logits(model: PreTrainedModel, smoke: bool) -> Tensor:
    """Logits of the held-out rows, rows × 2."""
    model.eval()
    texts = [text for text, _ in held_out(smoke)]
    parts = []
    for start in range(0, len(texts), ROWS):
        batch = texts[start : start + ROWS]
        inputs = tokenizer()(batch, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        parts.append(model(**inputs).logits)
    return torch.cat(parts)


@functools.cache
def original_logits(smoke: bool) -> Tensor:
    """Of the float32 classifier."""
    return logits(AutoModelForSequenceClassification.from_pretrained(sentiment.classifier()), smoke)


def judged(model: PreTrainedModel, smoke: bool) -> Cell:
    """Accuracy beside the original's, and mean KL(original || model) per row in nats."""
    found, before = logits(model, smoke), original_logits(smoke)
    labels = torch.tensor([label for _, label in held_out(smoke)])
    sides = [side.double().log_softmax(-1) for side in (before, found)]
    divergence = (sides[0].exp() * (sides[0] - sides[1])).sum(-1).mean()
    return {**accuracy_delta(found, before, labels).model_dump(mode="json"), "kl": float(divergence)}


@torch.no_grad()
def zeros(model: PreTrainedModel) -> float:
    """Share of zeros in the weights of the encoder's linear layers, as the model computes with them."""
    weights = [module.weight for module in model.base_model.encoder.modules() if isinstance(module, nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


LM_BITS, LM_GROUP = 3, 64
LM_STEPS, LM_BATCH, LM_LENGTH = 160, 4, 128
LM_LEARNING_RATE = 2e-4
LM_CALIBRATION = (64, 512)
"""Rows and tokens that GPTQ calibrates on."""
LM_TEST = (16, 512)
LM_KINDS = ("lm rtn", "lm gptq", "lm qat")


def language_model(kind: str, seed: int, smoke: bool) -> Cell:
    """Compress SmolLM2, rotated, to 3 bits, and compare its perplexity with the original's.

    Training and calibration text is the Brown corpus, test text the Debian Administrator's Handbook.

    Args:
        kind: One of `LM_KINDS`.
        seed: Of the draw of training or calibration windows, and of their order.
        smoke: Two steps and two windows.
    """
    source = off_grid_smollm2()
    words = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source)
    started = time.perf_counter()
    if kind == "lm qat":
        model, steps = _trained_lm(source, original, words, seed, smoke)
    else:
        model, steps = hfc.quantize(source, _lm_config(kind, words, seed, smoke)), 0
    seconds = time.perf_counter() - started
    rows, length = (2, 64) if smoke else LM_TEST
    windows = list(test_ids(words, rows, length))
    found = perplexity_delta(model, original, windows, batch_size=2)
    return {"seconds": round(seconds, 1), "steps": steps, **found.model_dump(mode="json")}


def _lm_config(kind: str, words: Any, seed: int, smoke: bool) -> hfc.QuantConfig:
    grid = {"bits": LM_BITS, "group_size": LM_GROUP}
    if kind == "lm rtn":
        return hfc.RTNQuantConfig(**grid)
    rows, length = (8, 64) if smoke else LM_CALIBRATION
    (ids,) = calibration_ids(words, rows, length, (seed,))
    data = hfc.Calibration(ids.tolist(), rows=rows, sequence_length=length, seed=seed, pack=False)
    return hfc.GPTQQuantConfig(**grid, calibration=data)


def _trained_lm(
    source: Path, teacher: PreTrainedModel, words: Any, seed: int, smoke: bool
) -> tuple[PreTrainedModel, int]:
    """From the original weights, scales of rounding to nearest, the teacher's probabilities alone."""
    student = AutoModelForCausalLM.from_pretrained(source)
    student.get_input_embeddings().requires_grad_(False)  # neither the table nor the head is quantized
    student.get_output_embeddings().requires_grad_(False)
    steps, length = (SMOKE_STEPS, 32) if smoke else (LM_STEPS, LM_LENGTH)
    (ids,) = calibration_ids(words, LM_BATCH * steps, length, (seed,))
    with TemporaryDirectory() as folder:
        trainer = hfc.DistillationTrainer(
            model=student,
            teacher=teacher,
            distillation=hfc.DistillationConfig(alpha=1.0, temperature=1.0),
            callbacks=qat(bits=LM_BITS, group_size=LM_GROUP, learn_scales=True)(),
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
            data_collator=default_data_collator,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=LM_BATCH,
                learning_rate=LM_LEARNING_RATE,
                warmup_steps=0.1,
                seed=seed,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return student, trainer.state.global_step


def spread(values: list[float]) -> dict[str, JsonValue]:
    """Mean and extremes over seeds."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "values": list(values)}
