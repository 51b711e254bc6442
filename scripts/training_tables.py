"""Writes the measured tables of training into the pages that ask for one by a marker.

python scripts/training_tables.py            # rewrite docs/*.md
python scripts/training_tables.py --check    # fail if one does not show the committed results

A page asks with two lines, `<!-- training: NAME -->` and `<!-- end training -->`; NAME is a key of `TABLES`. Between
them is nothing until there are results of `benchmarks/training.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- training: (\S+) -->\n).*?(<!-- end training -->)", re.DOTALL)
ROUNDED = {
    "rtn W4 g64": "4 bits, groups of 64, rounded",
    "rtn W4 g128": "4 bits, groups of 128, rounded",
    "rtn W3 g64": "3 bits, groups of 64, rounded",
    "rtn W3 g128": "3 bits, groups of 128, rounded",
    "rtn W2 g64": "2 bits, groups of 64, rounded",
    "rtn W8A8 dynamic": "INT8 weights and inputs, ranges per token, rounded",
}
TRAINED = {
    "qat W4 g64": "4 bits, groups of 64, trained",
    "qat W4 g128": "4 bits, groups of 128, trained",
    "qat W3 g64": "3 bits, groups of 64, trained",
    "qat W3 g128": "3 bits, groups of 128, trained",
    "qat W2 g64": "2 bits, groups of 64, trained",
    "qat W8A8": "INT8 weights and inputs, fixed ranges, trained",
}
PRUNED = {
    "magnitude 50": "magnitude, 50 % zeros",
    "magnitude 85": "magnitude, 85 % zeros",
    "movement 85": "movement, 85 % zeros",
    "control": "no pruning, trained alike with labels",
}
LANGUAGE = {"lm rtn/0": "rounded", "lm gptq/0": "GPTQ", "lm qat/0": "trained"}
SHAPES = {"classifier": "the classifier", "lm": "SmolLM2-135M"}
CLASSIFIER = (
    "The sentiment classifier (MiniLM), 5,217 training rows; accuracy on {rows:,} held-out tweets and product "
    "reviews, mean (smallest to largest) over seeds 0–2, or of one; divergence is KL(float32 ‖ model) per row. "
    "{processor}."
)


def main() -> int:
    """Rewrite or check all pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        wanted = MARKED.sub(filled, text)
        if wanted != text:
            stale.append(page.relative_to(ROOT))
            if not checking:
                page.write_text(wanted, encoding="utf-8")
    if checking and stale:
        names = ", ".join(map(str, stale))
        sys.stderr.write(f"{names}: not the committed results; run python scripts/training_tables.py\n")
        return 1
    return 0


def pages() -> Iterator[Path]:
    """Everything in docs/ that has a marker."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        if MARKED.search(page.read_text(encoding="utf-8")):
            yield page


def filled(place: re.Match[str]) -> str:
    """A marked place with its table, or empty where nothing was measured yet."""
    start, name, end = place.groups()
    return f"{start}{table(name)}\n{end}" if measured() else f"{start}{end}"


def measured() -> bool:
    """Whether there are committed results."""
    return (RESULTS / "training.json").is_file()


def table(name: str) -> str:
    """The Markdown of a table.

    Raises:
        SystemExit: There is no table of that name.
    """
    if name not in TABLES:
        raise SystemExit(f"no table {name!r}; known: {', '.join(TABLES)}")
    return TABLES[name](json.loads((RESULTS / "training.json").read_text(encoding="utf-8")))


def _qat(result: Mapping[str, Any]) -> str:
    return f"{_classifier(result, {**ROUNDED, **TRAINED})}\n\n{_language(result)}"


def _pruning(result: Mapping[str, Any]) -> str:
    return _classifier(result, PRUNED, zeros=True)


def _distillation(result: Mapping[str, Any]) -> str:
    return _classifier(result, {"student": "3 of 6 layers, taught"})


def _classifier(result: Mapping[str, Any], kinds: Mapping[str, str], zeros: bool = False) -> str:
    """The classifier's rows, float32 first."""
    cells, summary = result["measurements"]["cells"], result["measurements"]["summary"]
    processor = result["machine"]["environment"]["processor"]
    rows = [("float32", f"{cells['fp32']['candidate_accuracy']:.1%}", "", "", "")]
    for kind, label in kinds.items():
        if kind in summary:
            found = summary[kind]
            share, minutes = f"{found['zeros']['mean']:.0%}", f"{found['seconds']['mean'] / 60:.1f}"
            rows.append((label, _accuracy(found), _small(found["kl"]["mean"]), minutes, share))
        elif kind in cells:
            found = cells[kind]
            rows.append((label, f"{found['candidate_accuracy']:.1%}", _small(found["kl"]), "", ""))
    heading = ("", "accuracy", "divergence", "minutes", "zeros")
    columns = len(heading) if zeros else len(heading) - 1
    shown = CLASSIFIER.format(rows=cells["fp32"]["examples"], processor=processor)
    return f"{shown}\n\n{_markdown(heading[:columns], [row[:columns] for row in rows])}"


def _accuracy(found: Mapping[str, Any]) -> str:
    one = found["candidate_accuracy"]
    return f"{one['mean']:.1%} ({one['min']:.1%} to {one['max']:.1%})"


def _small(value: float) -> str:
    return f"{value:.4f}"


def _language(result: Mapping[str, Any]) -> str:
    """SmolLM2's rows."""
    cells, settings = result["measurements"]["cells"], result["settings"]
    known = {key: cells[key] for key in LANGUAGE if key in cells}
    original = next(iter(known.values()))["baseline_perplexity"]
    rows = [("float32", f"{original:.2f}", "", "")]
    for key, one in known.items():
        change = f"{one['ratio'] - 1:+.0%} ({one['ratio_low'] - 1:+.0%} to {one['ratio_high'] - 1:+.0%})"
        minutes = f"{one['seconds'] / 60:.1f}"
        rows.append((f"3 bits, groups of 64, {LANGUAGE[key]}", f"{one['candidate_perplexity']:.2f}", change, minutes))
    shown = (
        f"{settings['language model']}; {settings['language model, test']}. Trained on "
        f"{settings['language model, training']}; GPTQ saw {settings['language model, GPTQ']}."
    )
    return f"{shown}\n\n{_markdown(('', 'perplexity', 'change, 95 %', 'minutes'), rows)}"


def _overhead(result: Mapping[str, Any]) -> str:
    """What a step costs, by kind."""
    rows = []
    for shape, label in SHAPES.items():
        found = result["measurements"]["cells"].get(f"overhead {shape}")
        if found is None:
            continue
        size = " × ".join(map(str, found["shape"]))
        for kind, ratio in found["ratios"].items():
            middle = found["mean_ratios"].get(kind, ratio["median"])
            over = "a plain step and the teacher's forward" if kind.startswith("distillation") else "a plain step"
            shown = f"{middle:.2f} ({ratio['low_quartile']:.2f} to {ratio['high_quartile']:.2f})"
            rows.append((f"{label}, {size} tokens", kind, shown, over))
    shown = "Time of an optimizer step over another's, a step each in turn in one process: median and quartiles."
    return f"{shown}\n\n{_markdown(('', 'step', 'times', 'over'), rows)}"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "qat": _qat,
    "pruning": _pruning,
    "distillation": _distillation,
    "overhead": _overhead,
}

if __name__ == "__main__":
    sys.exit(main())
