"""Training inside the Trainer: what QAT, pruning and distillation win back on real data, and what a step costs.

python -m benchmarks.training                    # measure what is missing, cell by cell, at most 90 minutes in all
python -m benchmarks.training --only qat         # only cells with this in their name
python -m benchmarks.training --summary          # means and bars from the cells that there are
python -m benchmarks.training --out benchmarks/begun  # where cells wait until all are measured
python -m benchmarks.training --smoke            # two steps each, to try the script

A cell is a kind and a seed. The result is written after each cell, so the run can be stopped at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import JsonValue
from transformers.utils import logging

from benchmarks.common import QUIET_PERCENT, RESULTS, SMOKE_RESULTS, Bar, Machine, Result, show, write
from benchmarks.ptq_peers import machine_now, read
from benchmarks.training_cells import (
    BATCH,
    HIDDEN,
    LENGTH,
    LM_BATCH,
    LM_BITS,
    LM_CALIBRATION,
    LM_GROUP,
    LM_KINDS,
    LM_LENGTH,
    LM_TEST,
    RECIPES,
    ROUNDED,
    classifier,
    language_model,
    rounded,
    spread,
)
from benchmarks.training_overhead import (
    DISTILLATION,
    PRUNING,
    QAT_STATIC,
    QAT_WEIGHTS,
    SHAPES,
    overhead,
)
from examples.reference.packages import ReferenceUnavailable
from examples.reference.smollm2 import ROTATED_NAME

NAME = "training"
SEEDS = (0, 1, 2)
ORIGINAL = "fp32"
TRAINED = ("qat W3 g64", "qat W8A8", "qat W4 g64", "magnitude 50", "student", "movement 85", "magnitude 85")
"""In the order that matters."""
ONCE = (ORIGINAL, *ROUNDED)
"""Nothing is drawn."""
SINGLE = ("qat W2 g64", "qat W3 g128", "qat W4 g128", "control")
"""With one seed, as there is no time for more."""


def key(kind: str, seed: int) -> str:
    """Name of a cell."""
    return f"{kind}/{seed}"


MATRIX = (
    *ONCE,
    *(f"overhead {shape}" for shape in SHAPES),
    *(key(kind, 0) for kind in TRAINED),
    *(key(kind, 0) for kind in LM_KINDS),
    *(key(kind, seed) for seed in SEEDS[1:] for kind in TRAINED),
    *(key(kind, 0) for kind in SINGLE),
)
"""Every kind once before any is repeated. The language model is trained once: it takes as long as nine classifiers."""

RECOVERING = ("W3 g64", "W3 g128", "W2 g64")
"""Grids that lose enough accuracy to measure what is won back."""
NEARING = ("W4 g64", "W4 g128")
"""Grids that lose too little accuracy; their bar is of the divergence from float32."""
W8A8 = "W8A8 static QAT: accuracy lost against float32, mean of seeds"
LM_GAP = f"SmolLM2 W{LM_BITS} g{LM_GROUP} QAT with distillation: share of rounding's perplexity gap closed"
LM_MINUTES = f"SmolLM2 W{LM_BITS} g{LM_GROUP} QAT with distillation: time"
HALF_ZERO = "magnitude, 50 % zeros: accuracy kept, mean of seeds"
MOVEMENT = "85 % zeros: accuracy of movement over that of magnitude, means of seeds"
STUDENT = "half of the layers: accuracy kept, mean of seeds"
MINUTES = "all cells together"


def recovered(grid: str) -> str:
    """Name of a bar of accuracy."""
    return f"{_of_grid(grid)}: share of the accuracy lost by rounding won back, {_draws(grid)}"


def closer(grid: str) -> str:
    """Name of a bar of divergence."""
    return f"{_of_grid(grid)}: share of rounding's divergence from float32 taken away, {_draws(grid)}"


def _of_grid(grid: str) -> str:
    return f"INT{grid.removeprefix('W')} QAT with distillation"


def _draws(grid: str) -> str:
    return "one seed" if f"qat {grid}" in SINGLE else "mean of seeds"


def step(what: str, shape: str, over: str = "plain step") -> str:
    """Name of a bar of overhead."""
    rows, tokens, _ = SHAPES[shape]
    return f"{what} step / {over}, {shape}, {rows} × {tokens} tokens"


TAUGHT = "(plain step + teacher forward)"
BARS = (
    *(Bar(name=recovered(grid), at="least", limit=60, unit="%") for grid in RECOVERING),
    *(Bar(name=closer(grid), at="least", limit=60, unit="%") for grid in NEARING),
    Bar(name=W8A8, at="most", limit=0.3, unit="points"),
    Bar(name=LM_GAP, at="least", limit=40, unit="%"),
    Bar(name=LM_MINUTES, at="most", limit=20, unit="minutes"),
    Bar(name=HALF_ZERO, at="least", limit=98, unit="%"),
    Bar(name=MOVEMENT, at="least", limit=0, unit="points"),
    Bar(name=STUDENT, at="least", limit=97, unit="%"),
    *(Bar(name=step(QAT_WEIGHTS, shape), at="most", limit=1.6, unit="times") for shape in SHAPES),
    Bar(name=step(QAT_STATIC, "classifier"), at="most", limit=1.6, unit="times"),
    *(Bar(name=step(PRUNING, shape), at="most", limit=1.05, unit="times") for shape in SHAPES),
    *(Bar(name=step(DISTILLATION, shape, TAUGHT), at="most", limit=1.1, unit="times") for shape in SHAPES),
    Bar(name=MINUTES, at="most", limit=90, unit="minutes"),
)

Cells = dict[str, Any]


def main() -> int:
    """Measure what was asked for; returns 1 if a bar does not hold or a cell failed."""
    options = arguments()
    logging.disable_progress_bar()
    folder: Path = options.out or (SMOKE_RESULTS if options.smoke else RESULTS)
    path = folder / f"{NAME}.json"
    wanted = [] if options.summary else list(chosen(read(path), options.only, options.redo_busy, options.redo))
    print(f"{len(wanted)} of {len(MATRIX)} cells to measure", flush=True)
    for number, name in enumerate(wanted, 1):
        before = machine_now()
        told = measured(name, options.smoke, before.busy_percent_before > QUIET_PERCENT)
        print(f"[{number}/{len(wanted)}] {name}: {verdict(told)}", flush=True)
        add(path, {name: told}, before, options.smoke)
    made = add(path, {}, machine_now(), options.smoke)
    show([made])
    missing = {bar.name for bar in BARS} - {bar.name for bar in made.bars}
    for name in sorted(missing):
        print(f"not measured: {name}")
    failed = [name for name, one in read(path).items() if "error" in one]
    return 0 if made.passed and not missing and not failed else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="part of a cell's name, KIND/SEED; repeatable")
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--redo-busy", action="store_true", help="measure again what other programs disturbed")
    parser.add_argument("--summary", action="store_true", help="measure nothing; write means and bars again")
    parser.add_argument("--smoke", action="store_true", help="small settings, result into benchmarks/out")
    parser.add_argument("--out", type=Path, help="directory of the result, benchmarks/results by default")
    return parser.parse_args()


def chosen(cells: Cells, only: list[str] | None, redo_busy: bool, redo: bool) -> Iterable[str]:
    """Cells of the matrix that are wanted, and missing, failed, or to be measured again."""
    for name in MATRIX:
        if only and not any(part in name for part in only):
            continue
        known = cells.get(name)
        if known is None or "error" in known or redo or (redo_busy and known["busy"]):
            yield name


def measured(name: str, smoke: bool, busy: bool) -> Cells:
    """A cell's numbers, or why there are none."""
    kind, _, seed = name.partition("/")
    started = time.perf_counter()
    date = datetime.now(UTC).replace(microsecond=0).isoformat()
    try:
        if kind.startswith("overhead "):
            told = overhead(kind.removeprefix("overhead "), smoke)
        elif kind in ONCE:
            told = rounded(kind, smoke)
        elif kind in LM_KINDS:
            told = language_model(kind, int(seed), smoke)
        else:
            told = classifier(kind, int(seed), smoke)
    except ReferenceUnavailable as error:
        return {"date": date, "error": str(error)}
    return {"date": date, "busy": busy, "wall_s": round(time.perf_counter() - started, 1), **told}


def verdict(told: Mapping[str, Any]) -> str:
    """A cell in a few words."""
    if "error" in told:
        return str(told["error"])
    if "ratios" in told:
        found = ", ".join(f"{name} {one['median']:.2f}" for name, one in told["ratios"].items())
    elif "candidate_perplexity" in told:
        found = f"perplexity {told['candidate_perplexity']:.2f}, original {told['baseline_perplexity']:.2f}"
    else:
        found = f"accuracy {told['candidate_accuracy']:.4f}, original {told['baseline_accuracy']:.4f}"
    return f"{found}; {told['wall_s']:.0f} s"


def add(path: Path, cells: Cells, before: Machine, smoke: bool) -> Result:
    """Put cells into the file, whatever else has been added meanwhile, and return its content."""
    made = result({**read(path), **cells}, before, smoke)
    write(made, path.parent)
    return made


def result(cells: Cells, machine: Machine, smoke: bool) -> Result:
    """Everything that is known so far, with the bars that can be judged."""
    table, values = summary(cells)
    return Result(
        name=NAME,
        smoke=smoke,
        date=datetime.now(UTC).replace(microsecond=0),
        seconds=sum(one.get("wall_s", 0.0) for one in cells.values()),
        machine=machine.model_copy(update={"busy_percent_after": psutil.cpu_percent(interval=1)}),
        settings=settings(),
        measurements={"summary": table, "cells": cells},
        bars=tuple(bar.judge(values[bar.name]) for bar in BARS if bar.name in values),
    )


def settings() -> dict[str, JsonValue]:
    """What was measured."""
    recipes: dict[str, JsonValue] = {
        kind: {
            "epochs": one.epochs,
            "learning_rate": one.learning_rate,
            "alpha": one.alpha,
            "temperature": one.temperature,
            "dropout": one.dropout,
            "layers": one.layers,
        }
        for kind, one in RECIPES.items()
    }
    return {
        "classifier": "MiniLM, sentiment, 5,217 training rows and 1,200 held-out ones, tweets and product reviews",
        "training": f"batches of {BATCH} rows of at most {LENGTH} tokens, AdamW, embeddings frozen",
        "recipes": recipes,
        "hidden states": {**HIDDEN},
        "int4": "rounding loses too little accuracy at 4 bits to measure what is won back, so its bar is of the "
        "divergence KL(float32 || model) on the held-out rows; accuracy has its bars at 3 bits and at 2",
        "language model": ROTATED_NAME,
        "language model, training": f"windows of {LM_LENGTH} tokens of the Brown corpus, {LM_BATCH} a step",
        "language model, GPTQ": f"{LM_CALIBRATION[0]} windows of {LM_CALIBRATION[1]} tokens of the Brown corpus",
        "language model, test": f"{LM_TEST[0]} windows of {LM_TEST[1]} tokens of the Debian Administrator's Handbook",
        "overhead": "a step each in turn, in one process; median of paired ratios, of pruning the ratio of sums",
    }


def summary(cells: Cells) -> tuple[dict[str, JsonValue], dict[str, float]]:
    """Spreads over seeds by kind, and the values of the bars that can be judged."""
    table: dict[str, JsonValue] = {}
    for kind in (*TRAINED, *SINGLE):
        if found := drawn(cells, kind):
            table[kind] = {
                name: spread([one[name] for one in found]) for name in ("candidate_accuracy", "kl", "zeros", "seconds")
            }
    values = {**of_classifier(cells), **of_language_model(cells), **of_overhead(cells)}
    if all(name in cells for name in MATRIX):
        values[MINUTES] = sum(one.get("wall_s", 0.0) for one in cells.values()) / 60
    return table, values


def drawn(cells: Cells, kind: str) -> list[Cells]:
    """Measured cells of a kind, over seeds."""
    found = (cells.get(key(kind, seed)) for seed in SEEDS)
    return [one for one in found if one is not None and "error" not in one]


def whole(cells: Cells, kind: str, name: str = "candidate_accuracy") -> float | None:
    """Mean over all seeds of a kind; None until all are measured."""
    found = drawn(cells, kind)
    wanted = 1 if kind in SINGLE else len(SEEDS)
    return sum(one[name] for one in found) / len(found) if len(found) == wanted else None


def single(cells: Cells, name: str) -> Cells | None:
    """A cell that was measured."""
    found = cells.get(name)
    return None if found is None or "error" in found else found


def of_classifier(cells: Cells) -> dict[str, float]:
    """Bars of the classifier."""
    values: dict[str, float] = {}
    original = single(cells, ORIGINAL)
    if original is None:
        return values
    before = original["candidate_accuracy"]
    for grid in RECOVERING:
        rtn, trained = single(cells, f"rtn {grid}"), whole(cells, f"qat {grid}")
        if rtn is not None and trained is not None and before > rtn["candidate_accuracy"]:
            lost = before - rtn["candidate_accuracy"]
            values[recovered(grid)] = 100 * (trained - rtn["candidate_accuracy"]) / lost
    for grid in NEARING:
        rtn, divergence = single(cells, f"rtn {grid}"), whole(cells, f"qat {grid}", "kl")
        if rtn is not None and divergence is not None:
            values[closer(grid)] = 100 * (1 - divergence / rtn["kl"])
    means = {
        kind: whole(cells, kind) for kind in ("qat W8A8", "magnitude 50", "student", "movement 85", "magnitude 85")
    }
    static, half, student, movement, magnitude = means.values()
    if static is not None:
        values[W8A8] = 100 * (before - static)
    if half is not None:
        values[HALF_ZERO] = 100 * half / before
    if student is not None:
        values[STUDENT] = 100 * student / before
    if movement is not None and magnitude is not None:
        values[MOVEMENT] = 100 * (movement - magnitude)
    return values


def of_language_model(cells: Cells) -> dict[str, float]:
    """Bars of the language model."""
    rtn, trained = single(cells, key("lm rtn", 0)), single(cells, key("lm qat", 0))
    if rtn is None or trained is None:
        return {}
    lost = rtn["candidate_perplexity"] - rtn["baseline_perplexity"]
    closed = rtn["candidate_perplexity"] - trained["candidate_perplexity"]
    return {LM_GAP: 100 * closed / lost, LM_MINUTES: trained["seconds"] / 60}


def of_overhead(cells: Cells) -> dict[str, float]:
    """Bars of what a step costs."""
    values: dict[str, float] = {}
    for shape in SHAPES:
        found = single(cells, f"overhead {shape}")
        if found is None:
            continue
        for name in (QAT_WEIGHTS, QAT_STATIC):
            if name in found["ratios"]:
                values[step(name, shape)] = found["ratios"][name]["median"]
        values[step(PRUNING, shape)] = found["mean_ratios"][PRUNING]
        values[step(DISTILLATION, shape, TAUGHT)] = found["ratios"][DISTILLATION]["median"]
    return values


if __name__ == "__main__":
    sys.exit(main())
