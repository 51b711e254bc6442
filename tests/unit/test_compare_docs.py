"""docs/compare.md shows what is committed, that was measured in full, and its example runs."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from benchmarks.compare_sentiment import BUSY_NOTE, SMOKE_NOTE, configs
from hf_compress.evaluation.comparison import panels
from hf_compress.evaluation.comparison_files import read_comparison, title
from hf_compress.evaluation.plots import digest
from hf_compress.evaluation.quality_results import ClassificationQuality
from hf_compress.pipeline.compare_names import named_configs
from scripts.compare_docs import BEGIN, COMPARISON, END, PAGE, PICTURE, drawn_from, measured
from tests._utils.tiny import tiny_dir, tiny_tokenizer


def test_page_and_picture_show_the_committed_comparison() -> None:
    found = read_comparison(COMPARISON)
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == measured(found)
    assert drawn_from(PICTURE) == digest(panels(found), title(found))


def test_committed_comparison_is_of_the_script_and_measured_in_full_on_a_quiet_machine() -> None:
    pytest.importorskip("torchao")
    found = read_comparison(COMPARISON)
    assert [entry.name for entry in found.entries] == list(named_configs(configs()))
    assert not [entry.error for entry in found.entries if entry.error]
    assert SMOKE_NOTE not in found.notes
    assert not [note for note in found.notes if note.startswith((BUSY_NOTE, "The machine was busy"))]
    for report in found.reports.values():
        assert report.quality is not None
        assert isinstance(report.quality.result, ClassificationQuality)
        assert report.quality.result.examples == 600
        assert [one.pairs for one in (report.latency or {}).values()] == [20, 20]


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    example = re.findall("^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[0]
    shutil.move(tiny_dir("bert-classifier", tmp_path), tmp_path / "my-model")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    values = runpy.run_path("example.py", {"tokenizer": tiny_tokenizer()})
    found = values["comparison"]
    assert list(found.reports) == ["rtn-4bit-g64", "hqq-4bit-g64", "int8-dynamic", "bitsandbytes-nf4"]
    assert read_comparison("comparison") == found
    assert (tmp_path / "comparison" / "checkpoints" / "bitsandbytes-nf4" / "config.json").is_file()
