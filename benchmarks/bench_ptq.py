"""Calibrated methods on classifiers: accuracy, and memory over the amount of calibration data."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import ResNetForImageClassification as ResNet

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from benchmarks.peers.cell import OURS, quantize
from benchmarks.peers.protocol import Job
from examples.reference import digits, sentiment
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.evaluation.statistics import accuracy_delta

NAME = "ptq"
MOST_LOST_POINTS = 0.5
ROWS, LENGTH = 128, sentiment.Recipe.max_length
"""Of calibration data: texts that the classifier was trained on, as long as in training."""
MEMORY_ROWS = (32, 512)
MEMORY_LENGTHS = (LENGTH, 128)
"""Tokens per row."""
MEMORY_ROUNDS = 3
MOST_GROWTH = 1.1
DOMAINS = ("tweets", "amazon")
BATCH = 64

STATIC = "int8_static"
CONFIGS: dict[str, Callable[[], hfc.QuantConfig]] = {
    STATIC: hfc.Int8StaticQuantConfig,  # mse
    "int8_static, percentile": lambda: hfc.Int8StaticQuantConfig(observer="percentile"),
    "int8_static, minmax": lambda: hfc.Int8StaticQuantConfig(observer="minmax"),
    "int8_static, entropy": lambda: hfc.Int8StaticQuantConfig(observer="entropy"),
    "int8_static, moving_average": lambda: hfc.Int8StaticQuantConfig(observer="moving_average"),
    "int8_static, mse, symmetric inputs": lambda: hfc.Int8StaticQuantConfig(symmetric_inputs=True),
    "int8_static, smoothing 0.5": lambda: hfc.Int8StaticQuantConfig(smoothing=0.5),
    "int8_dynamic": hfc.Int8DynamicQuantConfig,
    **{f"rtn W{bits}": lambda bits=bits: hfc.RTNQuantConfig(bits=bits) for bits in (4, 3)},
    **{f"gptq W{bits}": lambda bits=bits: hfc.GPTQQuantConfig(bits=bits) for bits in (4, 3)},
    **{f"awq W{bits}": lambda bits=bits: hfc.AWQQuantConfig(bits=bits) for bits in (4, 3)},
    **{f"autoround W{bits}": lambda bits=bits: hfc.AutoRoundQuantConfig(bits=bits) for bits in (4, 3)},
}
"""Measured on the sentiment classifier; grids of weight-only methods are symmetric, in groups of 64."""
IMAGE_CONFIGS = tuple(name for name in CONFIGS if name.startswith("int8") and "smoothing" not in name)
"""Measured on the digits, whose channels don't fill groups of 64."""

LOST_TEXT = Bar(
    name="sentiment classifier, accuracy lost by int8_static", at="most", limit=MOST_LOST_POINTS, unit="points"
)
LOST_IMAGES = Bar(name="digits ResNet, accuracy lost by int8_static", at="most", limit=MOST_LOST_POINTS, unit="points")
GROWTH = f"int8_static, growth of anonymous memory, {MEMORY_ROWS[1]} / {MEMORY_ROWS[0]} rows"
GROWTH_MOST = Bar(name=GROWTH, at="most", limit=MOST_GROWTH, unit="times")
BARS = (LOST_TEXT, LOST_IMAGES, GROWTH_MOST)

Labelled = tuple[Tensor, Tensor]
"""Logits, rows × classes, and labels."""


def measure(smoke: bool) -> Measured:
    """Accuracies of both classifiers, and memory."""
    with tempfile.TemporaryDirectory() as folder, CleanWorker() as worker:
        texts = on_texts(Path(folder), worker, smoke)
        images = on_images(Path(folder), worker, smoke)
        lengths = MEMORY_LENGTHS[:1] if smoke else MEMORY_LENGTHS
        memory = {str(length): over_rows(Path(folder), length, 1 if smoke else MEMORY_ROUNDS) for length in lengths}
    return Measured(
        settings={
            "text": f"{ROWS} rows of training texts, at most {LENGTH} tokens; held-out tweets and product reviews",
            "images": f"{ROWS} training images; {digits.HELD_OUT} held-out ones",
            "memory": "growth of peak anonymous memory over the imports, live model, by tokens per row and rows",
        },
        measurements={"sentiment": texts, "digits": images, "memory": memory},
        values={
            LOST_TEXT.name: -100 * texts[STATIC]["all"]["difference"],
            LOST_IMAGES.name: -100 * images[STATIC]["all"]["difference"],
            GROWTH_MOST.name: max(one["ratio"] for one in memory.values()),
        },
    )


def on_texts(folder: Path, worker: CleanWorker, smoke: bool) -> dict[str, Any]:
    """All configurations on the sentiment classifier, by domain and together."""
    source = sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = {domain: sentiment.held_out(domain)[: 40 if smoke else None] for domain in DOMAINS}
    data = [text for text, _ in sentiment.training_rows()]

    def logits(model: nn.Module) -> dict[str, Labelled]:
        return {domain: text_logits(model, tokenizer, part) for domain, part in rows.items()}

    before = logits(AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval())
    found: dict[str, Any] = {}
    for name in CONFIGS if not smoke else (STATIC, "gptq W4"):
        calibration = hfc.Calibration(data, tokenizer=tokenizer, rows=ROWS, sequence_length=LENGTH)
        after = logits(as_saved(source, name, calibration, folder / f"text {name}", worker))
        found[name] = {domain: judged(after[domain], before[domain]) for domain in DOMAINS}
        found[name]["all"] = judged(joined(after), joined(before))
    return found


def on_images(folder: Path, worker: CleanWorker, smoke: bool) -> dict[str, Any]:
    """8-bit configurations on the ResNet of the digits."""
    source = digits.classifier()
    pixels = torch.stack([image for image, _ in digits.training_images()[:ROWS]])
    batches = [{"pixel_values": part} for part in pixels.split(8)]
    before = image_logits(ResNet.from_pretrained(source).eval())
    found = {}
    for name in IMAGE_CONFIGS if not smoke else (STATIC,):
        model = as_saved(source, name, hfc.Calibration(batches, rows=ROWS), folder / f"images {name}", worker)
        found[name] = {"all": judged(image_logits(model), before)}
    return found


def as_saved(source: Path, name: str, calibration: hfc.Calibration, out: Path, worker: CleanWorker) -> PreTrainedModel:
    """The model as it is after saving with proof and loading."""
    config = CONFIGS[name]()
    model = hfc.quantize(source, config, calibration if config.spec.needs_data else None)
    hfc.save(model, out, worker=worker)
    loaded: PreTrainedModel = hfc.load(out)
    return loaded


@torch.inference_mode()
def text_logits(model: nn.Module, tokenizer: Any, rows: list[tuple[str, int]]) -> Labelled:
    """Logits of labelled texts, as in training."""
    parts = []
    for start in range(0, len(rows), BATCH):
        texts = [text for text, _ in rows[start : start + BATCH]]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        parts.append(model(**inputs).logits)
    return torch.cat(parts), torch.tensor([label for _, label in rows])


@torch.inference_mode()
def image_logits(model: nn.Module) -> Labelled:
    """Logits of the held-out images."""
    images = digits.held_out()
    pixels = torch.stack([image for image, _ in images])
    return model(pixel_values=pixels).logits, torch.tensor([label for _, label in images])


def joined(parts: Mapping[str, Labelled]) -> Labelled:
    """Several domains as one."""
    return torch.cat([logits for logits, _ in parts.values()]), torch.cat([labels for _, labels in parts.values()])


def judged(after: Labelled, before: Labelled) -> dict[str, JsonValue]:
    """Accuracies and their paired difference."""
    found: dict[str, JsonValue] = accuracy_delta(after[0], before[0], after[1]).model_dump(mode="json")
    return found


def over_rows(folder: Path, length: int, rounds: int) -> dict[str, Any]:
    """Memory of a process that loads the sentiment classifier and quantizes it, by rows of calibration data."""
    source = sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = " ".join(text for text, _ in sentiment.training_rows())
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    found: dict[str, Any] = {}
    for rows in MEMORY_ROWS:
        file = folder / f"{length}-{rows}.pt"
        torch.save(ids[: rows * length].reshape(rows, length).clone(), file)
        stages = [_static(source, file, folder, f"{length}-{rows}-{index}") for index in range(rounds)]
        found[str(rows)] = {
            "baseline": [one["baseline_bytes"]["anonymous"] for one in stages],
            "growth": [one["quantize"]["peak_anonymous_growth"] for one in stages],
        }
    few, many = (statistics.median(found[str(rows)]["growth"]) for rows in MEMORY_ROWS)
    return {**found, "ratio": many / few}


def _static(source: Path, ids: Path, folder: Path, name: str) -> dict[str, Any]:
    """One process that quantizes to static INT8 and saves."""
    job = Job(str(source), str(ids), str(folder / name), STATIC, bits=8, group_size=0, iterations=0, seed=0)
    return quantize(OURS, job, folder, threads=2)


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
