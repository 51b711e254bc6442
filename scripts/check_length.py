"""Fails on a function over 60 lines or a file over 500 lines in hf_compress/."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FUNCTION = 60
MAX_FILE = 500
ROOT = Path(__file__).resolve().parent.parent


def too_long(path: Path) -> Iterator[str]:
    """Yields one line `path:line: complaint` for each thing in `path` that is too long."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    lines = len(text.splitlines())
    if lines > MAX_FILE:
        yield f"{name}:1: file has {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(ast.parse(text, filename=str(path))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION:
            yield f"{name}:{node.lineno}: `{node.name}` has {length} lines, at most {MAX_FUNCTION}"


def main() -> int:
    """Prints every complaint and returns the exit status."""
    complaints = [line for path in sorted((ROOT / "hf_compress").rglob("*.py")) for line in too_long(path)]
    print("\n".join(complaints) or "Lengths: fine.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
