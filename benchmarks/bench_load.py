"""Loading with `quantization_config=RTNQuantConfig(...)`: seconds and memory beside a plain load."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_compress as hfc
from benchmarks.common import Bar, Measured, medians, run, summary
from benchmarks.memory import load_once
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from hf_compress.core.plan import Plan

NAME = "load"
MOST_EXTRA_SECONDS = 2.0
PACKED_FACTOR = 1.15
WEIGHT_COPIES = 3
MOST_DEPTH_PERCENT = 5.0
CONFIG: dict[str, Any] = {"bits": 4, "group_size": 64}
EXTRA = Bar(name="seconds over a plain load", at="most", limit=MOST_EXTRA_SECONDS, unit="s")
PEAK = Bar(
    name=f"peak growth / ({PACKED_FACTOR} × packed bytes + {WEIGHT_COPIES} × largest weight)",
    at="most",
    limit=1.0,
    unit="of the bound",
)
DEPTH = Bar(
    name="peak growth without packed bytes, L against 2 L layers", at="most", limit=MOST_DEPTH_PERCENT, unit="%"
)
BARS = (EXTRA, PEAK, DEPTH)
ROUNDS, MEMORY_ROUNDS = 9, 5
LAYERS = 8
"""L of the random Llama; its largest weights have 16 MiB. With fewer layers the allocator is not warm yet."""


def plan_sizes(path: Path) -> tuple[int, int]:
    """Bytes of all packed weights, and of the largest weight in fp32."""
    plan: Plan = hfc.plan(path, hfc.RTNQuantConfig(**CONFIG))
    packed = sum(row.planned_bytes for row in plan.quantized)
    return packed, max(row.dense_bytes for row in plan.quantized)


def timed_rounds(path: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of plain and quantizing loads, in turns; the first of each fills the file cache and doesn't count."""
    seconds: dict[str, list[float]] = {"plain": [], "quantized": []}
    configs = {"plain": None, "quantized": CONFIG}
    for index in range(rounds + 1):
        for name in sorted(seconds, reverse=index % 2 == 1):
            took = load_once(path, configs[name], sample=False)["seconds"]
            if index:
                seconds[name].append(took)
    return seconds


def memory_rounds(path: Path, config: dict[str, Any] | None, rounds: int) -> list[dict[str, float]]:
    """Growth of anonymous memory in several fresh processes."""
    return [load_once(path, config, sample=True) for _ in range(rounds)]


def growth(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Peak and final growth over rounds."""
    return {key: summary([one[key] for one in rounds]) for key in ("peak", "final")}


def random_llama(folder: Path, layers: int, smoke: bool) -> Path:
    """A Llama with random weights, saved as fp32."""
    size = 512 if smoke else 1024
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=layers,
        num_attention_heads=size // 64,
        tie_word_embeddings=False,
    )
    path = folder / f"llama-{layers}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def depths(smoke: bool, rounds: int) -> dict[int, dict[str, Any]]:
    """Growth and packed bytes of a random Llama with L and 2 L layers; one exists on disk at a time."""
    found = {}
    for layers in (LAYERS, 2 * LAYERS):
        with tempfile.TemporaryDirectory() as folder:
            path = random_llama(Path(folder), layers, smoke)
            packed, largest = plan_sizes(path)
            measured = memory_rounds(path, CONFIG, rounds)
            over = medians(measured, "peak") - packed
            found[layers] = {
                "packed_bytes": packed,
                "largest_weight_bytes": largest,
                "growth_bytes": growth(measured),
                "peak_without_packed_bytes": over,
            }
    return found


def measure(smoke: bool) -> Measured:
    """Time, memory, independence of depth."""
    path = off_grid_smollm2()
    rounds, memory = (1, 1) if smoke else (ROUNDS, MEMORY_ROUNDS)
    packed, largest = plan_sizes(path)
    seconds = timed_rounds(path, rounds)
    ours, plain = memory_rounds(path, CONFIG, memory), memory_rounds(path, None, memory)
    deep = depths(smoke, memory)
    few, many = (numbers["peak_without_packed_bytes"] for numbers in deep.values())
    bound = PACKED_FACTOR * packed + WEIGHT_COPIES * largest
    return Measured(
        settings={"model": ROTATED_NAME, "config": CONFIG, "rounds": rounds, "memory_rounds": memory},
        measurements={
            "seconds": {name: summary(values) for name, values in seconds.items()},
            "packed_bytes": packed,
            "largest_weight_bytes": largest,
            "bound_bytes": bound,
            "growth_bytes": {"plain": growth(plain), "quantized": growth(ours)},
            "depth": {str(layers): numbers for layers, numbers in deep.items()},
        },
        values={
            EXTRA.name: statistics.median(seconds["quantized"]) - statistics.median(seconds["plain"]),
            PEAK.name: medians(ours, "peak") / bound,
            DEPTH.name: 100 * abs(many - few) / few,
        },
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
