"""The accuracy yardstick: MiniLM fine-tuned to tell positive from negative tweets and product reviews."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.reference.cache import build_once
from examples.reference.packages import MINILM, VADER, minilm_folder
from examples.reference.ratings import (
    HELD_OUT_PER_DOMAIN,
    NEUTRAL_BELOW,
    SIMILARITY,
    SPLIT_SEED,
    Domain,
    Row,
    rows,
    split,
)
from examples.reference.training import train

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_FILE = "reference.json"
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the rows. Change `revision` when the loop changes."""

    revision: int = 1
    trained_layers: int = 2
    epochs: int = 1
    batch_size: int = 32
    max_length: int = 32
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


def classifier() -> Path:
    """The trained classifier, trained on first use (about two minutes on two cores).

    Returns:
        A folder of the user cache with the fp32 model, its tokenizer and `reference.json`, which records the
        recipe, the training time and the held-out accuracies.

    Raises:
        ReferenceUnavailable: The encoder or the rated texts can't be had.
    """
    recipe = Recipe()
    training, held = split(rows())
    content = json.dumps([asdict(recipe), str(MINILM), [asdict(row) for row in training]])
    name = f"sentiment-minilm-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return build_once(name, lambda folder: _train_and_save(folder, recipe, training, held))


def held_out(domain: Domain | Literal["all"] = "all") -> list[tuple[str, int]]:
    """Rows the classifier was not trained on, nor on any near-duplicate of them.

    Args:
        domain: `"tweets"`, `"amazon"` or both, `"all"`.

    Returns:
        Text and label (1 for positive, 0 for negative): 600 rows per domain.

    Raises:
        ReferenceUnavailable: The rated texts can't be had.
        ValueError: There is no such domain.
    """
    if domain != "all" and domain not in get_args(Domain):
        message = f"domain must be 'tweets', 'amazon' or 'all', got {domain!r}"
        raise ValueError(message)
    return [(row.text, row.label) for row in split(rows())[1] if domain in ("all", row.domain)]


def training_rows() -> list[tuple[str, int]]:
    """Text and label of the 5,217 rows the classifier was trained on; also fit for calibration.

    Raises:
        ReferenceUnavailable: The rated texts can't be had.
    """
    return [(row.text, row.label) for row in split(rows())[0]]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labelled: Sequence[tuple[str, int]],
    batch_size: int = 64,
) -> float:
    """Share of rows whose label the model predicts.

    Args:
        model: A two-label sequence classifier in evaluation mode.
        tokenizer: Its tokenizer.
        labelled: Text and label of each row.
        batch_size: Rows per forward pass.

    Returns:
        The share, 0 to 1.
    """
    right = 0
    for start in range(0, len(labelled), batch_size):
        batch = labelled[start : start + batch_size]
        inputs = _encode(tokenizer, [text for text, _ in batch], Recipe.max_length)
        with torch.inference_mode():
            predicted = model(**inputs.to(model.device)).logits.argmax(-1).tolist()
        right += sum(guess == label for guess, (_, label) in zip(predicted, batch, strict=True))
    return right / len(labelled)


def _train_and_save(folder: Path, recipe: Recipe, training: Sequence[Row], held: Sequence[Row]) -> None:
    source = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # dropout and the new head draw from the global generator
        torch.manual_seed(recipe.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=torch.float32,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
        _train(model, tokenizer, recipe, training)
    seconds = time.perf_counter() - started
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "data": _data_record(training, held),
        "training_seconds": round(seconds, 1),
        "held_out_accuracy": {
            domain: accuracy(model, tokenizer, [(row.text, row.label) for row in held if row.domain == domain])
            for domain in get_args(Domain)
        },
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, training: Sequence[Row]
) -> None:
    """Train the last encoder layers, the pooler and the head in place; leave the model in evaluation mode."""
    bert = model.base_model
    model.requires_grad_(False)
    for module in (*bert.encoder.layer[-recipe.trained_layers :], bert.pooler, model.classifier):
        module.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def loss_of(positions: list[int]) -> torch.Tensor:
        rows_of_batch = [training[position] for position in positions]
        inputs = _encode(tokenizer, [row.text for row in rows_of_batch], recipe.max_length)
        return model(**inputs, labels=torch.tensor([row.label for row in rows_of_batch])).loss

    train("sentiment classifier", trained, loss_of, len(training), recipe)
    model.requires_grad_(True)
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> BatchEncoding:
    return tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


def _data_record(training: Sequence[Row], held: Sequence[Row]) -> dict[str, object]:
    majority = {}
    for domain in get_args(Domain):
        labels = [row.label for row in held if row.domain == domain]
        majority[domain] = max(labels.count(0), labels.count(1)) / len(labels)
    return {
        "packages": [str(MINILM), str(VADER)],
        "training_rows": len(training),
        "held_out_rows": len(held),
        "held_out_per_domain": HELD_OUT_PER_DOMAIN,
        "held_out_majority_share": majority,
        "neutral_below": NEUTRAL_BELOW,
        "near_duplicate_similarity": SIMILARITY,
        "split_seed": SPLIT_SEED,
    }
