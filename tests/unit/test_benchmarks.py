"""Every committed benchmark result is complete, of the current bars, measured in quiet, and keeps its bars."""

from __future__ import annotations

import importlib
import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.common import RESULTS, Bar, Machine, Result
from hf_compress.evaluation.environment import environment

SCRIPTS = (
    "bench_calibration",
    "bench_data_free",
    "bench_import",
    "bench_int8_dynamic",
    "bench_load",
    "bench_perplexity",
    "bench_preflight",
    "bench_ptq",
    "bench_streaming",
)
MATRIX = "ptq_peers"
"""Takes hours and environments of its own, so `run_all.py` leaves it out; measured cell by cell."""
TRAINING = "training"
"""Takes more than an hour, so `run_all.py` leaves it out too; measured cell by cell."""
BY_CELLS = (MATRIX, TRAINING)
PENDING = ("streaming", MATRIX, TRAINING)
"""Not measured on a quiet machine yet; `docs/verification.md` says so, and no page shows a number of them."""
NAMES = tuple(name for name in (*(one.removeprefix("bench_") for one in SCRIPTS), *BY_CELLS) if name not in PENDING)
"""Exactly these results are committed; `python benchmarks/run_all.py` writes all but those of cells."""


def bars_of(name: str) -> tuple[Bar, ...]:
    script = name if name in BY_CELLS else f"bench_{name}"
    return importlib.import_module(f"benchmarks.{script}").BARS


def result_of(name: str) -> Result:
    return Result.read(RESULTS / f"{name}.json")


def test_every_script_is_listed() -> None:
    assert {file.stem for file in RESULTS.parent.glob("bench_*.py")} == set(SCRIPTS)


def test_exactly_the_expected_results_are_committed() -> None:
    assert {file.name for file in RESULTS.iterdir()} - {".gitkeep"} == {f"{name}.json" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_result_has_the_bars_of_its_script(name: str) -> None:
    result = result_of(name)
    assert result.name == name
    assert [Bar(**bar.model_dump(exclude={"value"})) for bar in result.bars] == list(bars_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_result_keeps_its_bars(name: str) -> None:
    assert [bar for bar in result_of(name).bars if not bar.passed] == []


@pytest.mark.parametrize("name", NAMES)
def test_result_was_measured_in_full_on_a_quiet_machine(name: str) -> None:
    result = result_of(name)
    assert not result.smoke
    assert result.machine.quiet
    assert None not in (result.machine.environment.packages["torch"], result.machine.environment.logical_cpus)


def test_what_is_not_measured_is_said() -> None:
    page = (RESULTS.parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")
    _, _, unverified = page.partition("Not verified here:")
    scripts = [f"benchmarks/{name if name in BY_CELLS else f'bench_{name}'}.py" for name in PENDING]
    assert [script for script in scripts if f"`{script}`" not in unverified] == []


@pytest.mark.skipif(MATRIX in PENDING, reason="the matrix takes hours; it is not measured in full yet")
def test_matrix_is_complete_and_no_cell_was_disturbed() -> None:
    from benchmarks.ptq_peers import MATRIX as WANTED
    from benchmarks.ptq_peers import ORIGINAL

    cells = result_of(MATRIX).measurements["cells"]
    assert isinstance(cells, dict)
    assert set(cells) == {ORIGINAL, *(cell.key for cell in WANTED)}
    assert [name for name, cell in cells.items() if "error" in cell] == []
    assert [name for name, cell in cells.items() if "quantize" in cell and cell["quantize"]["busy"]] == []


@pytest.mark.skipif(TRAINING in PENDING, reason="it takes more than an hour; it is not measured in full yet")
def test_training_is_complete_and_no_cell_was_disturbed() -> None:
    from benchmarks.training import MATRIX as WANTED

    cells = result_of(TRAINING).measurements["cells"]
    assert isinstance(cells, dict)
    assert set(cells) == set(WANTED)
    assert [name for name, cell in cells.items() if "error" in cell or cell["busy"]] == []


def test_a_configuration_that_is_not_measured_loses_its_bar() -> None:
    from benchmarks.bench_data_free import ALL_MEASURED, BARS, peers

    assert ALL_MEASURED in BARS
    assert ALL_MEASURED.judge(len(peers())).passed
    assert not ALL_MEASURED.judge(len(peers()) - 1).passed


@pytest.mark.parametrize(
    ("at", "value", "passes"), [("most", 2.0, True), ("most", 2.1, False), ("least", 2.0, True), ("least", 1.9, False)]
)
def test_bar_judges(at: str, value: float, passes: bool) -> None:
    bar = Bar(name="speed", at=at, limit=2.0, unit="times")
    judged = bar.judge(value)
    assert judged.passed is passes
    machine = Machine(
        environment=environment(), load_average_after=(0, 0, 0), busy_percent_before=0, busy_percent_after=0
    )
    whole = Result(
        name="x",
        smoke=False,
        date=datetime.now(UTC),
        seconds=1,
        machine=machine,
        settings={},
        measurements={},
        bars=(judged,),
    )
    assert Result.model_validate_json(whole.model_dump_json()).passed is passes


def test_result_of_a_lost_bar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"name": "x", "bars": [{"name": "speed", "value": 3}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="validation errors"):
        Result.read(path)
