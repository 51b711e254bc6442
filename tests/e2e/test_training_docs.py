"""What the pages about training show runs as it is shown, on tiny models."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from tests._utils.tiny import tiny_dir, tiny_tokenizer

pytestmark = [
    pytest.mark.touches_rng,  # Trainer draws
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile("^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile("^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def rows() -> list[dict[str, torch.Tensor]]:
    """Eight rows, of which each is a batch of the default size."""
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (8, 12), generator=made)
    mask = torch.ones_like(ids[0])
    return [{"input_ids": one, "attention_mask": mask, "labels": one[0] % 3} for one in ids]


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All blocks of a page, one after the other, in a folder with a classifier `my-model`."""
    shutil.move(tiny_dir("bert-classifier", folder), folder / "my-model")
    monkeypatch.chdir(folder)
    values: dict[str, Any] = {"rows": rows(), "tokenizer": tiny_tokenizer()}
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for number, block in enumerate(BLOCK.findall(text)):
        execute(block, f"{page}.md, block {number}", values)
    return values


def execute(block: str, name: str, values: dict[str, Any]) -> None:
    """Run a block of a page of ours, with what earlier ones have left in `values`."""
    exec(compile(block, name, "exec"), values)  # noqa: S102 - our own pages


def test_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = run("training", tmp_path, monkeypatch)
    packed = hfc.load(tmp_path / "my-model-small")
    assert hfc.inspect(tmp_path / "my-model-small").plan.method == "qat"
    weight = packed.bert.encoder.layer[1].output.dense.weight
    assert int((weight == 0).sum()) >= weight.numel() // 2, "zeros stay zeros in the codes"
    model = values["model_init"]()
    assert values["qat"].is_prepared(model)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block about the Trainer, which stands by itself but for the rows and the tokenizer."""
    shutil.move(tiny_dir("bert-classifier", tmp_path), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    (block,) = (one for one in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")) if "Trainer(" in one)
    execute(block, "README.md", {"rows": rows(), "tokenizer": tiny_tokenizer()})
    assert hfc.inspect(tmp_path / "my-model-qat3").plan.method == "qat"


def test_shell_blocks_name_examples_and_options_that_there_are() -> None:
    (block,) = SHELL.findall((DOCS / "training.md").read_text(encoding="utf-8"))
    lines = block.splitlines()
    assert len(lines) == 4
    for line in lines:
        python, option, name, *arguments = shlex.split(line)
        assert [python, option] == ["python", "-m"]
        example = importlib.import_module(name)
        assert example.parser().parse_args(arguments).out.name
        assert line in example.__doc__.splitlines(), "the page shows what the example says of itself"


def test_qat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("qat", tmp_path, monkeypatch)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-model-qat4")
    assert stock.hf_quantizer is not None


def test_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = run("pruning", tmp_path, monkeypatch)
    assert values["pruning"].report.sparsity == pytest.approx(0.5, abs=1e-3)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-model-pruned")
    weight = stock.bert.encoder.layer[0].output.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = run("distillation", tmp_path, monkeypatch)
    assert values["student"].config.num_hidden_layers == 1
    assert issubclass(values["TaughtSeq2SeqTrainer"], hfc.DistillationMixin)
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-student", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    run("adapters", tmp_path, monkeypatch)
    assert [file.name for file in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert "of the adapter's effect over 4 layers, measured on weights" in capsys.readouterr().out
