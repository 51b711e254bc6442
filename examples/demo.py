"""Compress two real models in several ways, prove every checkpoint, and show what each one gains and costs.

    python examples/demo.py            # or: make demo

The first is all-MiniLM-L6-v2, fine-tuned here to tell positive from negative tweets and product reviews, so that
"accuracy" means something; the second is SmolLM2-135M with its weights rotated off the INT4 grid that they are
packaged on. Everything they need comes from a package registry and is cached.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_compress as hfc
from examples.demo_tables import Outcome, console, quality_of, table, write_summary
from examples.reference import ReferenceUnavailable, sentiment, smollm2
from examples.reference.texts import excerpt, technical_prose
from hf_compress.evaluation.quality import perplexity, text_windows
from hf_compress.evaluation.report import write_report

CONFIGS: dict[str, hfc.QuantConfig] = {
    "rtn-int8": hfc.RTNQuantConfig(bits=8, group_size="channel"),
    "rtn-int4": hfc.RTNQuantConfig(bits=4, group_size=64),
    "rtn-int4-emb8": hfc.RTNQuantConfig(bits=4, group_size=64, embeddings="int8"),
    "int8-dynamic": hfc.Int8DynamicQuantConfig(),
}
"""For the classifier."""
LANGUAGE_CONFIGS: dict[str, hfc.QuantConfig] = {
    "lm-rtn-int4": hfc.RTNQuantConfig(bits=4, group_size=64),
    "lm-hqq-int4": hfc.HQQQuantConfig(bits=4, group_size=64),
}
"""For the language model."""
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))
"""Rows and tokens that the classifier's latency is measured on."""
LANGUAGE_SHAPES = ((1, 128),)
WINDOWS, TOKENS = 8, 256
"""Windows of the language model's perplexity, and tokens in each."""
STOCK_TOLERANCE = 0.005
"""Stock transformers and we may disagree by this much accuracy (texts whose two logits are all but equal), or by
this share of the perplexity."""


@dataclass(frozen=True)
class Subject:
    """A model to compress, and what it is measured on.

    Args:
        source: Its directory.
        loader: The class that loads it.
        configs: What to do with it, by name.
        data: Texts, labelled for a classifier.
        max_length: Tokens per text or window.
        batch_size: Texts or windows per forward.
        shapes: Rows and tokens that latency is measured on.
        pairs: Timed pairs per shape.
    """

    source: Path
    loader: Any
    configs: Mapping[str, hfc.QuantConfig]
    data: Sequence[tuple[str, int]] | Sequence[str]
    max_length: int
    batch_size: int
    shapes: Sequence[tuple[int, int]]
    pairs: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    for noisy in ("httpx", "torchao"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    subjects = prepare(options)
    if not subjects:
        console.print("It needs pip and a package registry once; `--model DIR` takes a classifier of your own.")
        return 1
    groups = [compress_all(subject, options.out) for subject in subjects]
    summary = write_summary(groups, options.out)
    for outcomes in groups:
        console.print(table(outcomes))
    console.print(f"Done in {time.perf_counter() - started:.0f} s. The report: {summary}", soft_wrap=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compress real models and show what it gained and cost.")
    own = "instead of the demo's own models"
    parser.add_argument("--model", type=Path, help=f"a two-label text classifier {own}")
    parser.add_argument("--language-model", type=Path, help=f"a causal language model {own}")
    parser.add_argument("--out", type=Path, default=Path("hf_compress_demo"), help="where everything is written")
    parser.add_argument("--rows", type=int, default=600, help="held-out texts to measure accuracy on")
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs per input shape, at least 8")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> list[Subject]:
    """The models to compress; of the demo's own two, those that can be had here."""
    both = options.model is None and options.language_model is None
    subjects = []
    for asked, getter in ((options.model, classifier), (options.language_model, language_model)):
        if not both and asked is None:
            continue
        started = time.perf_counter()
        try:
            subject = getter(asked, options)
        except ReferenceUnavailable as error:
            console.print(f"[bold red]Left out, it can't be had here:[/] {error}", soft_wrap=True)
            continue
        console.print(f"{subject.source.name}, ready in {time.perf_counter() - started:.1f} s")
        subjects.append(subject)
    return subjects


def classifier(model: Path | None, options: argparse.Namespace) -> Subject:
    """The sentiment classifier and held-out rows, half tweets and half product reviews.

    Raises:
        ReferenceUnavailable: The packages that carry the model or the texts can't be had.
    """
    if model is None:
        console.print("[bold]Preparing the classifier[/] (about two minutes the first time, then cached)")
        model = sentiment.classifier()
    count = options.rows
    return Subject(
        source=model,
        loader=AutoModelForSequenceClassification,
        configs=CONFIGS,
        data=[*sentiment.held_out("tweets")[: count - count // 2], *sentiment.held_out("amazon")[: count // 2]],
        max_length=sentiment.Recipe.max_length,
        batch_size=32,
        shapes=SHAPES,
        pairs=options.pairs,
    )


def language_model(model: Path | None, options: argparse.Namespace) -> Subject:
    """The language model and a piece of the Python language reference.

    Raises:
        ReferenceUnavailable: The package that carries the model can't be had.
    """
    if model is None:
        console.print(f"[bold]Preparing {smollm2.ROTATED_NAME}[/] (about two minutes the first time, then cached)")
        model = smollm2.off_grid_smollm2()
    config = transformers.AutoConfig.from_pretrained(model)
    length = min(TOKENS, config.max_position_embeddings)
    return Subject(
        source=model,
        loader=AutoModelForCausalLM,
        configs=LANGUAGE_CONFIGS,
        data=[excerpt(AutoTokenizer.from_pretrained(model), technical_prose(), WINDOWS * length)],
        max_length=length,
        batch_size=2,
        shapes=LANGUAGE_SHAPES,
        pairs=max(8, options.pairs // 2),
    )


def compress_all(subject: Subject, out: Path) -> list[Outcome]:
    """Compress with every configuration and measure each against the original."""
    tokenizer = AutoTokenizer.from_pretrained(subject.source)
    baseline = subject.loader.from_pretrained(subject.source, dtype=torch.float32).eval()
    return [compress(name, subject, baseline, tokenizer, out) for name in subject.configs]


def compress(
    name: str, subject: Subject, baseline: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> Outcome:
    """Quantize, save with proof, reload, measure, write the report."""
    console.print(f"\n[bold]{name}[/]")
    path = out / name
    model = quantize(subject.source, subject.configs[name])
    with console.status("Saving, and proving by a reload in a clean process without hf_compress"):
        proof = hfc.save(model, path, tokenizer=tokenizer, overwrite=True)
    console.print(f"  saved to {path}; proof: {proof.level}, by {proof.reader}", soft_wrap=True)
    del model
    with console.status("Measuring against the original"):
        report = hfc.evaluate(
            hfc.load(path),
            baseline,
            subject.data,
            tokenizer=tokenizer,
            path=path,
            inputs=timing_inputs(baseline, subject.shapes),
            pairs=subject.pairs,
            max_length=subject.max_length,
            batch_size=subject.batch_size,
        )
        write_report(report, out / "reports" / name)
        return Outcome(name, proof, report, stock_quality(path, subject, tokenizer, report))


def quantize(source: Path, config: hfc.QuantConfig) -> PreTrainedModel:
    """Quantize weight by weight while loading, behind a progress bar."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("quantizing", total=None)
        return hfc.quantize(
            source, config, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )


def timing_inputs(model: PreTrainedModel, wanted: Sequence[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    """Random token ids of the shapes wanted, cut to what the model takes."""
    longest, words = model.config.max_position_embeddings, model.config.vocab_size
    shapes = dict.fromkeys((rows, min(tokens, longest)) for rows, tokens in wanted)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, words, shape, generator=generator) for shape in shapes]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def stock_quality(path: Path, subject: Subject, tokenizer: PreTrainedTokenizerBase, report: hfc.Report) -> float:
    """Accuracy or perplexity of the checkpoint as plain `from_pretrained` loads it, which must be what we measured.

    Raises:
        RuntimeError: It is not.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        stock = subject.loader.from_pretrained(path).eval()
        if subject.loader is AutoModelForCausalLM:
            windows, _ = text_windows(subject.data, tokenizer, subject.max_length)
            found = perplexity(stock, windows, subject.batch_size).perplexity
        else:
            found = sentiment.accuracy(stock, tokenizer, subject.data)
    ours = quality_of(report)
    if abs(found - ours.after) > STOCK_TOLERANCE * ours.scale:
        raise RuntimeError(f"{path}: stock transformers has {ours.name} {found:.3f}, hf_compress {ours.after:.3f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
