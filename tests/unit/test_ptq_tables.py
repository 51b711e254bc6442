"""The tables of calibrated methods show the committed results, with what was lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_compress.evaluation.environment import environment
from scripts import ptq_tables


def test_pages_show_the_committed_results() -> None:
    places = [
        place for page in ptq_tables.pages() for place in ptq_tables.MARKED.finditer(page.read_text(encoding="utf-8"))
    ]
    assert sorted(place[2] for place in places) == sorted(ptq_tables.TABLES), "each table on one page"
    for place in places:
        made = f"{ptq_tables.table(place[2])}\n" if ptq_tables.measured(place[2]) else ""
        assert place[0] == f"<!-- ptq: {place[2]} -->\n{made}<!-- end ptq -->"


def quality(after: float, change: float) -> dict[str, float]:
    return {
        "candidate_accuracy": after,
        "difference": change,
        "difference_low": change - 0.01,
        "difference_high": change + 0.01,
    }


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small results of both benchmarks."""
    machine = {"environment": environment().model_dump(mode="json")}
    cell = {"versions": {"llmcompressor": "0.14"}, "patched": "pinning"}
    times = {"quantize_s": 9.6, "cpu_s": 20.0, "peak_rss_growth": 3 << 20, "peak_anonymous_growth": 2 << 20}
    means: dict[str, Any] = {"perplexity": 49.0, "perplexities": [48.0, 49.0, 50.0], **times}
    settings = {name: name for name in ("model", "grid", "calibration", "test", "threads")}
    measurements = {
        "summary": {"llm-compressor/awq/4": means, "awq/4, ours / peers": {}},
        "cells": {"fp32": {"perplexity": 26.84}, "llm-compressor/awq/4/0": cell},
    }
    matrix = {"machine": machine, "settings": settings, "measurements": measurements}
    parts = {"tweets": quality(0.95, -0.02), "amazon": quality(0.85, 0.0), "all": quality(0.9, -0.01)}
    found = {"int8_static": parts, "int8_static, mse": parts, "gptq W4": parts, "rtn W4": parts}
    classifiers = {
        "machine": machine,
        "settings": {"text": "texts"},
        "measurements": {"sentiment": found, "digits": {"int8_static": {"all": quality(0.97, 0.005)}}},
    }
    for name, content in (("ptq_peers", matrix), ("ptq", classifiers)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(ptq_tables, "RESULTS", tmp_path)


@pytest.mark.usefixtures("results")
def test_tools_are_rows_with_version_and_patch() -> None:
    lines = ptq_tables.table("peers-awq").splitlines()
    assert "float32 26.84" in lines[0]
    assert lines[4:] == [
        "| llm-compressor 0.14, patched | AWQ | 4 | 49.00 (48.00–50.00) | 10 s | 20 s | 3 MiB | 2 MiB |"
    ]
    assert len(ptq_tables.table("peers-gptq").splitlines()) == 4


@pytest.mark.usefixtures("results")
def test_losses_are_shown_with_their_intervals() -> None:
    lines = ptq_tables.table("classifier-gptq").splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| gptq W4", "| rtn W4"]
    assert lines[4].endswith(
        "| 95.0%, -2.0 (-3.0 to -1.0) | 85.0%, +0.0 (-1.0 to +1.0) | 90.0%, -1.0 (-2.0 to +0.0) |"
    )
    static = ptq_tables.table("classifier-int8-static")
    assert "| int8_static, mse |" in static
    assert static.endswith("| int8_static | 97.0%, +0.5 (-0.5 to +1.5) |")


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(SystemExit, match="no table 'peer'; known: peers,"):
        ptq_tables.table("peer")


def test_places_are_filled_once_there_are_results(results: None, tmp_path: Path) -> None:
    text = "before\n<!-- ptq: peers-awq -->\nan old table\n<!-- end ptq -->\nafter\n"
    filled = ptq_tables.MARKED.sub(ptq_tables.filled, text)
    assert filled == text.replace("an old table", ptq_tables.table("peers-awq"))
    (tmp_path / "ptq_peers.json").unlink()
    assert ptq_tables.MARKED.sub(ptq_tables.filled, filled) == text.replace("an old table\n", "")
