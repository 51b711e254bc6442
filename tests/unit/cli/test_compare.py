from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_compress.cli.compare import configurations
from hf_compress.core.errors import ConfigError
from hf_compress.evaluation.comparison import Comparison
from hf_compress.evaluation.comparison_files import read_comparison

from .conftest import Process, Run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("a first text\n\nand a second one\na third\n")
    return path


def test_writes_and_prints_a_table_with_a_failing_row(run: Run, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--methods", "rtn, int8_dynamic", "--config", _recipe(tmp_path), "--data", texts, "--out", out)
    result = run("compare", llama, *arguments, "--pairs", 8, "--bits", 8)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].strip() == "LlamaForCausalLM llama"
    for words in ("original, float32", "rtn-8bit-g64", "int8-dynamic", "perplexity", "full"):
        assert any(words in line for line in lines), words
    assert any(line.startswith("│ rtn-8bit-g48") and "failed: HFC401" in line for line in lines)
    assert any(line.startswith("rtn-8bit-g48: [HFC401] group_size=48") for line in lines)
    assert any(line.startswith("Size and perplexity: on the front: ") for line in lines)
    assert lines[-1] == f"saved  {out}"
    assert list(read_comparison(out).reports) == ["rtn-8bit-g64", "int8-dynamic"]


def _recipe(tmp_path: Path) -> Path:
    path = tmp_path / "wrong-group.yaml"
    path.write_text("method: rtn\ngroup_size: 48\n")
    return path


def test_json_is_the_comparison(run: Run, llama: Path) -> None:
    result = run("compare", llama, "--methods", "cast", "--pairs", 8, "--json")
    assert result.exit_code == 0, result.output
    found = Comparison.model_validate(json.loads(result.stdout))
    assert list(found.reports) == ["cast-bf16"]
    assert found.baseline.quality is None


def test_all_failing_exits_with_the_code(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("compare", llama, "--methods", "rtn,hqq", "--group-size", 48, "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("[HFC401] All 2 configurations failed. rtn-4bit-g48: [HFC401] ")
    assert not out.exists()
    as_json = run("compare", llama, "--methods", "rtn", "--group-size", 48, "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["error"]["code"]) == (1, "HFC401")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--methods", "rtn,int8_dynamik"), "HFC204", "Did you mean 'int8_dynamic'"),
        (("--methods", "int8_dynamic,cast", "--bits", 4), "HFC202", "None of int8_dynamic, cast has bits."),
        (("--methods", "rtn", "--bits", 9), "HFC202", "bits=9"),
        (("--config", "no-such-recipe"), "HFC202", "no-such-recipe"),
        (("--methods", "rtn", "--data", "absent.csv"), "HFC502", "absent.csv can't be read"),
        (("--methods", "rtn", "--task", "summary"), "HFC502", "summary"),
        (("--methods", "rtn", "--pairs", 2), "HFC601", "pairs=2"),
    ],
)
def test_refusals(run: Run, llama: Path, arguments: tuple[object, ...], code: str, words: str) -> None:
    result = run("compare", llama, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith(f"[{code}] ")
    assert words in result.stderr


def test_a_damaged_tokenizer_is_named_before_anything_is_quantized(
    run: Run, llama: Path, texts: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(llama, tmp_path / "damaged"))
    (damaged / "tokenizer_config.json").write_text("{")
    result = run("compare", damaged, "--methods", "rtn", "--data", texts, "--pairs", 8)
    assert (result.exit_code, result.stdout) == (1, "")
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"[HFC502] The tokenizer or processor of {damaged} can't be read: Expecting property name")
    assert "tokenizer.json" in said


def test_without_a_configuration_it_is_a_usage_error(run: Run, llama: Path) -> None:
    result = run("compare", llama)
    assert result.exit_code == 2
    assert "--methods" in result.stderr


def test_a_taken_output_names_the_option(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text("{}")
    result = run("compare", "no/such-model", "--methods", "rtn", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("[HFC701] ")
    assert "--overwrite" in result.stderr


@pytest.mark.parametrize("error", ["ImportError", "ValueError", "SystemError"])
def test_without_matplotlib_a_picture_is_refused_before_the_model_is_looked_at(
    error: str, process: Process, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text(f"raise {error}('planted')")
    code = "from hf_compress.cli.main import main; main()"
    arguments = ("compare", "no/such-model", "--methods", "rtn", "--out", tmp_path / "out")
    result = process("-c", code, *arguments, path=(blocked,))
    assert result.returncode == 1
    said = f"[HFC301] The package 'matplotlib' is installed but broken: {error}: planted."
    assert result.stderr.splitlines()[-1].startswith(said)
    assert 'pip install "hf-compress[eval]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_configurations_are_named_after_recipes_unless_an_option_changes_them(tmp_path: Path) -> None:
    made = configurations(["rtn", "rtn"], ["rtn-int8", str(_recipe(tmp_path))], bits=None, group_size=None)
    assert list(made) == ["rtn-4bit-g64", "rtn-4bit-g64-2", "rtn-int8", "wrong-group"]
    changed = configurations(["int8_dynamic"], [str(_recipe(tmp_path))], bits=None, group_size="32")
    assert {name: config.to_diff_dict().get("group_size") for name, config in changed.items()} == {
        "int8-dynamic": None,
        "rtn-4bit-g32": 32,
    }
    with pytest.raises(ConfigError, match="leave out --group-size"):
        configurations(["int8_dynamic"], [], bits=None, group_size="32")
