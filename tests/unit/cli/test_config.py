from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run


def test_a_recipe_quantizes(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, tmp_path / "out", "--config", "rtn-int4-small", "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert set(value["schemes"]) == {"int4-g64", "int8-channel", "kept"}
    assert value["proof"]["level"] == "full"
    record = json.loads((tmp_path / "out" / "hf_compress.json").read_text())
    assert record["plan"]["request"]["embeddings"] == "int8"


def test_options_beside_a_recipe_override_its_fields(run: Run, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: rtn\nbits: 3\ngroup_size: 32\nskip: [up_proj]\nrules: [{pattern: v_proj, bits: 8}]\n")

    def schemes(*options: object) -> dict[str, int]:
        result = run("inspect", llama, "--config", file, *options, "--json")
        assert result.exit_code == 0, result.output
        return {label: entry["weights"] for label, entry in json.loads(result.stdout)["schemes"].items()}

    low = ("--min-coverage", 0.5)
    assert schemes(*low) == {"int3-g32": 10, "int8-g32": 2, "kept": 4}
    assert schemes(*low, "--method", "rtn", "--bits", 2) == {"int2-g32": 10, "int8-g32": 2, "kept": 4}
    assert schemes(*low, "--group-size", "channel", "--skip", "down_proj", "--skip", "o_proj") == {
        "int3-channel": 8,
        "int8-channel": 2,
        "kept": 6,
    }


def test_inspect_with_a_recipe_plans(run: Run, llama: Path) -> None:
    result = run("inspect", llama, "-c", "cast-bf16")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("cast: 16 of 16 weights")


def test_a_codebook_can_be_chosen(run: Run, llama: Path) -> None:
    result = run("inspect", llama, "--method", "codebook", "--codebook", "kmeans", "--bits", 3)
    assert result.exit_code == 0, result.output
    assert "kmeans3-g64" in result.stdout


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--config", "rtn_int4"), 1, "[HFC202] There is no recipe 'rtn_int4'. Did you mean 'rtn-int4'"),
        (
            ("--config", "rtn-int4", "--method", "cast"),
            1,
            "[HFC202] --config rtn-int4 is a recipe of the method 'rtn'",
        ),
        (("--config", "rtn-int4", "--method", "rtm"), 1, "[HFC204] Unknown method 'rtm'"),
        (("--config", "cast-bf16", "--bits", "4"), 1, "[HFC202] Unknown key 'bits'"),
        (("--bits", "4"), 2, "--config"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_what_does_not_fit_is_refused(
    command: str, options: tuple[str, ...], code: int, words: str, run: Run, llama: Path, tmp_path: Path
) -> None:
    places = (llama, tmp_path / "out") if command == "quantize" else (llama,)
    result = run(command, *places, *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_quantize_needs_a_method_or_a_recipe(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, tmp_path / "out")
    assert result.exit_code == 2
    assert "--method" in result.stderr
