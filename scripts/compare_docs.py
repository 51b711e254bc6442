"""Writes the measured part of docs/compare.md and its picture from the committed comparison.

python scripts/compare_docs.py            # rewrite docs/compare.md and docs/images/compare.png
python scripts/compare_docs.py --check    # fail if they do not show benchmarks/comparison.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from hf_compress.evaluation.comparison import Comparison, panels
from hf_compress.evaluation.comparison_files import fronts, markdown_table, read_comparison, title, write_picture
from hf_compress.evaluation.plots import DRAWN_FROM, digest

ROOT = Path(__file__).resolve().parent.parent
COMPARISON = ROOT / "benchmarks" / "comparison.json"
PAGE = ROOT / "docs" / "compare.md"
PICTURE = ROOT / "docs" / "images" / "compare.png"
BEGIN = "<!-- measured: made by scripts/compare_docs.py from benchmarks/comparison.json -->"
END = "<!-- end -->"
AGAIN = "run python scripts/compare_docs.py\n"


def main() -> int:
    """Rewrite or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    found = read_comparison(COMPARISON)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    wanted = f"{before}{BEGIN}\n{measured(found)}\n{END}{rest.partition(END)[2]}"
    if not checking:
        PAGE.write_text(wanted, encoding="utf-8")
        PICTURE.parent.mkdir(exist_ok=True)
        write_picture(found, PICTURE)
    elif wanted != text:
        sys.stderr.write(f"docs/compare.md does not show benchmarks/comparison.json: {AGAIN}")
        return 1
    elif drawn_from(PICTURE) != digest(panels(found), title(found)):
        sys.stderr.write(f"docs/images/compare.png does not show benchmarks/comparison.json: {AGAIN}")
        return 1
    return 0


def measured(found: Comparison) -> str:
    """The Markdown between the markers."""
    here = found.environment
    versions = ", ".join(f"{name} {version}" for name, version in here.packages.items() if version)
    notes = "".join(f"- {note}\n" for note in found.notes)
    sentences = "\n".join(f"- {one}" for one in fronts(found))
    return (
        f"`{found.model}` on {here.processor}, {here.torch_threads} threads; {versions}.\n\n{notes}\n"
        f"{markdown_table(found)}\n\n![Pareto fronts](images/compare.png)\n\n{sentences}"
    )


def drawn_from(picture: Path) -> str | None:
    """The digest of what a picture shows; None if there is no picture, or it doesn't say."""
    if not picture.is_file():
        return None
    with Image.open(picture) as image:
        text = image.info.get(DRAWN_FROM)
    return text if isinstance(text, str) else None


if __name__ == "__main__":
    sys.exit(main())
