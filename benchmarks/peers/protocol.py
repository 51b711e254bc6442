"""The conversation of `ptq_peers` with the process of one tool. Runs in the tool's environment: torch at most.

A process imports, says `ready` with versions, waits for `go`, loads and quantizes, says what it took, waits for
`save`, saves, says so, and ends. Whoever started it reads its memory and its processor seconds from outside.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """What is to be quantized, and how.

    Args:
        model: Directory of the model.
        ids: File of the calibration rows: a tensor of rows × tokens, int64, saved by torch.
        out: Directory to write, which does not exist.
        method: `rtn`, `gptq`, `awq` or `autoround`; ours also `int8_static`, which needs no more.
        bits: Bits per weight.
        group_size: Consecutive inputs that share a scale; grids are symmetric, the head is kept.
        iterations: Of learned rounding.
        seed: Of the tool's own random draws.
    """

    model: str
    ids: str
    out: str
    method: str
    bits: int
    group_size: int
    iterations: int
    seed: int


Save = Callable[[], None]
Quantize = Callable[[], Save]
"""Quantizes the loaded model; returns what saves it."""


def serve(packages: tuple[str, ...], load: Callable[[Job], Quantize]) -> None:
    """Do one job, see the module.

    Args:
        packages: Whose versions are told.
        load: Loads the model and prepares the data; returns what quantizes it.
    """
    job = Job(**json.loads(sys.argv[1]))
    _say({"ready": {name: importlib.metadata.version(name) for name in packages}})
    _wait()
    started = time.perf_counter()
    quantize = load(job)
    loaded = time.perf_counter()
    save = quantize()
    _say({"load_s": loaded - started, "quantize_s": time.perf_counter() - loaded})
    _wait()
    started = time.perf_counter()
    save()
    _say({"save_s": time.perf_counter() - started})
    _wait()


def _say(message: dict[str, Any]) -> None:
    """A line into the pipe whose number is the second argument; libraries write to stdout as they like."""
    os.write(int(sys.argv[2]), f"{json.dumps(message)}\n".encode())


def _wait() -> None:
    """For the other side's next line."""
    if not sys.stdin.readline():
        raise SystemExit("the other side has gone")
