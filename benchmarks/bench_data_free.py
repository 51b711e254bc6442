"""Data-free methods: HQQ against rounding, tables against grids, convolutions and LSTMs, and other libraries."""

from __future__ import annotations

import copy
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from transformers import ResNetForImageClassification as ResNet

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from examples.reference import digits, lstm, sentiment
from examples.reference.packages import minilm_folder
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from examples.reference.texts import excerpt, technical_prose, token_windows
from hf_compress.evaluation.quality import Perplexity, perplexity, t_quantile
from hf_compress.evaluation.report import headline
from hf_compress.evaluation.size import disk_bytes, stored_bytes
from hf_compress.modules.swap import packed_modules

NAME = "data_free"
GROUP_SIZE = 64
MINILM_NAME = "MiniLM"
BELOW_ONE = 0.999
"""Falls short of 1 by more than rounding in the sums."""
MOST_HQQ_SECONDS = 60.0
MOST_LOST_POINTS = 0.5

SYMMETRIES = {"symmetric": True, "asymmetric": False}
TABLES = {"nf4": ("nf4", 4), "kmeans4": ("kmeans", 4), "kmeans3": ("kmeans", 3), "fp4": ("fp4", 4), "log4": ("log", 4)}
"""Kind and bits. FP4 and powers of two are measured without a bar: no weights follow their spacing."""
BETTER = ("nf4", "kmeans4", "kmeans3")
CLASSIFIERS = ("LSTM", "digits ResNet")
INT8 = ("int8_dynamic", "rtn8")

HQQ = {
    "symmetric": Bar(
        name="W4 g64 symmetric, perplexity HQQ / RTN, upper end of the paired 95 % interval",
        at="most",
        limit=1.0,
        unit="times",
    ),
    "asymmetric": Bar(
        name="W4 g64 asymmetric, perplexity HQQ / RTN, point estimate: its interval includes 1",
        at="most",
        limit=BELOW_ONE,
        unit="times",
    ),
}
JUDGED = {"symmetric": "high", "asymmetric": "ratio"}
"""Which number of `ratio` each bar takes."""
SAME_BYTES = Bar(name="W4 g64, packed bytes HQQ / RTN, the largest ratio", at="most", limit=1.0, unit="times")
SECONDS = Bar(name=f"HQQ quantizes {ROTATED_NAME}", at="most", limit=MOST_HQQ_SECONDS, unit="s")
ERRORS = {
    (model, table): Bar(name=f"{model}, squared error {table} / uniform", at="most", limit=BELOW_ONE, unit="times")
    for model in (MINILM_NAME, ROTATED_NAME)
    for table in BETTER
}
LOST = {
    (model, method): Bar(name=f"{model}, accuracy lost by {method}", at="most", limit=MOST_LOST_POINTS, unit="points")
    for model in CLASSIFIERS
    for method in INT8
}
CONFIGURATIONS = 8
ALL_MEASURED = Bar(name="configurations measured", at="least", limit=CONFIGURATIONS, unit=f"of {CONFIGURATIONS}")
BARS = (*HQQ.values(), SAME_BYTES, SECONDS, *ERRORS.values(), *LOST.values(), ALL_MEASURED)

Found = tuple[JsonValue, dict[str, float]]
"""Measurements of a part, and the values of its bars."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        layers: Of SmolLM2, the first ones; None takes all.
        windows: Of tokens, for perplexities.
        tokens: In each of them.
        peer_windows: Of tokens, for the comparison with other libraries.
        peer_tokens: In each of them.
        pairs: Timed pairs in that comparison.
    """

    layers: int | None
    windows: int
    tokens: int
    peer_windows: int
    peer_tokens: int
    pairs: int


FULL = Sizes(layers=None, windows=16, tokens=512, peer_windows=8, peer_tokens=256, pairs=20)
SMOKE = Sizes(layers=2, windows=2, tokens=64, peer_windows=2, peer_tokens=32, pairs=8)


def measure(smoke: bool) -> Measured:
    """All four parts."""
    sizes = SMOKE if smoke else FULL
    with tempfile.TemporaryDirectory() as folder:
        path = cut(off_grid_smollm2(), sizes.layers, Path(folder))
        parts = {
            "perplexity": perplexities(path, sizes),
            "squared_error": squared_errors(path),
            "classifiers": classifiers(Path(folder)),
            "libraries": libraries(path, sizes),
        }
    return Measured(
        settings={
            "model": ROTATED_NAME,
            "text": "The Python language reference of this Python (pydoc topics)",
            "group_size": GROUP_SIZE,
            **vars(sizes),
        },
        measurements={name: found for name, (found, _) in parts.items()},
        values={name: value for _, values in parts.values() for name, value in values.items()},
    )


def cut(path: Path, layers: int | None, folder: Path) -> Path:
    """The model with its first layers only, or the model itself."""
    if layers is None:
        return path
    target = folder / path.name
    AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=layers).save_pretrained(target)
    AutoTokenizer.from_pretrained(path).save_pretrained(target)
    return target


def perplexities(path: Path, sizes: Sizes) -> Found:
    """HQQ and RTN on the same windows, each symmetric and asymmetric."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = token_windows(tokenizer, technical_prose(), sizes.tokens, sizes.windows)
    windows = [torch.tensor(one) for one in ids]
    original = perplexity(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), windows, 2)
    found: dict[str, Any] = {"fp32": original.perplexity}
    values, hqq_seconds, sizes_over_rtn = {}, [], []
    for name, symmetric in SYMMETRIES.items():
        results, packed = {}, {}
        for method, kind in (("rtn", hfc.RTNQuantConfig), ("hqq", hfc.HQQQuantConfig)):
            started = time.perf_counter()
            model = hfc.quantize(path, kind(bits=4, group_size=GROUP_SIZE, symmetric=symmetric))
            seconds = time.perf_counter() - started
            results[method], packed[method] = perplexity(model, windows, 2), packed_bytes(model)
            against = ratio(results[method], original)
            found[f"{method}, {name}"] = {
                "perplexity": results[method].perplexity,
                "over_fp32": against,
                "packed_bytes": packed[method],
                "quantize_s": seconds,
            }
            if method == "hqq":
                hqq_seconds.append(seconds)
        compared = ratio(results["hqq"], results["rtn"])
        found[f"hqq over rtn, {name}"] = compared
        values[HQQ[name].name] = compared[JUDGED[name]]
        sizes_over_rtn.append(packed["hqq"] / packed["rtn"])
    return found, {**values, SAME_BYTES.name: max(sizes_over_rtn), SECONDS.name: max(hqq_seconds)}


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed weights with their scales and zero points."""
    return sum(held.nbytes for _, module in packed_modules(model) for held in module.buffers(recurse=False))


def ratio(new: Perplexity, old: Perplexity) -> dict[str, float]:
    """Ratio of two perplexities on the same windows of one length, with its paired 95 % interval."""
    pairs = zip(new.window_nll, old.window_nll, strict=True)
    differences = torch.tensor([one - other for one, other in pairs], dtype=torch.float64)
    middle = float(differences.mean())
    width = t_quantile(len(differences) - 1) * float(differences.std()) / math.sqrt(len(differences))
    return {"ratio": math.exp(middle), "low": math.exp(middle - width), "high": math.exp(middle + width)}


def squared_errors(path: Path) -> Found:
    """Squared error of the weights by each table, relative to the uniform grid of the same bits and groups."""
    sources = {MINILM_NAME: (AutoModel, minilm_folder()), ROTATED_NAME: (AutoModelForCausalLM, path)}
    found: dict[str, Any] = {}
    values = {}
    for model, (loader, source) in sources.items():
        original = loader.from_pretrained(source, dtype=torch.float32)
        uniform = {
            bits: squared_error(original, hfc.RTNQuantConfig(bits=bits, group_size=GROUP_SIZE)) for bits in (4, 3)
        }
        asymmetric = squared_error(original, hfc.RTNQuantConfig(bits=4, group_size=GROUP_SIZE, symmetric=False))
        tables = {
            name: squared_error(original, hfc.CodebookQuantConfig(codebook=kind, bits=bits, group_size=GROUP_SIZE))
            for name, (kind, bits) in TABLES.items()
        }
        ratios = {name: error / uniform[TABLES[name][1]] for name, error in tables.items()}
        found[model] = {
            "uniform": {str(bits): error for bits, error in uniform.items()},
            "over_uniform": {"uniform4 with zero points": asymmetric / uniform[4], **ratios},
        }
        values |= {ERRORS[model, name].name: ratios[name] for name in BETTER}
    return found, values


@torch.no_grad()
def squared_error(original: nn.Module, config: hfc.QuantConfig) -> float:
    """Mean squared error over all quantized weights, relative to their mean square."""
    model = hfc.quantize(copy.deepcopy(original), config)
    error = total = 0.0
    for name, module in packed_modules(model):
        for parameter in module.hfc_layouts:
            before = original.get_submodule(name).get_parameter(parameter).double()
            error += float((getattr(module, parameter).double() - before).square().sum())
            total += float(before.square().sum())
    return error / total


def classifiers(folder: Path) -> Found:
    """INT8 on a module with an LSTM and on a network of convolutions: accuracy and size."""
    rows, images = sentiment.held_out(), digits.held_out()
    trained, small = lstm.classifier(), digits.classifier()
    words = lstm.tokenizer(trained)
    texts = [text for text, _ in rows[:5]]
    inputs = [{"input_ids": lstm.encode(words, part)} for part in (texts[:2], texts[2:])]
    first = int8(
        lambda: lstm.load(trained),
        lambda path: hfc.load(path, model=lstm.skeleton(trained)),
        lambda model: lstm.accuracy(model, words, rows),
        {"embeddings": "int8"},
        folder / "lstm",
        inputs,
    )
    second = int8(
        lambda: ResNet.from_pretrained(small).eval(),
        hfc.load,
        lambda model: digits.accuracy(model, images),
        {},
        folder / "digits",
        None,
    )
    found = dict(zip(CLASSIFIERS, (first, second), strict=True))
    values = {
        bar.name: 100 * (found[model]["fp32"]["accuracy"] - found[model][method]["accuracy"])
        for (model, method), bar in LOST.items()
    }
    return found, values


def int8(
    original: Callable[[], nn.Module],
    reload: Callable[[Path], nn.Module],
    accuracy: Callable[[nn.Module], float],
    fields: Mapping[str, Any],
    folder: Path,
    inputs: Sequence[Mapping[str, Tensor]] | None,
) -> dict[str, Any]:
    """Accuracy and stored bytes of a model before, and by both INT8 methods as saved, proven and loaded again."""
    before = original()
    found: dict[str, Any] = {"fp32": {"accuracy": accuracy(before), "weight_bytes": stored_bytes(before)}}
    configs = {
        "int8_dynamic": hfc.Int8DynamicQuantConfig(**fields),
        "rtn8": hfc.RTNQuantConfig(bits=8, group_size="channel", **fields),
    }
    for name, config in configs.items():
        model = hfc.quantize(original(), config)
        proof = hfc.save(model, folder / name, inputs=inputs)
        found[name] = {
            "accuracy": accuracy(reload(folder / name)),
            "weight_bytes": disk_bytes(folder / name).weights,
            "proof": proof.level,
        }
    return found


def libraries(path: Path, sizes: Sizes) -> Found:
    """Ours beside bitsandbytes and torchao, each saved, proven, reloaded and measured against the original."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = excerpt(tokenizer, technical_prose(), sizes.peer_windows * sizes.peer_tokens)
    ids = torch.tensor(token_windows(tokenizer, technical_prose(), 128, 1))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning in every forward
    comparison = hfc.compare(
        path,
        peers(),
        [text],
        tokenizer=tokenizer,
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        pairs=sizes.pairs,
        max_length=sizes.peer_tokens,
        batch_size=2,
    )
    entries: dict[str, Any] = {}
    for entry in comparison.entries:
        if entry.error is not None:
            entries[entry.name] = {"error": entry.error.model_dump(mode="json")}
        elif entry.report is not None:
            entries[entry.name] = told(entry.report)
    found = {
        "original": comparison.baseline.model_dump(mode="json"),
        "configurations": entries,
        "notes": list(comparison.notes),
    }
    return found, {ALL_MEASURED.name: len(comparison.reports)}


def peers() -> dict[str, Any]:
    """Configurations by name."""
    return {
        "rtn4": hfc.RTNQuantConfig(bits=4, group_size=GROUP_SIZE),
        "hqq4": hfc.HQQQuantConfig(bits=4, group_size=GROUP_SIZE),
        "nf4": hfc.CodebookQuantConfig(codebook="nf4", group_size=GROUP_SIZE),
        "int8_dynamic": hfc.Int8DynamicQuantConfig(),
        "bitsandbytes-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao-int8-weight-only": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao-int8-dynamic": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    }


def told(report: hfc.Report) -> dict[str, Any]:
    """What a report says, without its lists of weights."""
    facts = report.model_dump(mode="json", include={"format", "size", "latency", "quality", "kernels"})
    return {
        "headline": headline(report),
        **facts,
        "coverage": report.coverage.fraction,
        "schemes": report.model_dump(mode="json")["coverage"]["by_scheme"],
        "proof": None if report.proof is None else report.proof.level,
    }


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
