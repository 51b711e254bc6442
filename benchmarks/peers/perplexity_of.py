"""Perplexity of one checkpoint, in a process of its own.

python -m benchmarks.peers.perplexity_of JSON    # prints the result as its last line
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.peers.dense import dense_model, quantized_linears
from hf_compress.evaluation.language import perplexity


def main() -> int:
    """Evaluate `checkpoint` of `original` on the windows in the file `ids`."""
    job = json.loads(sys.argv[1])
    logging.disable_progress_bar()
    original = AutoModelForCausalLM.from_pretrained(job["original"], dtype=torch.float32).eval()
    windows = list(torch.load(job["ids"], weights_only=True))
    if job["checkpoint"] is None:
        model, changed = original, 0
    else:
        model = dense_model(Path(job["checkpoint"]), Path(job["original"]), job["ours"])
        changed = quantized_linears(model, original)
    found = perplexity(model, windows, 2)
    told = {"perplexity": found.perplexity, "window_nll": found.window_nll, "quantized_linears": changed}
    print(f"\n{json.dumps(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
