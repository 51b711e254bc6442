"""The examples with reference models and data, run as a newcomer would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_compress as hfc
from examples import (
    distill_text_classification,
    prune_text_classification,
    qat_causal_lm,
    qat_text_classification,
    quantize_causal_lm,
    quantize_lstm,
    quantize_text_classification,
)
from examples.reference import ReferenceUnavailable, lstm
from examples.reference.sentiment import classifier, held_out
from examples.reference.smollm2 import off_grid_smollm2
from tests._utils.tiny import tiny_dir, tiny_tokenizer


def needs(*getters: Callable[[], Any]) -> None:
    """Skip, saying why, where a reference can't be had."""
    for get in getters:
        try:
            get()
        except ReferenceUnavailable as error:
            pytest.skip(str(error))


def numbers(said: str, pattern: str) -> list[float]:
    """The two numbers before and after an arrow."""
    found = re.search(pattern, said)
    assert found is not None, said
    return [float(one) for one in found.groups()]


@pytest.mark.timeout(600)  # the first call trains the model
def test_lstm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(held_out)
    out = tmp_path / "out"
    quantize_lstm.main(["--out", str(out)])
    said = capsys.readouterr().out
    assert "proof: own-reader, by hf_compress" in said
    before, after = numbers(said, r"([\d.]+) MB -> ([\d.]+) MB")
    assert before / after > 3.5
    before, after = numbers(said, r"accuracy ([\d.]+)% -> ([\d.]+)%")
    assert before > 78
    assert abs(before - after) <= 0.5
    packed = hfc.load(out, model=lstm.skeleton(lstm.classifier()))
    assert isinstance(packed.lstm, torch.nn.LSTM)
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in packed.parameters()) < 5000  # biases: all else is packed


def test_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(held_out)
    source = tiny_dir("bert-classifier", tmp_path, num_labels=2)
    tiny_tokenizer().save_pretrained(source)
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--rows", "20", "--methods", "hqq4"]
    quantize_text_classification.main(arguments)
    said = capsys.readouterr().out
    assert "hqq4: 100% of the weights, proof: full, by transformers" in said
    assert re.search(r"accuracy [\d.]+% -> [\d.]+%; the change is between [-+][\d.]+ and \+[\d.]+ points", said)
    assert hfc.inspect(out / "hqq4").plan.method == "hqq"


def test_causal_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_dir("llama", tmp_path)
    tiny_tokenizer().save_pretrained(source)
    out = tmp_path / "out"
    sizes = ["--windows", "2", "--length", "32", "--prompt", "A list"]
    quantize_causal_lm.main(["--model", str(source), "--out", str(out), "--method", "hqq", *sizes])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    assert numbers(said, r"perplexity ([\d.]+) -> ([\d.]+)") == pytest.approx([128, 128], rel=0.5)
    assert said.splitlines()[-1].replace(" ", "").startswith("Alist")
    assert AutoModelForCausalLM.from_pretrained(out).hf_quantizer is not None


TABLE = re.compile(r"^(\S.*?\S) +([\d.]+)% +[-+][\d.]+ to [-+][\d.]+ +([\d.]+) MB$", re.MULTILINE)
"""Name, accuracy in percent and megabytes of each row of an example with training."""


def tiny_classifier(folder: Path) -> Path:
    """A classifier that the examples can train in seconds."""
    source = tiny_dir("bert-classifier", folder, num_labels=2)
    tiny_tokenizer().save_pretrained(source)
    return source


@pytest.mark.touches_rng  # Trainer draws
def test_qat_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(held_out)
    source, out = tiny_classifier(tmp_path), tmp_path / "out"
    qat_text_classification.main(["--model", str(source), "--out", str(out), "--smoke"])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    rows = TABLE.findall(said)
    assert [name for name, _, _ in rows] == ["float32", "3 bits, rounded", "3 bits, trained"]
    assert float(rows[0][2]) > float(rows[1][2]) == float(rows[2][2])
    assert hfc.inspect(out / "quantized").plan.method == "qat"


@pytest.mark.touches_rng  # Trainer draws
def test_prune_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(held_out)
    source, out = tiny_classifier(tmp_path), tmp_path / "out"
    prune_text_classification.main(["--model", str(source), "--out", str(out), "--smoke"])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    rows = TABLE.findall(said)
    assert [name for name, _, _ in rows] == ["float32", "50% zeros", "50% zeros, 8 bits"]
    assert rows[0][2] == rows[1][2], "zeros alone save nothing"
    pruned = AutoModelForSequenceClassification.from_pretrained(out / "pruned")
    packed = hfc.load(out / "pruned-int8")
    for model in (pruned, packed):
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        assert int((weight == 0).sum()) >= weight.numel() // 2


@pytest.mark.touches_rng  # Trainer draws
def test_distill_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(held_out)
    source, out = tiny_classifier(tmp_path), tmp_path / "out"
    distill_text_classification.main(["--model", str(source), "--out", str(out), "--smoke"])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    rows = TABLE.findall(said)
    assert [name for name, _, _ in rows] == ["2 layers", "1 layers, cut out", "1 layers, taught", "1 layers, 8 bits"]
    assert float(rows[0][2]) >= float(rows[1][2]) == float(rows[2][2])
    assert AutoModelForSequenceClassification.from_pretrained(out / "student").config.num_hidden_layers == 1


@pytest.mark.touches_rng  # Trainer draws
def test_qat_causal_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_dir("llama", tmp_path), tmp_path / "out"
    tiny_tokenizer().save_pretrained(source)
    qat_causal_lm.main(["--model", str(source), "--out", str(out), "--smoke"])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    names = re.findall(r"^(\S.*?\S) +[\d.]+ +[-+][\d.]+ to [-+][\d.]+$", said, re.MULTILINE)
    assert names == ["float32", "3 bits, rounded", "3 bits, trained"]
    assert AutoModelForCausalLM.from_pretrained(out / "quantized").hf_quantizer is not None


@pytest.mark.slow
@pytest.mark.touches_rng  # Trainer draws
@pytest.mark.timeout(3600)  # the first call builds the model
def test_training_wins_back_what_rounding_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 bits, where rounding leaves no more than a guess: the majority is 66 %."""
    needs(classifier)
    qat_text_classification.main(["--out", str(tmp_path / "out"), "--bits", "2", "--learning-rate", "2e-4"])
    before, rounded, trained = (float(share) for _, share, _ in TABLE.findall(capsys.readouterr().out))
    assert before > 87
    assert trained > (before + rounded) / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first call builds the model
def test_text_classification_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(classifier)
    quantize_text_classification.main(["--out", str(tmp_path / "out"), "--rows", "1200"])
    said = capsys.readouterr().out
    assert said.count("proof: ") == len(quantize_text_classification.METHODS)
    for share in re.findall(r"accuracy ([\d.]+)% -> ([\d.]+)%", said):
        before, after = map(float, share)
        assert before > 87
        assert after > before - 2


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first call builds the model
def test_causal_lm_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(off_grid_smollm2)
    quantize_causal_lm.main(["--out", str(tmp_path / "out"), "--windows", "4", "--length", "128"])
    said = capsys.readouterr().out
    assert "proof: full, by transformers" in said
    before, after = numbers(said, r"perplexity ([\d.]+) -> ([\d.]+)")
    assert before < after < 2.5 * before
    assert "A list in Python is" in said


def test_examples_run_as_their_docstrings_say() -> None:
    """From the top of a checkout, without any help from this test's own import path."""
    root = Path(__file__).resolve().parents[2]
    trained = (qat_text_classification, prune_text_classification, distill_text_classification, qat_causal_lm)
    for module in (quantize_lstm, quantize_text_classification, quantize_causal_lm, *trained):
        assert module.__doc__ is not None
        name = module.__name__.rpartition(".")[2]
        assert f"python -m examples.{name} " in module.__doc__
        assert (root / "examples" / f"{name}.py").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "examples.quantize_text_classification", "--rows", "0", "--out", "x"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--rows 0: there are 1 to 1200" in done.stderr
