from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_compress import __version__

from .conftest import Process, Run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with optional packages that fail to import in three ways."""
    for name, code in {
        "evaluate": "raise RuntimeError('planted')",
        "onnx": "import surely_absent",
        "tensorrt": "import os; os.abort()",
    }.items():
        (tmp_path / "planted" / name).mkdir(parents=True)
        (tmp_path / "planted" / name / "__init__.py").write_text(code)
    return tmp_path / "planted"


def test_doctor_describes_this_machine(run: Run) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["versions"]["hf-compress"] == __version__
    assert value["versions"]["torch"]
    assert value["environment"]["torch_threads"] >= 1
    assert value["kernels"]["reference"] is None
    assert min(value["free_memory_bytes"], value["free_disk_bytes"]) > 0
    states = {package["name"]: package["state"] for package in value["packages"]}
    assert states["gguf"] == "ok"
    assert set(states.values()) <= {"ok", "absent", "broken"}


def test_a_broken_optional_package_is_reported(run: Run, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(broken)
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert lines["evaluate"] == "broken: RuntimeError: planted"
    assert lines["onnx"] == "broken: ModuleNotFoundError: No module named 'surely_absent'"
    assert lines["tensorrt"].startswith("broken: its import ended with status")
    assert lines["hf-compress"] == __version__
    assert {"processor", "instructions", "int8-matmul", "reference", "cache"} <= set(lines)


def test_a_broken_optional_package_harms_nothing(process: Process, broken: Path, bert: Path) -> None:
    code = "from hf_compress.cli.main import main; main()"
    result = process("-c", code, "quantize", bert, "out", "--method", "rtn", "--dry-run", path=(broken,))
    assert result.returncode == 0, result.stderr
    assert "coverage 100.0%" in result.stdout
