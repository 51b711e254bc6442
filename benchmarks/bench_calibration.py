"""Data that a model makes itself, beside real data: what the layers of a network and of a language model see."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ResNetForImageClassification

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from examples.reference import digits
from examples.reference.smollm2 import NAME as SMOLLM2
from examples.reference.smollm2 import plain_smollm2
from examples.reference.texts import news_snippets, technical_prose
from hf_compress.calibration.data import prepare

NAME = "calibration"
SEEDS = (0, 1, 2)
ROWS, TEXT_ROWS, LENGTH = 64, 16, 128
PERCENTILE = 0.999
MOST_RANGE = 1.3
LEAST_CORRELATION = 0.9
RANGE = Bar(
    name="distilled images: input range of the median layer over the real one",
    at="most",
    limit=MOST_RANGE,
    unit="×",
)
ENERGY = Bar(
    name="self-generated text: correlation of channel energies with real text, median layer",
    at="least",
    limit=LEAST_CORRELATION,
    unit="",
)
BARS = (RANGE, ENERGY)

Batches = Iterable[dict[str, Tensor]]


@torch.no_grad()
def layer_inputs(model: nn.Module, batches: Batches, kinds: tuple[type[nn.Module], ...]) -> dict[str, list[Tensor]]:
    """What `observe` makes of the inputs of every layer, batch by batch."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: found.setdefault(name, []).append(_observed(arguments[0]))
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def _observed(value: Tensor) -> Tensor:
    """Images whole; of tokens the energy of each channel."""
    return value if value.ndim == 4 else value.double().square().flatten(0, -2).mean(0)


def ranges(model: nn.Module, batches: Batches) -> dict[str, tuple[float, float]]:
    """Largest value and 99.9th percentile of the absolute inputs of every convolution."""
    found = {}
    for name, seen in layer_inputs(model, batches, (nn.Conv2d,)).items():
        values = torch.cat([value.flatten() for value in seen]).abs()
        rank = max(1, math.ceil(PERCENTILE * values.numel()))
        found[name] = (float(values.max()), float(values.kthvalue(rank).values))
    return found


def range_factor(ours: dict[str, tuple[float, float]], real: dict[str, tuple[float, float]]) -> dict[str, float]:
    """How far ranges are apart, as a factor of at least 1: the median and the worst layer."""
    made = {}
    for index, what in enumerate(("largest", "percentile")):
        factors = [math.exp(abs(math.log(ours[name][index] / real[name][index]))) for name in real]
        made |= {f"{what}_median": statistics.median(factors), f"{what}_worst": max(factors)}
    return made


def images(smoke: bool) -> dict[str, Any]:
    """The digits network on real images, others of them, distilled ones and noise."""
    model = ResNetForImageClassification.from_pretrained(digits.classifier()).eval()
    pixels = torch.stack([image for image, _ in digits.held_out()])
    rows = 16 if smoke else ROWS
    real = ranges(model, [{"pixel_values": pixels[:rows]}])
    noise = torch.randn(pixels[:rows].shape, generator=torch.Generator().manual_seed(0))
    found = {
        "other real images": [range_factor(ranges(model, [{"pixel_values": pixels[-rows:]}]), real)],
        "noise": [range_factor(ranges(model, [{"pixel_values": noise}]), real)],
        "distilled": [],
    }
    for seed in SEEDS[:1] if smoke else SEEDS:
        request = hfc.Calibration.generated(rows=rows, seed=seed, image_size=pixels.shape[-1])
        found["distilled"].append(range_factor(ranges(model, prepare(request, model).batches), real))
    return found


def energies(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Mean square of every input channel of every linear layer."""
    return {name: torch.stack(seen).mean(0) for name, seen in layer_inputs(model, batches, (nn.Linear,)).items()}


def correlation(ours: dict[str, Tensor], real: dict[str, Tensor]) -> dict[str, float]:
    """Pearson correlation of the logarithms of channel energies: the median and the worst layer."""
    found = [float(torch.corrcoef(torch.stack([ours[name], real[name]]).log())[0, 1]) for name in real]
    return {"median": statistics.median(found), "worst": min(found)}


def texts(smoke: bool) -> dict[str, Any]:
    """A language model on news, technical prose, text of its own, and random tokens."""
    folder = plain_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = 4 if smoke else TEXT_ROWS
    options: dict[str, Any] = {"rows": rows, "sequence_length": LENGTH, "tokenizer": tokenizer}

    def seen(data: Any, seed: int) -> dict[str, Tensor]:
        return energies(model, prepare(hfc.Calibration(data, seed=seed, **options), model).batches)

    real = seen(news_snippets(), 0)
    random = torch.randint(len(tokenizer), (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {
        "other news": [correlation(seen(news_snippets(), 1), real)],
        "technical prose": [correlation(seen([technical_prose()], 0), real)],
        "random tokens": [correlation(energies(model, [{"input_ids": part} for part in random.split(8)]), real)],
        "self-generated": [],
    }
    for seed in SEEDS[:1] if smoke else SEEDS:
        found["self-generated"].append(correlation(seen("generated", seed), real))
    return found


def measure(smoke: bool) -> Measured:
    """Both, and the mean over the seeds."""
    of_images, of_texts = images(smoke), texts(smoke)
    return Measured(
        settings={
            "models": ["digits ResNet", SMOLLM2],
            "rows": ROWS,
            "text_rows": TEXT_ROWS,
            "sequence_length": LENGTH,
            "percentile": PERCENTILE,
            "seeds": list(SEEDS),
        },
        measurements={"images": of_images, "texts": of_texts},
        values={
            RANGE.name: statistics.mean(one["percentile_median"] for one in of_images["distilled"]),
            ENERGY.name: statistics.mean(one["median"] for one in of_texts["self-generated"]),
        },
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
