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
    """The Markdown between the markers."""
    demo: dict[str, Any] = json.loads(DEMO.read_text(encoding="utf-8"))
    first = next(iter(demo.values()))["report"]
    size, here = first["size"], first["environment"]
    base = first["quality"]["result"]
    about = (
        f"`make demo`: MiniLM (22.7 M) fine-tuned into a sentiment classifier, {base['examples']} held-out tweets and "
        f"product reviews, {here['processor']}, {here['torch_threads']} threads. Speed-up over float32 eager with its "
        "99 % interval."
    )
    lines = [
        about,
        "",
        "| configuration | disk | resident | accuracy | 1 × 128 tokens | 8 × 128 tokens | proof |",
        "|---|---|---|---|---|---|---|",
        f"| float32 | {mb(size['baseline_disk_weights'])} | {mb(size['baseline_resident'])} | "
        f"{base['baseline_accuracy']:.1%} | 1 × | 1 × | |",
    ]
    return "\n".join([*lines, *(row(name, one["report"]) for name, one in demo.items())])


def row(name: str, report: dict[str, Any]) -> str:
    """One configuration."""
    size, accuracy = report["size"], report["quality"]["result"]["candidate_accuracy"]
    speeds = [speed(report["latency"], shape) for shape in ("1×128", "8×128")]
    cells = [NAMES[name], mb(size["disk"]["weights"]), mb(size["resident"]), f"{accuracy:.1%}", *speeds]
    return f"| {' | '.join([*cells, report['proof']['level']])} |"


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
