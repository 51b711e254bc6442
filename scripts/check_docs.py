"""Fails when a public name lacks a docstring, or a public name or command is missing from the docs.

Public names are those of `hf_compress.__all__`, commands those of the `hf-compress` program. A mention counts
in backticks or in a code block of README.md or of a page in docs/.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^[ \t]*```.*?^[ \t]*```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`[^`\n]+`")


def code_in_docs() -> str:
    """Returns everything that README.md and docs/ show as code."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found: list[str] = []
    for page in pages:
        if page.is_file():
            text = page.read_text(encoding="utf-8")
            found += FENCED.findall(text)
            found += INLINE.findall(FENCED.sub("", text))
    return "\n".join(found)


def missing_names(code: str) -> Iterator[str]:
    """Yields a complaint for each public name without a docstring or a mention in `code`."""
    package = importlib.import_module("hf_compress")
    for name in sorted(package.__all__):
        value = getattr(package, name, None)
        if value is None:
            yield f"hf_compress.{name}: in __all__ but not importable"
            continue
        documented = inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)
        if documented and not (value.__doc__ or "").strip():
            yield f"hf_compress.{name}: no docstring"
        if not name.startswith("__") and not re.search(rf"\b{re.escape(name)}\b", code):
            yield f"hf_compress.{name}: in no code of README.md or docs/*.md"


def missing_commands(code: str) -> Iterator[str]:
    """Yields a complaint for each command without a help text or a mention in `code`."""
    if importlib.util.find_spec("hf_compress.cli") is None:
        return
    typer_main = importlib.import_module("typer.main")
    group = typer_main.get_command(importlib.import_module("hf_compress.cli.main").app)
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if command.hidden:
            continue
        if not (command.help or "").strip():
            yield f"hf-compress {name}: no help text"
        if not re.search(rf"\bhf-compress\s+{re.escape(name)}\b", code):
            yield f"hf-compress {name}: in no code of README.md or docs/*.md"


def main() -> int:
    """Prints every complaint and returns the exit status."""
    sys.path.insert(0, str(ROOT))
    code = code_in_docs()
    complaints = [*missing_names(code), *missing_commands(code)]
    print("\n".join(complaints) or "Docs: every public name and command is described.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
