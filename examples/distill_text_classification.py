"""A text classifier with half of the layers, taught by the whole one, then in 8 bits.

python -m examples.distill_text_classification --out classifier-half
python -m examples.distill_text_classification --model DIR --layers 4 --out DIR-4

Fewer layers are fewer bytes and less time, everywhere and without this package: the student is a stock model. Run it
from the top of a checkout, whose `examples.reference` carries the models and texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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
    known = argparse.ArgumentParser(description="Distill a two-label text classifier into fewer layers.")
    known.add_argument("--model", type=Path, help="a directory; the demo's MiniLM sentiment classifier by default")
    known.add_argument("--layers", type=int, help="of the student; half of the teacher's by default")
    known.add_argument("--epochs", type=float, default=3.0)
    known.add_argument("--smoke", action="store_true", help="a few rows and steps, to try the script")
    known.add_argument("--out", type=Path, required=True, help="directory to write")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Cut layers out, teach the rest, save, quantize, save with proof, measure."""
    options = parser().parse_args(arguments)

    source = options.model or sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    training, held_out = sentiment.training_rows(), sentiment.held_out()
    if options.smoke:
        training, held_out = training[:32], held_out[:20]
    rows = token_rows(tokenizer, training)

    teacher = AutoModelForSequenceClassification.from_pretrained(source)
    layers = options.layers or teacher.config.num_hidden_layers // 2
    student = hfc.student_from_teacher(teacher, layers=layers)  # evenly spaced ones, with the first and the last
    untaught = hfc.student_from_teacher(teacher, layers=layers)
    trainer = hfc.DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=hfc.DistillationConfig(
            alpha=0.5,  # half the labels, half the teacher's answers
            hidden=hfc.HiddenConfig(loss="cosine"),  # and what each layer holds: two logits say little
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        args=TrainingArguments(
            output_dir=str(options.out / "run"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-4,
            warmup_steps=0.1,  # of all steps
            save_strategy="no",
            logging_steps=20,
            report_to=[],
        ),
    )
    trainer.train()

    dense, small = options.out / "student", options.out / "student-int8"
    student.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    proof = hfc.save(hfc.quantize(dense, hfc.Int8DynamicQuantConfig()), small, tokenizer=tokenizer)
    print(f"Saved to {small}; proof: {proof.level}, by {proof.reader}")

    print_table(
        teacher,
        tokenizer,
        held_out,
        [
            (f"{teacher.config.num_hidden_layers} layers", teacher, Path(source)),
            (f"{layers} layers, cut out", untaught, dense),
            (f"{layers} layers, taught", student, dense),
            (f"{layers} layers, 8 bits", hfc.load(small), small),
        ],
    )


if __name__ == "__main__":
    main()
