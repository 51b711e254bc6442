from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Run


def test_writes_a_proven_checkpoint_with_its_tokenizer(quantized: Path) -> None:
    names = {file.name for file in quantized.iterdir()}
    assert {"config.json", "model.safetensors", "hf_compress.json", "tokenizer.json"} <= names
    record = json.loads((quantized / "hf_compress.json").read_text())
    assert record["proof"]["level"] == "full"
    assert record["plan"]["request"]["group_size"] == 32
    assert AutoTokenizer.from_pretrained(quantized)("ab").input_ids == [1, *_ids(quantized, "ab"), 2]
    AutoModelForCausalLM.from_pretrained(quantized)


def _ids(path: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(list(text))


def test_prints_a_summary(run: Run, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", bert, out, "--method", "rtn", "--bits", 8, "--group-size", "channel")
    assert result.exit_code == 0, result.output
    assert "rtn: 13 of 17 weights, coverage 100.0%" in result.stdout
    assert "int8-channel  13 weights" in result.stdout
    assert "proof  full, by transformers" in result.stdout
    assert f"saved  {out} (compressed-tensors)" in result.stdout
    # transformers makes up an empty tokenizer where there is none.
    assert not list(out.glob("*token*"))


def test_json_is_all_there_is_on_stdout_and_overwrite_replaces(
    run: Run, llama: Path, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized, out)
    result = run("quantize", llama, out, "--method", "cast", "--overwrite", "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["coverage"] == 1.0
    assert value["bytes_after"] < 0.6 * value["bytes_before"]
    assert value["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert value["proof"]["level"] == "full"
    assert value["processor"] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_tokenizer_is_a_note(run: Run, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{")
    result = run("quantize", tmp_path / "source", tmp_path / "out", "--method", "rtn", "--group-size", 32, "--json")
    assert result.exit_code == 0, result.output
    (note,) = [note for note in json.loads(result.stdout)["notes"] if "tokenizer" in note]
    assert note.startswith("the tokenizer or processor was not saved: Expecting property name")


def test_an_existing_output_is_refused_before_the_model_is_looked_at(run: Run, quantized: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in quantized.iterdir()}
    result = run("quantize", "no/such-model", quantized, "--method", "rtn")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("[HFC701] ")
    assert "--overwrite" in result.stderr
    assert result.stderr.count("\n") == 1
    assert before == {file: file.stat().st_mtime_ns for file in quantized.iterdir()}


def test_dry_run_writes_nothing(run: Run, bert: Path, tmp_path: Path) -> None:
    result = run("quantize", bert, tmp_path / "out", "-m", "int8_dynamic", "--skip", "*.layer.0.*", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("[HFC102] ")
    arguments = ("--skip", "*.layer.0.*", "--skip", "*.layer.1.output.*", "--min-coverage", 0.1, "--dry-run")
    result = run("--json", "quantize", bert, tmp_path / "out", "-m", "int8_dynamic", *arguments)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["plan"]["request"]["skip"] == ["*.layer.0.*", "*.layer.1.output.*"]
    assert value["schemes"]["w8a8-dynamic-token"]["weights"] == 5
    assert value["bytes_after"] < value["bytes_before"]
    quiet = run("quantize", bert, tmp_path / "out", "-m", "rtn", "--dry-run", "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--method", "int8_dynamic", "--bits", 4), "HFC202", "known keys: skip, rules"),
        (("--method", "cast", "--asymmetric"), "HFC202", "dtype"),
        (("--method", "rtnn"), "HFC204", "Did you mean 'rtn'"),
        (("--method", "rtn", "--bits", 9), "HFC202", "bits=9"),
        (("--method", "rtn", "--group-size", "row"), "HFC202", "'row'"),
        (("--method", "rtn", "--group-size", 48), "HFC401", "does not divide"),
        (("--method", "rtn", "--skip", "encoder.leyer.*"), "HFC201", "encoder.leyer"),
    ],
)
def test_refusals(run: Run, bert: Path, tmp_path: Path, arguments: tuple[object, ...], code: str, words: str) -> None:
    result = run("quantize", bert, tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"[{code}] ")
    assert words in result.stderr
    as_json = run("quantize", bert, tmp_path / "out", *arguments, "--json")
    error = json.loads(as_json.stdout)["error"]
    assert as_json.exit_code == 1
    assert (error["code"], set(error)) == (code, {"code", "message", "fix"})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model(run: Run, tmp_path: Path) -> None:
    result = run("quantize", tmp_path / "absent", tmp_path / "out", "--method", "rtn")
    assert result.exit_code == 1
    assert result.stderr.startswith("[HFC406] ")
