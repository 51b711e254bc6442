"""The yardstick of convolutions: a small ResNet that tells scikit-learn's handwritten digits apart."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from examples.reference.cache import build_once
from examples.reference.packages import ReferenceUnavailable
from examples.reference.training import train

REFERENCE_FILE = "reference.json"
HELD_OUT = 600
SPLIT_SEED = 0
SCALE = 4
"""Each pixel of the 8 × 8 images becomes a square of 4 × 4: the network halves its input four times."""

Image = tuple[Tensor, int]
"""A float32 image [1, 32, 32] in -1 to 1, and the digit it shows."""


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the images. Change `revision` when the loop changes."""

    revision: int = 1
    hidden_sizes: tuple[int, ...] = (16, 32, 64)
    epochs: int = 8
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


def classifier() -> Path:
    """The trained classifier, trained on first use (a few seconds).

    Returns:
        A folder of the user cache with the fp32 `ResNetForImageClassification` (78,394 parameters) and
        `reference.json`, which records the recipe, the training time and the held-out accuracy.

    Raises:
        ReferenceUnavailable: scikit-learn, which carries the images, is not installed.
    """
    recipe = Recipe()
    training, held = _split()
    name = f"digits-resnet-{hashlib.sha256(json.dumps([asdict(recipe), HELD_OUT, SCALE]).encode()).hexdigest()[:12]}"
    return build_once(name, lambda folder: _train_and_save(folder, recipe, training, held))


def held_out() -> list[Image]:
    """The 600 images that the classifier was not trained on.

    Raises:
        ReferenceUnavailable: scikit-learn is not installed.
    """
    return list(_split()[1])


def training_images() -> list[Image]:
    """The 1,197 images that the classifier was trained on; also fit for calibration.

    Raises:
        ReferenceUnavailable: scikit-learn is not installed.
    """
    return list(_split()[0])


def accuracy(model: nn.Module, images: list[Image]) -> float:
    """Share of images whose digit a model in evaluation mode predicts, 0 to 1."""
    pixels, labels = _stack(images)
    with torch.inference_mode():
        return float((model(pixel_values=pixels).logits.argmax(-1) == labels).double().mean())


@functools.lru_cache(maxsize=1)
def _split() -> tuple[tuple[Image, ...], tuple[Image, ...]]:
    """Training and held-out images, drawn once and for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ReferenceUnavailable("scikit-learn's digits", f"{error}; pip install scikit-learn") from error
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1  # from 0 to 16
    pixels = pixels.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2).unsqueeze(1)
    images = [(one, int(label)) for one, label in zip(pixels, data.target, strict=True)]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    drawn = [images[index] for index in order]
    return tuple(drawn[HELD_OUT:]), tuple(drawn[:HELD_OUT])


def _stack(images: list[Image]) -> tuple[Tensor, Tensor]:
    return torch.stack([pixels for pixels, _ in images]), torch.tensor([label for _, label in images])


def _train_and_save(folder: Path, recipe: Recipe, training: tuple[Image, ...], held: tuple[Image, ...]) -> None:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=recipe.hidden_sizes[0],
        hidden_sizes=list(recipe.hidden_sizes),
        depths=[1] * len(recipe.hidden_sizes),
        layer_type="basic",
        num_labels=10,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    pixels, labels = _stack(list(training))
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn from the global generator
        torch.manual_seed(recipe.seed)
        model = ResNetForImageClassification(config).train()

    def loss_of(rows: list[int]) -> Tensor:
        return model(pixel_values=pixels[rows], labels=labels[rows]).loss

    train("digits classifier", model.parameters(), loss_of, len(training), recipe)
    model.eval().save_pretrained(folder)
    record = {
        "recipe": asdict(recipe),
        "data": {"images": "sklearn.datasets.load_digits", "training": len(training), "held_out": len(held)},
        "training_seconds": round(time.perf_counter() - started, 1),
        "held_out_accuracy": {"digits": accuracy(model, list(held))},
    }
    (folder / REFERENCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
