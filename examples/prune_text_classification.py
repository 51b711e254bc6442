"""Pruning of a text classifier while it is fine-tuned, then 8-bit weights that keep the zeros.

python -m examples.prune_text_classification --out classifier-pruned
python -m examples.prune_text_classification --method movement --sparsity 0.85 --epochs 2 --out classifier-sparse

Zeros alone make a model neither smaller nor faster: the table shows it. Run it from the top of a checkout, whose
`examples.reference` carries the models and texts.
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
    known = argparse.ArgumentParser(description="Prune a two-label text classifier while fine-tuning it.")
    known.add_argument("--model", type=Path, help="a directory; the demo's MiniLM sentiment classifier by default")
    known.add_argument("--method", choices=("magnitude", "movement"), default="magnitude")
    known.add_argument("--sparsity", type=float, default=0.5)
    known.add_argument("--epochs", type=float, default=1.0)
    known.add_argument("--smoke", action="store_true", help="a few rows and steps, to try the script")
    known.add_argument("--out", type=Path, required=True, help="directory to write")
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune in steps with fine-tuning in between, save, quantize, save with proof, measure."""
    options = parser().parse_args(arguments)

    source = options.model or sentiment.classifier()
    tokenizer = AutoTokenizer.from_pretrained(source)
    training, held_out = sentiment.training_rows(), sentiment.held_out()
    if options.smoke:
        training, held_out = training[:128], held_out[:20]
    rows = token_rows(tokenizer, training)

    original = AutoModelForSequenceClassification.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.get_input_embeddings().requires_grad_(False)  # not pruned
    pruning = hfc.PruningConfig(
        method=options.method,
        sparsity=options.sparsity,
        start=0.1,  # of the run; the last part fine-tunes what is left
        end=0.6,
        every=1 if options.smoke else 5,  # optimizer steps from one mask to the next
    )
    trainer = hfc.DistillationTrainer(
        model=model,
        teacher=original,
        distillation=hfc.DistillationConfig(alpha=0.5, temperature=2.0),  # half the labels, half the original
        callbacks=[hfc.PruningCallback(pruning)],
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        args=TrainingArguments(
            output_dir=str(options.out / "run"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            warmup_steps=0.1,  # of all steps
            save_strategy="no",
            logging_steps=20,
            report_to=[],
        ),
    )
    trainer.train()  # ends with the zeros in the weights

    pruned, small = options.out / "pruned", options.out / "pruned-int8"
    model.save_pretrained(pruned)  # a plain float32 checkpoint
    tokenizer.save_pretrained(pruned)
    packed = hfc.quantize(pruned, hfc.RTNQuantConfig(bits=8, group_size="channel"))  # symmetric: zeros stay zeros
    proof = hfc.save(packed, small, tokenizer=tokenizer)
    print(f"Saved to {small}; proof: {proof.level}, by {proof.reader}")

    print_table(
        original,
        tokenizer,
        held_out,
        [
            ("float32", original, Path(source)),
            (f"{options.sparsity:.0%} zeros", model, pruned),
            (f"{options.sparsity:.0%} zeros, 8 bits", hfc.load(small), small),
        ],
    )


if __name__ == "__main__":
    main()
