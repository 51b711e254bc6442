"""The yardstick of recurrent layers: a plain PyTorch LSTM that tells positive from negative tweets and reviews."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.reference.cache import build_once
from examples.reference.packages import VADER
from examples.reference.ratings import Domain
from examples.reference.sentiment import held_out, training_rows
from examples.reference.training import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_FILE = "reference.json"
WEIGHTS_FILE, SIZES_FILE = "model.safetensors", "sizes.json"
PADDING, UNKNOWN = "[PAD]", "[UNK]"
Rows = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the rows. Change `revision` when the loop changes."""

    revision: int = 1
    embedding_size: int = 96
    hidden_size: int = 128
    dropout: float = 0.5
    least_count: int = 2
    max_length: int = 40
    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


class LSTMClassifier(nn.Module):
    """Word embeddings, one LSTM in both directions, the maximum over the words, a linear layer.

    Args:
        words: Size of the vocabulary; id 0 is padding, which comes last.
        embedding_size: Size of an embedding.
        hidden_size: Size of the LSTM's state, each direction.
        dropout: Share of values dropped in training.
    """

    def __init__(self, words: int, embedding_size: int, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding_size, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * hidden_size, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [rows, 2] of token ids [rows, tokens]."""
        lengths = (input_ids != 0).sum(1).clamp(min=1)
        embedded = self.dropout(self.embedding(input_ids))
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        padding = torch.arange(states.shape[1], device=states.device) >= lengths.unsqueeze(1)
        largest = states.masked_fill(padding.unsqueeze(-1), -1.0).amax(1)  # a state is above -1
        return self.classifier(self.dropout(largest))


def classifier() -> Path:
    """The trained classifier, trained on first use (half a minute on one core).

    Returns:
        A folder of the user cache with the weights, the sizes and the tokenizer, see `load`, and `reference.json`,
        which records the recipe, the training time and the held-out accuracies.

    Raises:
        ReferenceUnavailable: The rated texts can't be had.
    """
    recipe, training = Recipe(), training_rows()
    content = json.dumps([asdict(recipe), str(VADER), training])
    name = f"sentiment-lstm-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return build_once(name, lambda folder: _train_and_save(folder, recipe, training))


def skeleton(folder: Path) -> LSTMClassifier:
    """The module of a trained classifier with weights that mean nothing, in evaluation mode.

    Args:
        folder: What `classifier` returned.
    """
    with torch.random.fork_rng(devices=[]):
        return LSTMClassifier(**json.loads((folder / SIZES_FILE).read_text(encoding="utf-8"))).eval()


def load(folder: Path) -> LSTMClassifier:
    """A trained classifier in evaluation mode, fp32.

    Args:
        folder: What `classifier` returned.
    """
    model = skeleton(folder)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a trained classifier.

    Args:
        folder: What `classifier` returned.
    """
    return AutoTokenizer.from_pretrained(folder)


def encode(words: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Token ids [texts, tokens] with padding at the end; of a text without words, one unknown one."""
    given = [text if text.strip() else UNKNOWN for text in texts]
    return words(given, padding=True, truncation=True, return_tensors="pt").input_ids


def logits(model: nn.Module, words: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Logits [texts, 2] of a model in evaluation mode.

    Args:
        model: The classifier.
        words: Its tokenizer.
        texts: The texts.
        batch_size: Texts per forward pass.
    """
    with torch.inference_mode():
        parts = range(0, len(texts), batch_size)
        return torch.cat([model(encode(words, texts[start : start + batch_size])) for start in parts])


def accuracy(model: nn.Module, words: PreTrainedTokenizerBase, rows: Rows) -> float:
    """Share of rows whose label a model in evaluation mode predicts, 0 to 1."""
    predicted = logits(model, words, [text for text, _ in rows]).argmax(-1)
    return float((predicted == torch.tensor([label for _, label in rows])).double().mean())


def _train_and_save(folder: Path, recipe: Recipe, training: Rows) -> None:
    words = _tokenizer(training, recipe)
    sizes = {"words": len(words), "embedding_size": recipe.embedding_size, "hidden_size": recipe.hidden_size}
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the first weights and dropout draw from the global generator
        torch.manual_seed(recipe.seed)
        model = LSTMClassifier(**sizes, dropout=recipe.dropout).train()

        def loss_of(rows: list[int]) -> Tensor:
            found = model(encode(words, [training[row][0] for row in rows]))
            return nn.functional.cross_entropy(found, torch.tensor([training[row][1] for row in rows]))

        train("LSTM classifier", model.parameters(), loss_of, len(training), recipe)
    seconds = time.perf_counter() - started
    model.eval()
    save_file(model.state_dict(), folder / WEIGHTS_FILE)
    (folder / SIZES_FILE).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    words.save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "data": {"package": str(VADER), "training_rows": len(training)},
        "training_seconds": round(seconds, 1),
        "held_out_accuracy": {domain: accuracy(model, words, held_out(domain)) for domain in get_args(Domain)},
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tokenizer(training: Rows, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Lower-case words and punctuation marks that the training rows have often enough, the frequent ones first."""
    normalize, split = Lowercase(), BertPreTokenizer()
    texts = (normalize.normalize_str(text) for text, _ in training)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    known = sorted(
        (word for word, count in counts.items() if count >= recipe.least_count), key=lambda w: (-counts[w], w)
    )
    made = Tokenizer(
        WordLevel({word: number for number, word in enumerate([PADDING, UNKNOWN, *known])}, unk_token=UNKNOWN)
    )
    made.normalizer, made.pre_tokenizer = normalize, split
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=recipe.max_length,
        model_input_names=["input_ids"],
    )
