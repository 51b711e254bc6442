"""Calibrated quantization beside its peers: the same model, calibration rows, grid and evaluator for all.

python -m benchmarks.ptq_peers                          # measure what is missing, cell by cell
python -m benchmarks.ptq_peers --only gptq --redo-busy  # again what was measured while other programs ran
python -m benchmarks.ptq_peers --summary                # ratios and bars from the cells that there are
python -m benchmarks.ptq_peers --out benchmarks/begun   # where cells wait until all are measured

A cell is a tool, a method, a number of bits and a draw of calibration rows. Peers run in environments of their own,
see `benchmarks.peers.environments`. The result is written after each cell, so the run can be stopped at any time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import JsonValue
from transformers import AutoTokenizer

from benchmarks.common import RESULTS, Bar, Machine, Result, show, write
from benchmarks.peers.cell import (
    AUTO_ROUND,
    GPTQMODEL,
    LLM_COMPRESSOR,
    OURS,
    Tool,
    ToolFailed,
    perplexity_of,
    run_cell,
)
from benchmarks.peers.protocol import Job
from benchmarks.peers.texts import calibration_ids, test_ids
from examples.reference.cache import cache_root
from examples.reference.packages import ReferenceUnavailable
from examples.reference.smollm2 import ROTATED_NAME, off_grid_smollm2
from hf_compress.evaluation.environment import environment
from hf_compress.evaluation.statistics import t_quantile

NAME = "ptq_peers"
GROUP_SIZE = 64
ROWS, LENGTH = 64, 512
TEST_ROWS = 40
DRAWS = (0, 1, 2)
ITERATIONS = 50
"""Of learned rounding, in both tools."""
THREADS = 2
ORIGINAL = "fp32"


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Args:
        tool: Which tool.
        method: `rtn`, `gptq`, `awq` or `autoround`.
        bits: Bits per weight.
        draw: Seed of the draw of calibration rows.
    """

    tool: Tool
    method: str
    bits: int
    draw: int

    @property
    def key(self) -> str:
        """Its name in the result."""
        return key(self.tool, self.method, self.bits, self.draw)


def key(tool: Tool, method: str, bits: int, draw: int) -> str:
    """Name of a cell."""
    return f"{tool.name}/{method}/{bits}/{draw}"


KINDS = (
    (OURS, "rtn", 4),
    (OURS, "gptq", 4),
    (LLM_COMPRESSOR, "gptq", 4),
    (GPTQMODEL, "gptq", 4),
    (OURS, "awq", 4),
    (OURS, "autoround", 4),
    (OURS, "autoround", 3),
    (OURS, "autoround", 2),
    (AUTO_ROUND, "autoround", 4),
    (AUTO_ROUND, "autoround", 3),
    (LLM_COMPRESSOR, "awq", 4),
)
"""Cheap ones first; the last takes as long as all others."""
MATRIX = tuple(
    Cell(*kind, draw)
    for slow in (False, True)
    for draw in DRAWS
    for kind in KINDS
    if (draw == 0 or kind[1] != "rtn") and slow == (kind[0] in (AUTO_ROUND,) or kind[:2] == (LLM_COMPRESSOR, "awq"))
)
"""Rounding to nearest has no draws."""

PEERS = {
    ("gptq", 4): (LLM_COMPRESSOR, GPTQMODEL),
    ("awq", 4): (LLM_COMPRESSOR,),
    ("autoround", 4): (AUTO_ROUND,),
    ("autoround", 3): (AUTO_ROUND,),
}


def label(method: str, bits: int) -> str:
    """How bars name a method."""
    names = {"gptq": "GPTQ", "awq": "AWQ", "autoround": f"AutoRound, {ITERATIONS} iterations"}
    return f"{names[method]}, W{bits} g{GROUP_SIZE}"


def _bar(method: str, bits: int, what: str, limit: float, unit: str = "times") -> Bar:
    return Bar(name=f"{label(method, bits)}: {what}", at="most", limit=limit, unit=unit)


WALL = "seconds to quantize, ours with loading / fastest peer without"
MEMORY = "growth of peak resident memory, ours / leanest peer"
ANONYMOUS = "growth of peak anonymous memory, ours / leanest peer"
QUALITY = "perplexity over the best peer's, upper end of the paired 95 % interval"
MEAN_QUALITY = "perplexity, ours / best peer, mean of draws"
BELOW_RTN = "perplexity, ours / rounding to nearest, the worst draw"
BARS = (
    _bar("gptq", 4, WALL, 0.7),
    _bar("gptq", 4, MEMORY, 0.8),
    _bar("gptq", 4, QUALITY, 1.0, "%"),
    _bar("awq", 4, WALL, 0.25),
    _bar("awq", 4, MEMORY, 0.3),
    _bar("awq", 4, MEAN_QUALITY, 0.95),
    _bar("awq", 4, BELOW_RTN, 0.999),
    *(_bar("autoround", bits, WALL, 0.9) for bits in (4, 3)),
    *(_bar("autoround", bits, QUALITY, 1.0, "%") for bits in (4, 3)),
)

Cells = dict[str, Any]


def main() -> int:
    """Measure what was asked for; returns 1 if a bar does not hold or a cell failed."""
    options = arguments()
    path: Path = (options.out or RESULTS) / f"{NAME}.json"
    wanted = [] if options.summary else list(chosen(read(path), options.only, options.redo_busy, options.redo))
    print(f"{len(wanted)} of {len(MATRIX)} cells to measure", flush=True)
    files = data() if wanted else {}
    if wanted and ORIGINAL not in read(path):
        original = perplexity_of(off_grid_smollm2(), None, False, files["test"], options.threads)
        add(path, {ORIGINAL: original}, machine_now(), options.threads)
    for number, cell in enumerate(wanted, 1):
        before = machine_now()
        told = measured(cell, files, options.threads)
        verdict = told.get("error") or f"perplexity {told['perplexity']:.2f}, {told['quantize']['wall_s']:.0f} s"
        print(f"[{number}/{len(wanted)}] {cell.key}: {verdict}", flush=True)
        add(path, {cell.key: told}, before, options.threads)
    made = add(path, {}, machine_now(), options.threads)
    show([made])
    missing = {bar.name for bar in BARS} - {bar.name for bar in made.bars}
    for name in sorted(missing):
        print(f"not measured: {name}")
    failed = [name for name, one in read(path).items() if "error" in one]
    return 0 if made.passed and not missing and not failed else 1


def read(path: Path) -> Cells:
    """The cells that were measured before."""
    return dict(Result.read(path).measurements["cells"]) if path.is_file() else {}  # type: ignore[arg-type]


def add(path: Path, cells: Cells, before: Machine, threads: int) -> Result:
    """Put cells into the file, whatever else has been added meanwhile, and return its content."""
    made = result({**read(path), **cells}, before, threads)
    write(made, path.parent)
    return made


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="part of TOOL/METHOD/BITS/DRAW; repeatable")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--redo-busy", action="store_true", help="measure again what other programs disturbed")
    parser.add_argument("--summary", action="store_true", help="measure nothing; write ratios and bars again")
    parser.add_argument("--threads", type=int, default=THREADS, help="of each tool")
    parser.add_argument("--out", type=Path, help="directory of the result, benchmarks/results by default")
    return parser.parse_args()


def chosen(cells: Cells, only: list[str] | None, redo_busy: bool, redo: bool) -> Iterable[Cell]:
    """Cells of the matrix that are wanted, and missing, failed, or to be measured again."""
    for cell in MATRIX:
        if only and not any(part in cell.key for part in only):
            continue
        known = cells.get(cell.key)
        if known is None or "error" in known or redo or (redo_busy and known["quantize"]["busy"]):
            yield cell


def data() -> dict[str, Path]:
    """Files of the test windows and of each draw, written once: every tool reads the same tensors.

    Raises:
        ReferenceUnavailable: The model or a text can't be had.
    """
    folder = cache_root() / f"ptq-peers-{ROWS}x{LENGTH}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": folder / "test.pt", **{str(draw): folder / f"calibration-{draw}.pt" for draw in DRAWS}}
    if not all(file.is_file() for file in files.values()):
        tokenizer = AutoTokenizer.from_pretrained(off_grid_smollm2())
        torch.save(test_ids(tokenizer, TEST_ROWS, LENGTH), files["test"])
        for draw, ids in zip(DRAWS, calibration_ids(tokenizer, ROWS, LENGTH, DRAWS), strict=True):
            torch.save(ids.clone(), files[str(draw)])
    return files


def measured(cell: Cell, files: Mapping[str, Path], threads: int) -> dict[str, Any]:
    """A cell's numbers, or its error."""
    job = Job(
        model=str(off_grid_smollm2()),
        ids=str(files[str(cell.draw)]),
        out="",
        method=cell.method,
        bits=cell.bits,
        group_size=GROUP_SIZE,
        iterations=ITERATIONS,
        seed=cell.draw,
    )
    date = datetime.now(UTC).replace(microsecond=0).isoformat()
    try:
        return {"date": date, "threads": threads, **run_cell(cell.tool, job, files["test"], threads)}
    except (ToolFailed, ReferenceUnavailable) as error:
        return {"date": date, "error": str(error)}


def machine_now() -> Machine:
    """The machine as it is before a cell."""
    busy = psutil.cpu_percent(interval=1)
    return Machine(
        environment=environment(),
        load_average_after=os.getloadavg(),
        busy_percent_before=busy,
        busy_percent_after=busy,
    )


def result(cells: Cells, machine: Machine, threads: int) -> Result:
    """Everything that is known so far, with the bars that can be judged."""
    table, values = summary(cells)
    seconds = sum(one["quantize"]["wall_s"] for one in cells.values() if "quantize" in one)
    return Result(
        name=NAME,
        smoke=False,
        date=datetime.now(UTC).replace(microsecond=0),
        seconds=round(seconds, 1),
        machine=machine.model_copy(update={"busy_percent_after": psutil.cpu_percent(interval=1)}),
        settings={
            "model": ROTATED_NAME,
            "grid": f"symmetric, groups of {GROUP_SIZE}, head kept",
            "calibration": f"{ROWS} windows of {LENGTH} tokens of the Brown corpus, {len(DRAWS)} draws",
            "test": f"{TEST_ROWS} windows of {LENGTH} tokens of the Debian Administrator's Handbook",
            "iterations": ITERATIONS,
            "threads": threads,
            "seconds": "without saving; ours with loading, which is part of the pass, peers without, see load_s",
            "memory": "growth over the process after its imports, loading included",
        },
        measurements={"summary": table, "cells": cells},
        bars=tuple(bar.judge(values[bar.name]) for bar in BARS if bar.name in values),
    )


def summary(cells: Cells) -> tuple[dict[str, JsonValue], dict[str, float]]:
    """Means and ratios over draws by method and bits, and the values of the bars that can be judged."""
    table: dict[str, JsonValue] = {}
    values: dict[str, float] = {}
    for tool, method, bits in KINDS:
        if found := drawn(cells, tool, method, bits):
            table[f"{tool.name}/{method}/{bits}"] = means(found)
    for (method, bits), peers in PEERS.items():
        ours = drawn(cells, OURS, method, bits)
        others = {peer.name: found for peer in peers if (found := drawn(cells, peer, method, bits))}
        if not ours or len(others) < len(peers):
            continue
        name = f"{label(method, bits)}: "
        best = min(others, key=lambda peer: mean_of(others[peer], perplexity))
        compared = ratio(ours, others[best])
        ratios = {
            WALL: mean_of(ours, our_seconds) / min(mean_of(found, seconds) for found in others.values()),
            MEMORY: over_leanest(ours, others.values(), "peak_rss_growth"),
            ANONYMOUS: over_leanest(ours, others.values(), "peak_anonymous_growth"),
            MEAN_QUALITY: compared["ratio"],
            **({QUALITY: 100 * (compared["high"] - 1)} if "high" in compared else {}),
        }
        if rtn := cells.get(key(OURS, "rtn", bits, 0)):
            ratios[BELOW_RTN] = max(perplexity(one) for one in ours.values()) / perplexity(rtn)
        values |= {name + what: number for what, number in ratios.items()}
        table[f"{method}/{bits}, ours / peers"] = {"best peer": best, "perplexity": dict(compared), **ratios}
    return table, values


def drawn(cells: Cells, tool: Tool, method: str, bits: int) -> dict[int, Any]:
    """Measured cells by draw."""
    found = {draw: cells.get(key(tool, method, bits, draw)) for draw in DRAWS}
    return {draw: cell for draw, cell in found.items() if cell is not None and "error" not in cell}


def means(found: Mapping[int, Any]) -> dict[str, JsonValue]:
    """What a table shows of a tool's method."""
    return {
        "draws": len(found),
        "perplexity": mean_of(found, perplexity),
        "perplexities": [perplexity(cell) for cell in found.values()],
        "quantize_s": mean_of(found, seconds),
        "load_s": mean_of(found, lambda cell: float(cell["quantize"]["load_s"])),
        "save_s": mean_of(found, lambda cell: float(cell["save"]["wall_s"])),
        "cpu_s": mean_of(found, lambda cell: float(cell["quantize"]["cpu_s"])),
        "peak_rss_growth": mean_of(found, lambda cell: float(cell["quantize"]["peak_rss_growth"])),
        "peak_anonymous_growth": mean_of(found, lambda cell: float(cell["quantize"]["peak_anonymous_growth"])),
        "busy": any(cell["quantize"]["busy"] for cell in found.values()),
    }


def mean_of(found: Mapping[int, Any], number: Callable[[Any], float]) -> float:
    """Mean over draws."""
    return statistics.fmean(number(cell) for cell in found.values())


def perplexity(cell: Mapping[str, Any]) -> float:
    """Of a cell."""
    return float(cell["perplexity"])


def seconds(cell: Mapping[str, Any]) -> float:
    """What a tool takes to quantize, without loading and saving."""
    return float(cell["quantize"]["quantize_s"])


def our_seconds(cell: Mapping[str, Any]) -> float:
    """What we take, with loading, which is part of the pass."""
    return float(cell["quantize"]["wall_s"])


def over_leanest(ours: Mapping[int, Any], others: Iterable[Mapping[int, Any]], what: str) -> float:
    """Our memory over the leanest peer's, means over draws."""
    return mean_of(ours, lambda cell: float(cell["quantize"][what])) / min(
        mean_of(found, lambda cell: float(cell["quantize"][what])) for found in others
    )


def ratio(new: Mapping[int, Any], old: Mapping[int, Any]) -> dict[str, float]:
    """Ratio of perplexities on the same draws, geometric mean, with its paired 95 % interval over draws.

    One draw has no interval.
    """
    draws = sorted(set(new) & set(old))
    logs = [math.log(perplexity(new[draw]) / perplexity(old[draw])) for draw in draws]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return {"ratio": math.exp(middle)}
    width = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(middle), "low": math.exp(middle - width), "high": math.exp(middle + width)}


if __name__ == "__main__":
    sys.exit(main())
