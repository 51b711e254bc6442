"""The library, step by step: plan, quantize, save, load, evaluate.

python examples/quantize_library.py --model DIR --out DIR-int8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from hf_compress.evaluation.report import to_markdown

TEXTS = [("I love it, works great!", 1), ("Broken after a day, awful.", 0)]
"""Give your own: two examples prove nothing, and the report's interval says so."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress a text classifier and print the report."""
    parser = argparse.ArgumentParser(description="Compress a text classifier and report what it cost.")
    parser.add_argument("--model", required=True, help="a Hub id or a directory")
    parser.add_argument("--out", required=True, help="directory to write")
    options = parser.parse_args(arguments)
    config = hfc.Int8DynamicQuantConfig()

    plan = hfc.plan(options.model, config)  # reads no weights
    print(f"{plan.coverage:.0%} of the weights will be quantized:")
    for row in plan.rows:
        print(f"  {row.name}: {row.scheme} ({row.reason})")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    hfc.save(hfc.quantize(options.model, config), options.out, tokenizer=tokenizer)

    model = hfc.load(options.out)  # packed, with the fastest kernels of this machine
    baseline = AutoModelForSequenceClassification.from_pretrained(options.model)
    report = hfc.evaluate(model, baseline, TEXTS, tokenizer=tokenizer, path=options.out, pairs=8)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
