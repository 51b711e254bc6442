from __future__ import annotations

import json
import shutil
from pathlib import Path

from .conftest import Run


def test_inspect_a_checkpoint(run: Run, quantized: Path) -> None:
    result = run("inspect", quantized)
    assert result.exit_code == 0, result.output
    assert "rtn: 14 of 16 weights, coverage 100.0%" in result.stdout
    assert "proof    full" in result.stdout
    assert "lm_head" not in result.stdout
    every = run("inspect", quantized, "--all")
    assert every.stdout.startswith(result.stdout)
    assert sum("int4-g32" in line and "dB" in line for line in every.stdout.splitlines()) == 14
    value = json.loads(run("inspect", quantized, "--json").stdout)
    assert value["by_scheme"]["int4-g32"]["weights"] == 14
    assert value["proof"]["level"] == "full"


def test_inspect_a_model_with_a_method_reads_no_weights(run: Run, llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    arguments = ("--method", "rtn", "--bits", 8, "--group-size", -1, "--embeddings", "int8")
    result = run("inspect", tmp_path, *arguments, "--all")
    assert result.exit_code == 0, result.output
    assert "rtn: 15 of 16 weights" in result.stdout
    assert "peak memory" in result.stdout
    assert "lm_head" in result.stdout


def test_inspect_needs_a_checkpoint_or_a_method(run: Run, llama: Path) -> None:
    plain = run("inspect", llama)
    assert plain.exit_code == 1
    assert plain.stderr.startswith("[HFC705] ")
    options = run("inspect", llama, "--bits", 4)
    assert options.exit_code == 2
    assert "--method" in options.stderr


def test_verify_raises_the_level(run: Run, quantized: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(quantized, path)
    record = json.loads((path / "hf_compress.json").read_text())
    record["proof"] = {"level": "none"}
    (path / "hf_compress.json").write_text(json.dumps(record))
    result = run("verify", path)
    assert result.exit_code == 0, result.output
    assert f"{path}: proof full" in result.stdout
    assert "must be equal" in result.stdout
    assert json.loads((path / "hf_compress.json").read_text())["proof"]["level"] == "full"


def test_verify_fails_with_the_code(run: Run, quantized: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(quantized, path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (path / "model.safetensors").write_bytes(content)
    result = run("verify", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("[HFC702] ")
    assert "model.safetensors" in result.stderr
    absent = run("verify", tmp_path / "absent", "--json")
    assert absent.exit_code == 1
    assert json.loads(absent.stdout)["error"]["code"] == "HFC705"
