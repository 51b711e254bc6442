from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_compress.cli.main import app
from tests._utils.tiny import tiny_dir, tiny_tokenizer

ROOT = Path(__file__).parents[3]

Run = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Run:
    """Runs a command in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Runs Python in a process of its own, with the package, its plugin and given folders on the path."""

    def run_process(*arguments: object, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        folders = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", *path)))
        environment = {**os.environ, "PYTHONPATH": folders, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    return run_process


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier without a tokenizer."""
    return tiny_dir("bert-classifier", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with a tokenizer."""
    path = tiny_dir("llama", tmp_path_factory.mktemp("models"))
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def quantized(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder at 4 bits. Tests must not change it."""
    path = tmp_path_factory.mktemp("quantized") / "llama-int4"
    arguments = ["quantize", str(llama), str(path), "--method", "rtn", "--group-size", "32"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path
