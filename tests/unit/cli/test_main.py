from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hf_compress import __version__
from hf_compress.cli.main import _Group
from hf_compress.cli.output import size
from hf_compress.core.errors import ConfigError

from .conftest import ROOT, Process, Run


def test_help_has_examples_and_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("quantize", "inspect", "verify", "capabilities", "doctor"):
        assert name in result.stdout
        own = run(name, "-h")
        assert own.exit_code == 0
        assert f"hf-compress {name}" in own.stdout
    assert run("--version").stdout == f"hf-compress {__version__}\n"


def test_unknown_commands_and_options_are_usage_errors(run: Run) -> None:
    assert run("quantise").exit_code == 2
    result = run("verify", "x", "--bits", "4")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize(
    ("error", "code", "seen"),
    [
        (ConfigError("two\nlines", "mend it"), 1, "[HFC202] two lines Fix: mend it\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_on_purpose_and_interrupts(error: BaseException, code: int, seen: str) -> None:
    result = CliRunner().invoke(_failing(error))
    assert (result.exit_code, result.stderr) == (code, seen)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(_failing(ZeroDivisionError()), catch_exceptions=False)


def _failing(error: BaseException) -> typer.Typer:
    """A program of the same kind with one command that raises."""
    app = typer.Typer(cls=_Group, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def command() -> None:
        raise error

    return app


def test_the_command_line_alone_does_not_import_torch(process: Process) -> None:
    # A bare parent package: importing the real one registers with transformers.
    code = (
        "import sys, types\n"
        "package = types.ModuleType('hf_compress')\n"
        f"package.__path__ = [{str(ROOT / 'hf_compress')!r}]\n"
        "sys.modules['hf_compress'] = package\n"
        "import hf_compress.cli.main\n"
        "print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    result = process("-c", code)
    assert result.stdout == "[]\n", result.stderr


def test_size() -> None:
    seen = [size(count) for count in (0, 999, 1000, 1_500_000, 2_000_000_000, 3_100_000_000_000)]
    assert seen == ["0 bytes", "999 bytes", "1.0 kB", "1.5 MB", "2.0 GB", "3.1 TB"]


def test_optimum_cli_runs_the_same_commands(process: Process, quantized: Path) -> None:
    script = Path(sys.executable).with_name("optimum-cli")
    seen = process(script, "compress", "inspect", quantized, "--quiet", "--json")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["by_scheme"]["int4-g32"]["weights"] == 14
    usage = process("-m", "optimum.commands.optimum_cli", "compress", "--help")
    assert usage.returncode == 0, usage.stderr
    assert "optimum-cli compress" in usage.stdout
    assert "quantize" in usage.stdout
