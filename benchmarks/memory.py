"""Loading a model in a fresh process, timed inside and its anonymous memory read from outside.

Anonymous memory (`Anonymous:` of /proc/PID/smaps_rollup) is what a process can't give back: mapped files of
weights don't count, since the system drops their pages when it needs to.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

INTERVAL_S = 0.005


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no line Anonymous")


def load_once(path: Path, config: dict[str, Any] | None, sample: bool) -> dict[str, float]:
    """Load a model in a fresh process that has done its imports.

    Args:
        path: Directory of a causal language model.
        config: Fields of `RTNQuantConfig`; None loads the model as it is.
        sample: Whether to sample memory every 5 ms while loading. It slows the loading down a little, so the
            seconds of such a round are not used.

    Returns:
        `seconds`, `cpu_seconds` of all threads, and growth over the memory after the imports in bytes: `final`,
        and with `sample` `peak`.
    """
    command = [sys.executable, __file__, str(path), json.dumps(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the child has no pipes")
        _line(child.stdout)
        before = peak = anonymous_bytes(child.pid)
        print("go", file=child.stdin, flush=True)
        if sample:
            peak = _peak_until_answer(child, before)
        told = _line(child.stdout)
        final = anonymous_bytes(child.pid)
        print("end", file=child.stdin, flush=True)
    growth = {"final": final - before, "peak": max(peak, final) - before}
    return {**told, **(growth if sample else {"final": growth["final"]})}


def _line(stream: IO[str]) -> dict[str, Any]:
    """The child's next message; other lines are progress of libraries."""
    for text in stream:
        if text.startswith("{"):
            message: dict[str, Any] = json.loads(text)
            return message
    raise RuntimeError("the child ended without an answer; its error is above")


def _peak_until_answer(child: subprocess.Popen[str], before: int) -> int:
    """The most memory seen until the child has loaded; it stops growing then, and waits."""
    peak = before
    while not select.select([child.stdout], [], [], INTERVAL_S)[0]:
        peak = max(peak, anonymous_bytes(child.pid))
    return peak


def _child(path: str, config: dict[str, Any] | None) -> None:
    """Import, say so, wait, load, say how long it took, wait."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    import hf_compress as hfc

    logging.disable_progress_bar()
    # The model's own module is imported on first use: it belongs to the imports.
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(path))]
    request = None if config is None else hfc.RTNQuantConfig(**config)
    if request is not None:
        hfc.plan(path, request)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    started, used = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=request)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)
    sys.stdin.readline()
    del model


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]))
