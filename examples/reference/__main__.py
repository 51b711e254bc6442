"""Prepare all reference models and data: `python -m examples.reference`."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.reference import digits, lstm, sentiment
from examples.reference.cache import cache_root, folder_size
from examples.reference.packages import MINILM, SMOLLM2, VADER, ReferenceUnavailable, fetch
from examples.reference.smollm2 import NAME, ROTATED_NAME, off_grid_smollm2, plain_smollm2

STEPS: tuple[tuple[str, Callable[[], Path]], ...] = (
    (str(MINILM), lambda: fetch(MINILM)),
    (str(VADER), lambda: fetch(VADER)),
    (str(SMOLLM2), lambda: fetch(SMOLLM2)),
    (NAME, plain_smollm2),
    (ROTATED_NAME, off_grid_smollm2),
    ("sentiment classifier", sentiment.classifier),
    ("LSTM classifier", lstm.classifier),
    ("digits classifier", digits.classifier),
)


def main() -> int:
    """Prepare everything and print one table.

    Returns:
        The exit status: 1 where something is not available.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepared = [_prepare(name, get) for name, get in STEPS]
    print(f"\n{cache_root()}")
    print(f"{'what':<28}{'size':>10}{'time':>10}  note")
    for _, line in prepared:
        print(line)
    return 0 if all(available for available, _ in prepared) else 1


def _prepare(name: str, get: Callable[[], Path]) -> tuple[bool, str]:
    started = time.perf_counter()
    try:
        folder = get()
    except ReferenceUnavailable as error:
        return False, f"{name:<28}{'-':>10}{'-':>10}  {error}"
    seconds = time.perf_counter() - started
    return True, f"{name:<28}{folder_size(folder) / 1e6:>7.1f} MB{seconds:>8.1f} s  {_note(folder)}"


def _note(folder: Path) -> str:
    record_file = folder / "reference.json"
    if not record_file.is_file():
        return ""
    record = json.loads(record_file.read_text(encoding="utf-8"))
    if "held_out_accuracy" in record:
        shares = ", ".join(f"{domain} {share:.1%}" for domain, share in record["held_out_accuracy"].items())
        return f"held-out accuracy: {shares}; trained in {record['training_seconds']:.0f} s"
    if record.get("rotated"):
        return f"logits changed by {record['logit_change']:.1e} (relative)"
    return "weights lie on an INT4 grid"


if __name__ == "__main__":
    sys.exit(main())
