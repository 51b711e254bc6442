"""Writes the measured tables of calibrated methods into the pages that ask for one by a marker.

python scripts/ptq_tables.py            # rewrite README.md and docs/*.md
python scripts/ptq_tables.py --check    # fail if one does not show the committed results

A page asks with two lines, `<!-- ptq: NAME -->` and `<!-- end ptq -->`; NAME is a key of `TABLES`. Between them is
nothing until there are results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- ptq: (\S+) -->\n).*?(<!-- end ptq -->)", re.DOTALL)
NAMES = {"rtn": "rounding to nearest", "gptq": "GPTQ", "awq": "AWQ", "autoround": "learned rounding"}
CLASSIFIER_ROWS = {
    "gptq": ("rtn", "gptq"),
    "awq": ("rtn", "awq"),
    "autoround": ("rtn", "autoround"),
    "int8-static": ("int8_static", "int8_dynamic"),
}
"""What the first word of a configuration's name must be to be shown on a page."""


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
        sys.stderr.write(
            f"{', '.join(map(str, stale))}: not the committed results; run python scripts/ptq_tables.py\n"
        )
        return 1
    return 0


def pages() -> Iterator[Path]:
    """README and everything in docs/ that has a marker."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if MARKED.search(page.read_text(encoding="utf-8")):
            yield page


def filled(place: re.Match[str]) -> str:
    """A marked place with its table, or empty where nothing was measured yet."""
    start, name, end = place.groups()
    return f"{start}{table(name)}\n{end}" if measured(name) else f"{start}{end}"


def measured(name: str) -> bool:
    """Whether the results that a table shows are committed."""
    source = "ptq_peers" if name.startswith("peers") else "ptq"
    return (RESULTS / f"{source}.json").is_file()


def table(name: str) -> str:
    """The Markdown of a table.

    Raises:
        SystemExit: There is no table of that name.
    """
    if name not in TABLES:
        raise SystemExit(f"no table {name!r}; known: {', '.join(TABLES)}")
    return TABLES[name]()


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def peers_table(methods: tuple[str, ...]) -> str:
    """Tools side by side on the language model: perplexity, time and memory."""
    found = result("ptq_peers")
    here, settings, cells = found["machine"]["environment"], found["settings"], found["measurements"]
    lines = [
        f"{settings['model']}, {settings['grid']}; calibrated on {settings['calibration']}; perplexity on "
        f"{settings['test']}, float32 {cells['cells']['fp32']['perplexity']:.2f}. Means of the draws, with the lowest "
        f"and highest perplexity; {here['processor']}, {settings['threads']} threads. Time is without saving; memory "
        "is the growth of the process over its imports.",
        "",
        "| tool | method | bits | perplexity | quantize | processor time | peak resident | peak anonymous |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, one in cells["summary"].items():
        tool, _, rest = key.partition("/")
        method, _, bits = rest.partition("/")
        if method in methods and bits.isdecimal():
            lines.append(peer_row(tool, method, bits, one, cells["cells"]))
    return "\n".join(lines)


def peer_row(tool: str, method: str, bits: str, one: dict[str, Any], cells: dict[str, Any]) -> str:
    """A tool's method, with its version and what had to be changed for it to run."""
    cell = next(cell for key, cell in cells.items() if key.startswith(f"{tool}/{method}/{bits}/"))
    package = {"llm-compressor": "llmcompressor"}.get(tool, tool)
    version = cell["versions"].get(package, "")
    patched = ", patched" if "patched" in cell else ""
    each = one["perplexities"]
    spread = f" ({min(each):.2f}–{max(each):.2f})" if len(each) > 1 else ""
    name = f"**{tool}**" if tool == "hf_compress" else f"{tool} {version}".rstrip()
    seconds = f"{one['quantize_s']:.0f} s | {one['cpu_s']:.0f} s"
    return (
        f"| {name}{patched} | {NAMES[method]} | {bits} | {one['perplexity']:.2f}{spread} | {seconds} | "
        f"{mib(one['peak_rss_growth'])} | {mib(one['peak_anonymous_growth'])} |"
    )


def classifier_table(page: str) -> str:
    """Accuracies of both classifiers by configuration, with the change and its interval."""
    found = result("ptq")
    shown = CLASSIFIER_ROWS[page]
    about = (
        f"The sentiment classifier (MiniLM), calibrated on {found['settings']['text']}; change of the accuracy in "
        f"points with its 95 % interval. {found['machine']['environment']['processor']}."
    )
    lines = [about, "", "| configuration | tweets | product reviews | both |", "|---|---|---|---|"]
    for name, parts in found["measurements"]["sentiment"].items():
        if name.split()[0].rstrip(",") in shown:
            lines.append(f"| {name} | {' | '.join(change(parts[domain]) for domain in ('tweets', 'amazon', 'all'))} |")
    if page == "int8-static":
        lines += [
            "",
            "The same on a small ResNet for handwritten digits:",
            "",
            "| configuration | digits |",
            "|---|---|",
        ]
        lines += [f"| {name} | {change(parts['all'])} |" for name, parts in found["measurements"]["digits"].items()]
    return "\n".join(lines)


def change(one: dict[str, Any]) -> str:
    """Accuracy, and its change with the interval in points."""
    points = [100 * one[key] for key in ("difference", "difference_low", "difference_high")]
    return f"{one['candidate_accuracy']:.1%}, {points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"


def mib(count: float) -> str:
    """Mebibytes."""
    return f"{count / 2**20:.0f} MiB"


TABLES: dict[str, Callable[[], str]] = {
    "peers": lambda: peers_table(("rtn", "gptq", "awq", "autoround")),
    "peers-gptq": lambda: peers_table(("rtn", "gptq")),
    "peers-awq": lambda: peers_table(("rtn", "awq")),
    "peers-autoround": lambda: peers_table(("rtn", "autoround")),
    **{f"classifier-{page}": lambda page=page: classifier_table(page) for page in CLASSIFIER_ROWS},
}


if __name__ == "__main__":
    sys.exit(main())
