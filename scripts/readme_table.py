"""Writes README's measured table from the committed result of the demo.

python scripts/readme_table.py            # rewrite README.md
python scripts/readme_table.py --check    # fail if README.md does not match
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "benchmarks" / "demo.json"
"""`summary.json` of a run of the demo on an idle machine."""
BEGIN = "<!-- measured: made by scripts/readme_table.py from benchmarks/demo.json -->"
END = "<!-- end -->"
NAMES = {
    "rtn-int8": '`RTNQuantConfig(bits=8, group_size="channel")`',
    "rtn-int4": "`RTNQuantConfig(bits=4, group_size=64)`",
    "rtn-int4-emb8": '`RTNQuantConfig(bits=4, group_size=64, embeddings="int8")`',
    "int8-dynamic": "`Int8DynamicQuantConfig()`",
    "lm-rtn-int4": "`RTNQuantConfig(bits=4, group_size=64)`",
    "lm-hqq-int4": "`HQQQuantConfig(bits=4, group_size=64)`",
}


def main() -> int:
    """Rewrite or check the README; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    wanted = f"{before}{BEGIN}\n{measured()}\n{END}{after}"
    if not checking:
        readme.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        sys.stderr.write("README.md does not show benchmarks/demo.json: run python scripts/readme_table.py\n")
        return 1
    return 0


def measured() -> str:
    """The Markdown between the markers: a table for the classifier, and one for the language model."""
    demo: dict[str, Any] = json.loads(DEMO.read_text(encoding="utf-8"))
    reports: dict[str, dict[str, dict[str, Any]]] = {"classification": {}, "causal-lm": {}}
    for name, one in demo.items():
        reports[one["report"]["quality"]["task"]][name] = one["report"]
    tables = ((classifier_table, reports["classification"]), (language_table, reports["causal-lm"]))
    return "\n\n".join("\n".join(table(found)) for table, found in tables if found)


def classifier_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The classifier before and by each configuration."""
    first = next(iter(reports.values()))
    size, here, base = first["size"], first["environment"], first["quality"]["result"]
    about = (
        f"`make demo`: MiniLM (22.7 M) fine-tuned into a sentiment classifier, {base['examples']} held-out tweets and "
        f"product reviews, {here['processor']}, {here['torch_threads']} threads. Speed-up over float32 eager with its "
        "99 % interval."
    )
    return [
        about,
        "",
        "| configuration | disk | resident | accuracy | 1 × 128 tokens | 8 × 128 tokens | proof |",
        "|---|---|---|---|---|---|---|",
        f"| float32 | {mb(size['baseline_disk_weights'])} | {mb(size['baseline_resident'])} | "
        f"{base['baseline_accuracy']:.1%} | 1 × | 1 × | |",
        *(row(name, report, accuracy(report), ("1×128", "8×128")) for name, report in reports.items()),
    ]


def language_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The language model before and by each configuration."""
    first = next(iter(reports.values()))
    size, base = first["size"], first["quality"]["result"]
    about = (
        "SmolLM2-135M, rotated (the same function, its weights off the INT4 grid that they are packaged on), "
        f"{base['windows']} windows of {first['quality']['max_length']} tokens of Python's language reference. Change "
        "of the perplexity with its 95 % interval."
    )
    return [
        about,
        "",
        "| configuration | disk | resident | perplexity | 1 × 128 tokens | proof |",
        "|---|---|---|---|---|---|",
        f"| float32 | {mb(size['baseline_disk_weights'])} | {mb(size['baseline_resident'])} | "
        f"{base['baseline_perplexity']:.2f} | 1 × | |",
        *(row(name, report, perplexity(report), ("1×128",)) for name, report in reports.items()),
    ]


def row(name: str, report: dict[str, Any], quality: str, shapes: tuple[str, ...]) -> str:
    """One configuration."""
    size = report["size"]
    speeds = [speed(report["latency"], shape) for shape in shapes]
    cells = [NAMES[name], mb(size["disk"]["weights"]), mb(size["resident"]), quality, *speeds]
    return f"| {' | '.join([*cells, report['proof']['level']])} |"


def accuracy(report: dict[str, Any]) -> str:
    """Of the compressed model."""
    return f"{report['quality']['result']['candidate_accuracy']:.1%}"


def perplexity(report: dict[str, Any]) -> str:
    """Of the compressed model, and its change."""
    found = report["quality"]["result"]
    change, low, high = (100 * (found[key] - 1) for key in ("ratio", "ratio_low", "ratio_high"))
    return f"{found['candidate_perplexity']:.2f}, {change:+.1f} % ({low:+.1f} to {high:+.1f})"


def speed(latency: dict[str, Any], shape: str) -> str:
    """The speed-up at one shape."""
    timing = next(value for key, value in latency.items() if key.endswith(f" {shape}"))
    text = f"{timing['speedup']:.2f} × ({timing['speedup_low']:.2f}–{timing['speedup_high']:.2f})"
    return f"SLOWER {text}" if timing["verdict"] == "slower" else text


def mb(count: int) -> str:
    """Decimal megabytes."""
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
