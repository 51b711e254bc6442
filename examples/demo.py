"""Compress a real model in four ways, prove every checkpoint, and show what each one gains and costs.

    python examples/demo.py            # or: make demo

The model is all-MiniLM-L6-v2, fine-tuned here to tell positive from negative tweets and product reviews, so that
"accuracy" means something. Everything it needs comes from a package registry and is cached.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_compress as hfc
from examples.reference import ReferenceUnavailable, sentiment
from hf_compress.checkpoint.record import Proof
from hf_compress.evaluation.latency import LatencyComparison
from hf_compress.evaluation.report import write_report

CONFIGS: dict[str, hfc.QuantConfig] = {
    "rtn-int8": hfc.RTNQuantConfig(bits=8, group_size="channel"),
    "rtn-int4": hfc.RTNQuantConfig(bits=4, group_size=64),
    "rtn-int4-emb8": hfc.RTNQuantConfig(bits=4, group_size=64, embeddings="int8"),
    "int8-dynamic": hfc.Int8DynamicQuantConfig(),
}
SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))
"""Rows and tokens that latency is measured on."""
MAX_LENGTH = sentiment.Recipe.max_length
STOCK_TOLERANCE = 0.005
"""Stock transformers and we may disagree by this much accuracy: texts whose two logits are all but equal."""

Rows = Sequence[tuple[str, int]]
console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width: leave room for the table


@dataclass(frozen=True)
class Outcome:
    """What one configuration gave.

    Args:
        name: Name of the configuration and of its folder.
        proof: How the checkpoint was proven.
        report: Everything measured against the original.
        stock_accuracy: Accuracy of the checkpoint as stock transformers loads it.
    """

    name: str
    proof: Proof
    report: hfc.Report
    stock_accuracy: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        source, rows = prepare(options.model, options.rows)
    except ReferenceUnavailable as error:
        console.print(f"[bold red]The demo can't run here:[/] {error}", soft_wrap=True)
        console.print("It needs pip and a package registry once; `--model DIR` takes a classifier of your own.")
        return 1
    outcomes = compress_all(source, rows, options.out, options.pairs)
    summary = write_summary(outcomes, options.out)
    console.print(table(outcomes))
    console.print(f"Done in {time.perf_counter() - started:.0f} s. The report: {summary}", soft_wrap=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compress a real model and show what it gained and cost.")
    parser.add_argument("--model", type=Path, help="a two-label text classifier instead of the demo's own")
    parser.add_argument("--out", type=Path, default=Path("hf_compress_demo"), help="where everything is written")
    parser.add_argument("--rows", type=int, default=600, help="held-out texts to measure accuracy on")
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs per input shape, at least 8")
    return parser.parse_args(arguments)


def prepare(model: Path | None, count: int) -> tuple[Path, Rows]:
    """The model's directory and held-out rows, half tweets and half product reviews.

    Raises:
        ReferenceUnavailable: The packages that carry the model or the texts can't be had.
    """
    started = time.perf_counter()
    if model is None:
        console.print("[bold]Preparing the classifier[/] (about two minutes the first time, then cached)")
        model = sentiment.classifier()
    rows = [*sentiment.held_out("tweets")[: count - count // 2], *sentiment.held_out("amazon")[: count // 2]]
    console.print(f"{model.name}, {len(rows)} held-out texts, ready in {time.perf_counter() - started:.1f} s")
    return model, rows


def compress_all(source: Path, rows: Rows, out: Path, pairs: int) -> list[Outcome]:
    """Compress with every configuration and measure each against the original."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    baseline = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
    return [compress(name, config, source, baseline, tokenizer, rows, out, pairs) for name, config in CONFIGS.items()]


def compress(
    name: str,
    config: hfc.QuantConfig,
    source: Path,
    baseline: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    out: Path,
    pairs: int,
) -> Outcome:
    """Quantize, save with proof, reload, measure, write the report."""
    console.print(f"\n[bold]{name}[/]")
    path = out / name
    model = quantize(source, config)
    with console.status("Saving, and proving by a reload in a clean process without hf_compress"):
        proof = hfc.save(model, path, tokenizer=tokenizer, overwrite=True)
    console.print(f"  saved to {path}; proof: {proof.level}, by {proof.reader}", soft_wrap=True)
    with console.status("Measuring against the original"):
        loaded = hfc.load(path)
        report = hfc.evaluate(
            loaded,
            baseline,
            rows,
            tokenizer=tokenizer,
            path=path,
            inputs=timing_inputs(baseline),
            pairs=pairs,
            max_length=MAX_LENGTH,
            batch_size=32,
        )
        write_report(report, out / "reports" / name)
    return Outcome(name, proof, report, stock_accuracy(path, tokenizer, rows, report))


def quantize(source: Path, config: hfc.QuantConfig) -> PreTrainedModel:
    """Quantize weight by weight while loading, behind a progress bar."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("quantizing", total=None)
        return hfc.quantize(
            source, config, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )


def timing_inputs(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Random token ids of the shapes in `SHAPES`, cut to what the model takes."""
    longest, words = model.config.max_position_embeddings, model.config.vocab_size
    shapes = dict.fromkeys((rows, min(tokens, longest)) for rows, tokens in SHAPES)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, words, shape, generator=generator) for shape in shapes]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def stock_accuracy(path: Path, tokenizer: PreTrainedTokenizerBase, rows: Rows, report: hfc.Report) -> float:
    """Accuracy of the checkpoint as plain `from_pretrained` loads it, which must be what we measured.

    Raises:
        RuntimeError: It is not.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
        share = sentiment.accuracy(stock, tokenizer, rows)
    ours = accuracy(report)[1]
    if abs(share - ours) > STOCK_TOLERANCE:
        raise RuntimeError(f"{path}: stock transformers has accuracy {share:.3f}, hf_compress {ours:.3f}")
    return share


def accuracy(report: hfc.Report) -> tuple[float, float, float, float]:
    """Accuracy of the original and of the compressed model, and the interval of their difference."""
    quality = report.quality
    if quality is None or quality.result.kind != "classification":
        raise TypeError("the demo's model is a classifier")
    found = quality.result
    return found.baseline_accuracy, found.candidate_accuracy, found.difference_low, found.difference_high


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row for the original and one for each configuration."""
    first = outcomes[0].report
    shown = Table(title=f"{first.model}: {first.architecture}", title_justify="left", show_lines=True)
    headings = ("", "disk MB", "smaller", "resident MB\nhere | stock", "accuracy\n95 % of Δ", "speed-up\n99 %")
    for heading in (*headings, "kernel", "proof"):
        shown.add_column(heading, no_wrap=True)
    size = first.size
    before = f"{accuracy(first)[0]:.1%}"
    shown.add_row("fp32", mb(size.baseline_disk_weights), "1 ×", mb(size.baseline_resident), before, "1 ×", "", "")
    for outcome in outcomes:
        shown.add_row(*cells(outcome))
    return shown


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One row of the table."""
    report, size = outcome.report, outcome.report.size
    _, share, low, high = accuracy(report)
    disk = 0 if size.disk is None else size.disk.weights
    return (
        outcome.name,
        mb(disk),
        f"{size.baseline_disk_weights / disk:.2f} ×",
        f"{mb(size.resident)} | {mb(size.stock_resident_after)}",
        f"{share:.1%}\n{100 * low:+.1f} to {100 * high:+.1f}",
        "\n".join(speed(name, one) for name, one in (report.latency or {}).items()),
        "\n".join(f"{count} × {kernel}" for kernel, count in report.kernels.items()),
        outcome.proof.level,
    )


def mb(count: int | None) -> str:
    """Bytes in megabytes."""
    return "–" if count is None else f"{count / 1e6:.1f}"


def speed(name: str, timing: LatencyComparison) -> str:
    """The speed-up on one input shape with its interval, loud where it is a loss."""
    shape = name.removeprefix("input_ids ")
    interval = f"({timing.speedup_low:.2f} to {timing.speedup_high:.2f})"
    return f"{shape}: {'SLOWER ' if timing.verdict == 'slower' else ''}{timing.speedup:.2f} {interval}"


def write_summary(outcomes: Sequence[Outcome], out: Path) -> Path:
    """Write `summary.json` and `summary.md`; returns the path of the latter."""
    facts = {
        one.name: {"stock_accuracy": one.stock_accuracy, "report": one.report.model_dump(mode="json")}
        for one in outcomes
    }
    (out / "summary.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    headings = ("", "disk MB", "smaller", "resident MB, here | stock", "accuracy, Δ", "speed-up", "kernel", "proof")
    first = outcomes[0].report
    plain = (mb(first.size.baseline_disk_weights), "1 ×", mb(first.size.baseline_resident))
    lines = [headings, ("---",) * len(headings), ("fp32", *plain, f"{accuracy(first)[0]:.1%}", "1 ×", "", "")]
    lines += [cells(one) for one in outcomes]
    text = "\n".join(f"| {' | '.join(cell.replace(' | ', ' / ') for cell in line)} |" for line in map(flat, lines))
    links = "\n".join(f"- [{one.name}](reports/{one.name}/report.md)" for one in outcomes)
    title = f"# {first.model}, compressed\n\nMeasured on {first.environment.processor}, "
    path = out / "summary.md"
    path.write_text(f"{title}{first.environment.torch_threads} threads.\n\n{text}\n\n{links}\n", encoding="utf-8")
    return path


def flat(cells_of_row: Sequence[str]) -> list[str]:
    """Cells whose lines are joined for Markdown."""
    return [cell.replace("\n", "<br>") for cell in cells_of_row]


if __name__ == "__main__":
    sys.exit(main())
