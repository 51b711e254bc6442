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

from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

import hf_compress as hfc
from examples.reference import sentiment
from examples.reference.classification import print_table, token_rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    known = argparse.ArgumentParser(description="Quantization-aware training of a two-label text classifier.")
    known.add_argument("--model", type=Path, help="a directory; the demo's MiniLM sentiment classifier by default")
    known.add_argument("--bits", type=int, default=3)
    known.add_argument("--group-size", type=int, default=64)
    known.add_argument("--epochs", type=float, default=1.0)
    known.add_argument("--learning-rate", type=float, default=1e-4)
    known.add_argument("--smoke", action="store_true", help="a few rows and steps, to try the script")
    known.add_argument("--out", type=Path, required=True, help="directory to write")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Round, train with rounded weights, save with proof, load again, measure."""
    options = parser().parse_args(arguments)

    source = options.model or sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    training, held_out = sentiment.training_rows(), sentiment.held_out()
    if options.smoke:
        training, held_out = training[:32], held_out[:20]
    rows = token_rows(tokenizer, training)

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
            hidden=hfc.HiddenConfig(loss="cosine"),  # and what each layer holds: two logits say little
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

    rounded = hfc.quantize(source, hfc.RTNQuantConfig(**grid))
    print_table(
        teacher,
        tokenizer,
        held_out,
        [
            ("float32", teacher, Path(source)),
            (f"{options.bits} bits, rounded", rounded, path),  # the same grid, so the same bytes
            (f"{options.bits} bits, trained", hfc.load(path), path),
        ],
    )


if __name__ == "__main__":
    main()
