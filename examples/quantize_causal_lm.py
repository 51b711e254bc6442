"""A language model in 4 bits: perplexity before and after, its size, and a sentence.

python -m examples.quantize_causal_lm --method hqq --out smollm2-int4
python -m examples.quantize_causal_lm --method nf4 --model Qwen/Qwen3-0.6B --out qwen3-nf4

Run it from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress as hfc
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from examples.reference.texts import excerpt, technical_prose

METHODS = {
    "hqq": hfc.HQQQuantConfig(bits=4, group_size=64),
    "rtn": hfc.RTNQuantConfig(bits=4, group_size=64),
    "nf4": hfc.CodebookQuantConfig(codebook="nf4", group_size=64),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize while loading, save with proof, load again, measure, write a sentence."""
    parser = argparse.ArgumentParser(description="Quantize a causal language model to 4 bits.")
    parser.add_argument("--model", help=f"a Hub id or a directory; {ROTATED_NAME}, by default")
    parser.add_argument("--method", choices=METHODS, default="hqq")
    parser.add_argument("--windows", type=int, default=8, help="windows of text to measure perplexity on, at least 2")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--prompt", default="A list in Python is")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)

    source = options.model or off_grid_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=METHODS[options.method])
    proof = hfc.save(model, options.out, tokenizer=tokenizer)  # fails rather than writing what would not reload
    print(f"Saved to {options.out}; proof: {proof.level}, by {proof.reader}")
    del model

    packed = hfc.load(options.out)
    original = AutoModelForCausalLM.from_pretrained(source)
    text = excerpt(tokenizer, technical_prose(), options.windows * options.length)  # Python's own documentation
    report = hfc.evaluate(
        packed,
        original,
        [text],
        tokenizer=tokenizer,
        path=options.out,
        max_length=options.length,
        batch_size=2,
        pairs=8,
    )
    size, found = report.size, report.quality.result
    print(f"{size.baseline_disk_weights / 1e6:.1f} MB -> {size.disk.weights / 1e6:.1f} MB")
    print(
        f"perplexity {found.baseline_perplexity:.2f} -> {found.candidate_perplexity:.2f}, "
        f"{100 * (found.ratio - 1):+.1f} % ({100 * (found.ratio_low - 1):+.1f} to {100 * (found.ratio_high - 1):+.1f})"
    )
    prompt = tokenizer(options.prompt, return_tensors="pt")
    written = packed.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
