"""Quantization-aware training of a text classifier: what rounding loses at few bits, and what training wins back.

python -m examples.qat_text_classification --out classifier-qat
python -m examples.qat_text_classification --model DIR --bits 2 --out DIR-qat

The model learns, with its weights rounded, to answer like itself before rounding: a few minutes on two cores. Run it
from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

import hf_compress as hfc
from examples.reference import sentiment
from hf_compress.evaluation.quality import evaluate_quality
from hf_compress.evaluation.size import disk_bytes

LENGTH = 32
"""Most tokens of a text."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Round, train with rounded weights, save with proof, load again, measure."""
    parser = argparse.ArgumentParser(description="Quantization-aware training of a two-label text classifier.")
    parser.add_argument("--model", type=Path, help="a directory; the demo's MiniLM sentiment classifier by default")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--smoke", action="store_true", help="a few rows and steps, to try the script")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)

    source = options.model or sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    training, held_out = sentiment.training_rows(), sentiment.held_out()
    if options.smoke:
        training, held_out = training[:32], held_out[:20]

    def tokenized(row: dict[str, object]) -> dict[str, object]:
        return {**tokenizer(row["text"], truncation=True, max_length=LENGTH), "labels": row["label"]}

    rows = Dataset.from_list([{"text": text, "label": label} for text, label in training])
    rows = rows.map(tokenized, remove_columns=["text", "label"])

    teacher = AutoModelForSequenceClassification.from_pretrained(source)
    student = AutoModelForSequenceClassification.from_pretrained(source)
    student.get_input_embeddings().requires_grad_(False)  # not quantized, so nothing to learn
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it shall give its teacher's answers, which has no dropout either

    grid = {"bits": options.bits, "group_size": options.group_size}
    trainer = hfc.DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=hfc.DistillationConfig(
            alpha=1.0,  # the teacher's answers alone, no labels
            hidden={"layers": "uniform", "loss": "cosine"},  # and what each layer holds: two logits say little
        ),
        callbacks=[hfc.QATCallback(hfc.QATConfig(**grid, learn_scales=True))],
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        args=TrainingArguments(
            output_dir=str(options.out / "run"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,  # of all steps
            lr_scheduler_type="linear",
            save_strategy="no",
            logging_steps=20,
            report_to=[],
        ),
    )
    trainer.train()  # ends with packed weights: the grid that was trained with, so the same answers

    path = options.out / "quantized"
    proof = hfc.save(student, path, tokenizer=tokenizer)  # fails rather than writing what would not reload
    print(f"Saved to {path}; proof: {proof.level}, by {proof.reader}")

    def line(name: str, model: object, folder: Path) -> str:
        found = evaluate_quality(model, teacher, held_out, tokenizer, max_length=LENGTH, batch_size=32).result
        change = f"{100 * found.difference_low:+.1f} to {100 * found.difference_high:+.1f}"
        size = disk_bytes(folder).weights / 1e6
        return f"{name:<24}{100 * found.candidate_accuracy:>8.1f}% {change:>20}{size:>11.1f} MB"

    rounded = hfc.quantize(source, hfc.RTNQuantConfig(**grid))
    print(f"{'':<24}{'accuracy':>9} {'95 % of the change':>20}{'weights':>14}   (n = {len(held_out)})")
    print(line("float32", teacher, Path(source)))
    print(line(f"{options.bits} bits, rounded", rounded, path))  # the same grid, so the same bytes
    print(line(f"{options.bits} bits, trained", hfc.load(path), path))


if __name__ == "__main__":
    main()
