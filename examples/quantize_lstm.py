"""A plain PyTorch module, an LSTM text classifier, in INT8: no transformers model is needed.

python -m examples.quantize_lstm --out lstm-int8

Run it from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import hf_compress as hfc
from examples.reference import lstm, sentiment
from hf_compress.evaluation.quality import accuracy_delta
from hf_compress.evaluation.size import disk_bytes, stored_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize the trained module, save with proof, load into a new module, measure."""
    parser = argparse.ArgumentParser(description="Quantize a plain PyTorch LSTM classifier to INT8.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)

    folder = lstm.classifier()  # trained on tweets and product reviews, the first time
    tokenizer, rows = lstm.tokenizer(folder), sentiment.held_out()
    texts, labels = [text for text, _ in rows], torch.tensor([label for _, label in rows])
    original = lstm.load(folder)
    model = hfc.quantize(lstm.load(folder), hfc.Int8DynamicQuantConfig(embeddings="int8"))

    # A plain module does not say what its inputs look like, and has no config to rebuild it from.
    inputs = [{"input_ids": lstm.encode(tokenizer, texts[:2])}, {"input_ids": lstm.encode(tokenizer, texts[2:5])}]
    proof = hfc.save(model, options.out, tokenizer=tokenizer, inputs=inputs)
    print(f"Saved to {options.out}; proof: {proof.level}, by {proof.reader}")

    packed = hfc.load(options.out, model=lstm.skeleton(folder))
    before, after = stored_bytes(original), disk_bytes(options.out).weights
    print(f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB")
    found = accuracy_delta(lstm.logits(packed, tokenizer, texts), lstm.logits(original, tokenizer, texts), labels)
    print(
        f"accuracy {found.baseline_accuracy:.1%} -> {found.candidate_accuracy:.1%}; the change is between "
        f"{100 * found.difference_low:+.1f} and {100 * found.difference_high:+.1f} points (95 %)"
    )


if __name__ == "__main__":
    main()
