"""A text classifier, quantized in several ways: what each one costs in accuracy and gains in size.

python -m examples.quantize_text_classification --out classifier-small
python -m examples.quantize_text_classification --model DIR --methods int8-dynamic hqq4 --out DIR-small

Run it from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from examples.reference import sentiment

METHODS = {
    "int8-dynamic": hfc.Int8DynamicQuantConfig(),
    "rtn4": hfc.RTNQuantConfig(bits=4, group_size=64),
    "hqq4": hfc.HQQQuantConfig(bits=4, group_size=64),
    "nf4": hfc.CodebookQuantConfig(codebook="nf4", group_size=64),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize, save with proof, load again, measure; once for each method."""
    parser = argparse.ArgumentParser(description="Quantize a two-label text classifier in several ways.")
    parser.add_argument("--model", type=Path, help="a directory; the demo's MiniLM sentiment classifier by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=int, default=400, help="held-out tweets and reviews to measure accuracy on")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)

    source = options.model or sentiment.classifier()
    everything = sentiment.held_out()
    if not 1 <= options.rows <= len(everything):
        parser.error(f"--rows {options.rows}: there are 1 to {len(everything)}")
    rows = [everything[index * len(everything) // options.rows] for index in range(options.rows)]  # both kinds of text
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForSequenceClassification.from_pretrained(source)

    for name in options.methods:
        path = options.out / name
        model = hfc.quantize(source, METHODS[name])
        proof = hfc.save(model, path, tokenizer=tokenizer)  # fails rather than writing what would not reload
        report = hfc.evaluate(
            hfc.load(path), original, rows, tokenizer=tokenizer, path=path, max_length=32, batch_size=32, pairs=8
        )
        size, found = report.size, report.quality.result
        print(f"{name}: {report.coverage.fraction:.0%} of the weights, proof: {proof.level}, by {proof.reader}")
        print(f"  {size.baseline_disk_weights / 1e6:.1f} MB -> {size.disk.weights / 1e6:.1f} MB in {path}")
        print(
            f"  accuracy {found.baseline_accuracy:.1%} -> {found.candidate_accuracy:.1%}; the change is between "
            f"{100 * found.difference_low:+.1f} and {100 * found.difference_high:+.1f} points (95 %)"
        )


if __name__ == "__main__":
    main()
