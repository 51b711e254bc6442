"""Plan and preflight of a 7B model, from its config alone."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run, summary

NAME = "preflight"
MOST_SECONDS = 10.0
BARS = (Bar(name="plan and preflight of a 7B Llama", at="most", limit=MOST_SECONDS, unit="s"),)
ROUNDS = 5


def llama_7b(folder: Path, smoke: bool) -> Path:
    """A directory with the config of Llama 2 7B and no weights."""
    config = LlamaConfig(num_hidden_layers=4 if smoke else 32, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return folder


def measure(smoke: bool) -> Measured:
    """Time `plan` and `preflight` together, several rounds."""
    config = hfc.RTNQuantConfig(bits=4, group_size=64)
    plans, preflights = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = llama_7b(Path(folder), smoke)
        for _ in range(2 if smoke else ROUNDS):
            started = time.perf_counter()
            hfc.plan(path, config)
            planned = time.perf_counter()
            forecast = hfc.preflight(path, config)
            plans.append(planned - started)
            preflights.append(time.perf_counter() - planned)
    both = [plan + preflight for plan, preflight in zip(plans, preflights, strict=True)]
    return Measured(
        settings={"config": config.to_dict(), "rounds": len(plans)},
        measurements={
            "plan_s": summary(plans),
            "preflight_s": summary(preflights),
            "parameters": sum(row.parameters for row in forecast.plan.rows) + forecast.plan.small_parameters,
            "coverage": forecast.plan.coverage,
            "bytes_before": forecast.bytes_before,
            "bytes_after": forecast.bytes_after,
            "peak_bytes": forecast.peak_bytes,
        },
        values={BARS[0].name: statistics.median(both)},
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
