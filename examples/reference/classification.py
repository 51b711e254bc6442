"""What the examples that train a text classifier share: rows of tokens, and a table beside the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from hf_compress.evaluation.quality import evaluate_quality
from hf_compress.evaluation.size import disk_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 32
"""Most tokens of a text."""


def token_rows(tokenizer: PreTrainedTokenizerBase, labelled: Sequence[tuple[str, int]]) -> Dataset:
    """Rows for a Trainer: token ids, not yet padded, and a label.

    Args:
        tokenizer: The model's.
        labelled: Text and label of each row.
    """
    encoded = tokenizer([text for text, _ in labelled], truncation=True, max_length=LENGTH)
    return Dataset.from_dict({**encoded, "labels": [label for _, label in labelled]})


def print_table(
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[tuple[str, int]],
    models: Sequence[tuple[str, PreTrainedModel, Path]],
) -> None:
    """Print accuracy, the 95 % interval of its change in points, and the size of the weights, a line for each model.

    Args:
        original: What all are compared with.
        tokenizer: Of all of them.
        held_out: Text and label of the rows to judge them on, which none was trained on.
        models: A name, the model, and the directory that holds its weights.
    """
    print(f"{'':<24}{'accuracy':>9} {'95 % of the change':>20}{'weights':>14}   (n = {len(held_out)})")
    for name, model, folder in models:
        found = evaluate_quality(model, original, held_out, tokenizer, max_length=LENGTH, batch_size=32).result
        change = f"{100 * found.difference_low:+.1f} to {100 * found.difference_high:+.1f}"
        size = disk_bytes(folder).weights / 1e6
        print(f"{name:<24}{100 * found.candidate_accuracy:>8.1f}% {change:>20}{size:>11.1f} MB")
