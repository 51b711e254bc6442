"""What round to nearest costs SmolLM2-135M (rotated off its INT4 grid) in perplexity."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress as hfc
from benchmarks.common import Bar, Measured, run
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from examples.reference.texts import technical_prose, token_windows
from hf_compress.evaluation.quality import perplexity_delta
from hf_compress.evaluation.size import resident_bytes

NAME = "perplexity"
MOST_CHANGE_PERCENT = 0.5
BARS = (Bar(name="W8 g64, change of perplexity", at="most", limit=MOST_CHANGE_PERCENT, unit="%"),)
GROUP_SIZE = 64
WINDOWS, TOKENS = 16, 512


def measure(smoke: bool) -> Measured:
    """Quantize with 8 and 4 bits, each compared with fp32 on the same windows."""
    path = off_grid_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows, tokens = (2, 64) if smoke else (WINDOWS, TOKENS)
    texts = [torch.tensor(ids) for ids in token_windows(tokenizer, technical_prose(), tokens, windows)]
    baseline = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = {}
    for bits in (8, 4):
        model = hfc.quantize(path, hfc.RTNQuantConfig(bits=bits, group_size=GROUP_SIZE))
        quality = perplexity_delta(model, baseline, texts, batch_size=2)
        found[bits] = {"resident_bytes": resident_bytes(model), **quality.model_dump(mode="json")}
    return Measured(
        settings={
            "model": ROTATED_NAME,
            "text": "The Python language reference of this Python (pydoc topics)",
            "windows": windows,
            "tokens_per_window": tokens,
            "group_size": GROUP_SIZE,
        },
        measurements={
            "fp32_resident_bytes": resident_bytes(baseline),
            **{f"w{bits}": numbers for bits, numbers in found.items()},
        },
        values={BARS[0].name: 100 * abs(found[8]["ratio"] - 1)},
    )


if __name__ == "__main__":
    sys.exit(run(NAME, __doc__, BARS, measure))
