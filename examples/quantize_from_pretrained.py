"""Quantize while loading: the one line that `hf_compress` adds to a transformers program.

python examples/quantize_from_pretrained.py --model Qwen/Qwen3-0.6B --out qwen3-int4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForCausalLM

import hf_compress as hfc


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, quantize, save, load again with stock transformers."""
    parser = argparse.ArgumentParser(description="Quantize a causal language model while loading it.")
    parser.add_argument("--model", required=True, help="a Hub id or a directory")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args(arguments)

    config = hfc.RTNQuantConfig(bits=options.bits, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config)

    proof = hfc.save(model, options.out)  # fails rather than writing what would not reload to the same logits
    print(f"Saved to {options.out}; proof: {proof.level}, by {proof.reader}")

    stock = AutoModelForCausalLM.from_pretrained(options.out)  # works without hf_compress too
    print(f"Stock transformers loads it as {stock.config.quantization_config.quant_method.value}")


if __name__ == "__main__":
    main()
