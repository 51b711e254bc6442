"""The benchmark of training and its tables: what is measured again, how cells become bars, whose turn it is."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import training
from benchmarks.ptq_peers import machine_now
from benchmarks.training import BARS, MATRIX, SEEDS, chosen, closer, key, of_language_model, recovered, summary
from benchmarks.training_cells import RECIPES
from benchmarks.training_overhead import DEEP, PLAIN, SHAPES, TEACHER, Turns, _timed
from hf_compress.evaluation.environment import environment
from scripts import training_tables

ACCURACIES = {
    "qat W3 g64": 0.89,
    "qat W8A8": 0.8985,
    "qat W4 g64": 0.897,
    "magnitude 50": 0.891,
    "student": 0.882,
    "movement 85": 0.87,
    "magnitude 85": 0.86,
}


def cell(accuracy: float, kl: float = 0.01) -> dict[str, Any]:
    judged = {"candidate_accuracy": accuracy, "baseline_accuracy": 0.9, "examples": 1200, "kl": kl}
    return {"busy": False, "wall_s": 60.0, "seconds": 50.0, "zeros": 0.5, **judged}


def lm_cell(perplexity: float, seconds: float) -> dict[str, Any]:
    ratio = perplexity / 25
    ends = {"ratio": ratio, "ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio}
    found = {"candidate_perplexity": perplexity, "baseline_perplexity": 25.0, "seconds": seconds}
    return {"busy": False, "wall_s": seconds, **found, **ends}


def overhead_cell(shape: str) -> dict[str, Any]:
    ratio = {"median": 1.02, "low_quartile": 1.0, "high_quartile": 1.04}
    of_classifier = ("qat W8A8 static", DEEP) if shape == "classifier" else ()
    kinds = ("qat W4 g64", "pruning", "distillation", *of_classifier)
    ratios = {"ratios": dict.fromkeys(kinds, ratio), "mean_ratios": {"pruning": 1.03}}
    return {"busy": False, "wall_s": 90.0, "shape": [32, 32], **ratios}


def complete() -> dict[str, Any]:
    """All cells: rounding to 3 bits loses 2 points, training wins half of them back; to 2 bits 20 points and 15."""
    cells = {name: cell(0.88, kl=0.1) for name in MATRIX}
    cells["fp32"] = cell(0.9, kl=0.0)
    cells |= {"rtn W2 g64": cell(0.7), "qat W2 g64/0": cell(0.85), "qat W3 g128/0": cell(0.896)}
    cells["qat W4 g128/0"] = cell(0.89, kl=0.02)
    cells |= {
        key(kind, seed): cell(value + 0.001 * (seed - 1)) for kind, value in ACCURACIES.items() for seed in SEEDS
    }
    perplexities = {"lm rtn": (425.0, 10.0), "lm gptq": (100.0, 200.0), "lm qat": (65.0, 900.0)}
    cells |= {key(kind, 0): lm_cell(*values) for kind, values in perplexities.items()}
    return cells | {f"overhead {shape}": overhead_cell(shape) for shape in SHAPES}


def test_every_cell_is_there_once_and_every_recipe_is_measured() -> None:
    assert len(set(MATRIX)) == len(MATRIX)
    assert {name.partition("/")[0] for name in MATRIX} >= set(RECIPES)


def test_only_missing_failed_or_disturbed_cells_are_measured() -> None:
    cells = complete()
    assert list(chosen(cells, None, True, False)) == []
    del cells["student/1"]
    cells["student/2"] = {"error": "no"}
    cells["lm qat/0"]["busy"] = True
    assert list(chosen(cells, None, False, False)) == ["student/1", "student/2"]
    assert list(chosen(cells, ["lm"], True, False)) == ["lm qat/0"]
    assert list(chosen(cells, ["lm"], False, True)) == ["overhead lm", "lm rtn/0", "lm gptq/0", "lm qat/0"]


def test_bars_are_of_means_over_all_seeds() -> None:
    table, values = summary(complete())
    assert set(values) == {bar.name for bar in BARS}
    assert values[recovered("W3 g64")] == pytest.approx(50)
    assert values[recovered("W3 g128")] == pytest.approx(80)
    assert values[recovered("W2 g64")] == pytest.approx(75)
    assert values[closer("W4 g64")] == pytest.approx(90)
    assert values[closer("W4 g128")] == pytest.approx(80)
    assert values[training.W8A8] == pytest.approx(0.15)
    assert values[training.HALF_ZERO] == pytest.approx(99)
    assert values[training.STUDENT] == pytest.approx(98)
    assert values[training.MOVEMENT] == pytest.approx(1)
    assert values[training.LM_GAP] == pytest.approx(90)
    assert values[training.LM_MINUTES] == pytest.approx(15)
    assert table["student"]["candidate_accuracy"]["min"] == pytest.approx(0.881)
    assert [bar.name for bar in BARS if not bar.judge(values[bar.name]).passed] == [recovered("W3 g64")]


def test_a_bar_waits_for_its_last_cell() -> None:
    cells = complete()
    del cells["student/2"], cells["lm rtn/0"]
    cells["qat W3 g64/1"] = {"error": "no"}
    _, values = summary(cells)
    missing = {bar.name for bar in BARS} - set(values)
    of_cells = {training.STUDENT, recovered("W3 g64"), training.LM_GAP, training.LM_MINUTES}
    assert missing == {*of_cells, training.MINUTES}
    assert of_language_model(cells) == {}
    assert summary({}) == ({}, {})


def test_result_file_grows_cell_by_cell(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    machine = machine_now()
    training.add(path, {"fp32": cell(0.9)}, machine, smoke=True)
    made = training.add(path, {"rtn W3 g64": cell(0.88)}, machine, smoke=True)
    assert set(training.read(path)) == {"fp32", "rtn W3 g64"}
    assert made.seconds == 120
    assert made.bars == ()


def test_threads_work_one_at_a_time_and_in_turn() -> None:
    order: list[str] = []
    working: list[str] = []

    def member(name: str, rounds: int) -> Any:
        def take(turns: Turns, number: int) -> list[float]:
            for _ in range(rounds):
                turns.give(number)
                working.append(name)
                time.sleep(0.001)  # time for another to break in, if it could
                assert working == [name]
                working.remove(name)
                order.append(name)
            return [float(rounds)]

        return take

    assert _timed({"a": member("a", 2), "b": member("b", 3)}) == {"a": [2.0], "b": [3.0]}
    assert order in (list("ababb"), list("babab"))


def test_one_that_fails_leaves_the_others_their_turns() -> None:
    def failing(turns: Turns, number: int) -> list[float]:
        raise ValueError("broken")

    def other(turns: Turns, number: int) -> list[float]:
        turns.give(number)
        return [1.0]

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="broken"):
        pool.submit(_timed, {PLAIN: failing, TEACHER: other}).result(timeout=20)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = complete()
    table, _ = summary(cells)
    content = {
        "machine": {"environment": environment().model_dump(mode="json")},
        "settings": training.settings(),
        "measurements": {"summary": table, "cells": cells},
    }
    (tmp_path / "training.json").write_text(json.dumps(content))
    monkeypatch.setattr(training_tables, "RESULTS", tmp_path)


def test_pages_show_the_committed_results() -> None:
    places = [
        place
        for page in training_tables.pages()
        for place in training_tables.MARKED.finditer(page.read_text(encoding="utf-8"))
    ]
    assert sorted(place[2] for place in places) == sorted(training_tables.TABLES), "each table on one page"
    for place in places:
        made = f"{training_tables.table(place[2])}\n" if training_tables.measured() else ""
        assert place[0] == f"<!-- training: {place[2]} -->\n{made}<!-- end training -->"


@pytest.mark.usefixtures("results")
def test_tables_show_means_with_their_extremes() -> None:
    lines = training_tables.table("qat").splitlines()
    assert "| 3 bits, groups of 64, trained | 89.0% (88.9% to 89.1%) | 0.0100 | 0.8 |" in lines
    assert "| 3 bits, groups of 64, rounded | 88.0% | 0.1000 |  |" in lines
    assert "| 3 bits, groups of 128, trained | 89.6% (89.6% to 89.6%) | 0.0100 | 0.8 |" in lines
    assert "| 3 bits, groups of 64, trained | 65.00 | +160% (+134% to +186%) | 15.0 |" in lines
    assert "| movement, 85 % zeros | 87.0% (86.9% to 87.1%) | 0.0100 | 0.8 | 50% |" in training_tables.table("pruning")
    assert "| the classifier, 32 × 32 tokens | pruning | 1.03 (1.00 to 1.04) | a plain step |" in (
        training_tables.table("overhead").splitlines()
    )
    taught = "1.02 (1.00 to 1.04) | a plain step and the teacher's forward |"
    for kind in ("distillation", DEEP):
        assert f"| the classifier, 32 × 32 tokens | {kind} | {taught}" in training_tables.table("overhead")
    with pytest.raises(SystemExit, match="no table 'qats'"):
        training_tables.table("qats")
