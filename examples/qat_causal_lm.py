"""Quantization-aware training of a language model at 3 bits: it learns to write like itself before rounding.

python -m examples.qat_causal_lm --out smollm2-qat3
python -m examples.qat_causal_lm --model Qwen/Qwen3-0.6B --bits 4 --steps 500 --out qwen3-qat4

About 20 minutes on two cores. The text to learn from and the text to measure on are different parts of Python's own
documentation. Run it from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

import hf_compress as hfc
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from examples.reference.texts import excerpt, technical_prose
from hf_compress.evaluation.quality import evaluate_quality
from hf_compress.evaluation.size import disk_bytes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = argparse.ArgumentParser(description="Quantization-aware training of a causal language model.")
    known.add_argument("--model", help=f"a Hub id or a directory; {ROTATED_NAME}, by default")
    known.add_argument("--bits", type=int, default=3)
    known.add_argument("--group-size", type=int, default=64)
    known.add_argument("--steps", type=int, default=150, help="optimizer steps of 4 windows each")
    known.add_argument("--length", type=int, default=128, help="tokens per window")
    known.add_argument("--windows", type=int, default=16, help="windows to measure perplexity on, at least 2")
    known.add_argument("--learning-rate", type=float, default=2e-4)
    known.add_argument("--smoke", action="store_true", help="2 short steps, to try the script")
    known.add_argument("--out", type=Path, required=True, help="directory to write")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Round, train with rounded weights, save with proof, load again, measure."""
    options = parser().parse_args(arguments)
    if options.smoke:
        options.steps, options.length, options.windows = 2, 32, 2

    source = options.model or off_grid_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = technical_prose()
    held_out = excerpt(tokenizer, text, options.windows * options.length)
    ids = tokenizer(text[len(held_out) :], add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + options.length] for start in range(0, len(ids) - options.length, options.length)]
    rows = Dataset.from_list([{"input_ids": window, "labels": window} for window in windows])

    teacher = AutoModelForCausalLM.from_pretrained(source)
    student = AutoModelForCausalLM.from_pretrained(source)
    student.get_input_embeddings().requires_grad_(False)  # neither the table nor the head is quantized
    student.get_output_embeddings().requires_grad_(False)

    grid = {"bits": options.bits, "group_size": options.group_size}
    trainer = hfc.DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=hfc.DistillationConfig(alpha=1.0, temperature=1.0),  # the teacher's probabilities alone
        callbacks=[hfc.QATCallback(hfc.QATConfig(**grid, learn_scales=True))],
        train_dataset=rows,
        data_collator=default_data_collator,
        args=TrainingArguments(
            output_dir=str(options.out / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,  # of all steps
            save_strategy="no",
            logging_steps=10,
            report_to=[],
        ),
    )
    trainer.train()  # ends with packed weights: the grid that was trained with, so the same answers

    path = options.out / "quantized"
    proof = hfc.save(student, path, tokenizer=tokenizer)  # fails rather than writing what would not reload
    print(f"Saved to {path}; proof: {proof.level}, by {proof.reader}")

    def line(name: str, model: object) -> str:
        found = evaluate_quality(model, teacher, [held_out], tokenizer, max_length=options.length, batch_size=4).result
        change = f"{100 * (found.ratio_low - 1):+.1f} to {100 * (found.ratio_high - 1):+.1f}"
        return f"{name:<24}{found.candidate_perplexity:>10.2f}{change:>24}"

    rounded = hfc.quantize(source, hfc.RTNQuantConfig(**grid))
    print(f"{'':<24}{'perplexity':>10}{'95 % of the change, %':>24}   ({options.windows} x {options.length} tokens)")
    print(line("float32", teacher))
    print(line(f"{options.bits} bits, rounded", rounded))
    print(line(f"{options.bits} bits, trained", hfc.load(path)))
    print(f"{disk_bytes(path).weights / 1e6:.1f} MB of weights, rounded or trained")


if __name__ == "__main__":
    main()
