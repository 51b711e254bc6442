from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.checkpoint.record import read_record
from hf_compress.cli.options import calibration, configuration

from .conftest import Run

SMALL = ("--group-size", 32, "--sequence-length", 32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(f"line {index} has some words about the number {index * index}\n" for index in range(99)))
    return path


def test_quantizes_with_texts_of_a_file(run: Run, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = ("--calibration", texts, "--rows", 12, "--seed", 5)
    result = run("quantize", llama, out, "--method", "gptq", "--no-act-order", *SMALL, *data, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["proof"]["level"] == "full"
    plan = read_record(out).plan
    assert plan.calibration is not None
    assert (plan.calibration.rows, plan.calibration.seed, plan.calibration.sequence_length) == (12, 5, 32)
    assert plan.request["act_order"] is False
    assert str(texts) not in (out / "hf_compress.json").read_text()
    config = hfc.GPTQQuantConfig(group_size=32, act_order=False)
    wanted = hfc.quantize(llama, config, hfc.Calibration(texts, rows=12, sequence_length=32, seed=5))
    hfc.save(wanted, tmp_path / "wanted")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_quantizes_with_text_that_the_model_writes(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", llama, out, "-m", "gptq", *SMALL, "--calibration", "generated", "--rows", 8, "--json")
    assert result.exit_code == 0, result.output
    plan = read_record(out).plan
    assert plan.calibration is not None
    assert (plan.calibration.source, plan.calibration.rows) == ("self-generated", 8)
    data = hfc.Calibration.generated(rows=8, sequence_length=32)
    live = AutoModelForCausalLM.from_pretrained(llama)
    hfc.save(hfc.quantize(live, hfc.GPTQQuantConfig(group_size=32), data), tmp_path / "live")
    hfc.save(hfc.quantize(llama, hfc.GPTQQuantConfig(group_size=32), data), tmp_path / "read")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "live" / name).read_bytes()
    assert (out / name).read_bytes() == (tmp_path / "read" / name).read_bytes()


def test_a_dry_run_looks_at_the_data(run: Run, llama: Path, bert: Path, texts: Path, tmp_path: Path) -> None:
    def told(model: Path, *options: object) -> str:
        result = run("quantize", model, tmp_path / "out", "-m", "gptq", *SMALL, "--dry-run", "--quiet", *options)
        assert result.exit_code == (1 if result.stderr else 0), result.output
        return result.stderr

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert told(llama) == told(llama, "--calibration", texts) == told(llama, "--calibration", "generated") == ""
    assert "[HFC501] absent.txt can't be read" in told(llama, "--calibration", "absent.txt")
    assert "empty" in told(llama, "--calibration", empty)
    assert "no file of a known form" in told(llama, "--calibration", texts.parent)
    assert "has no default: it is no language model" in told(bert)
    assert "can't make its own calibration data" in told(bert, "--calibration", "generated")
    assert list(tmp_path.iterdir()) == [empty]


def test_compares_with_one_set_of_data_for_those_that_need_it(run: Run, llama: Path, texts: Path) -> None:
    data = ("--calibration", texts, "--rows", 8, "--sequence-length", 32)
    result = run("compare", llama, "--methods", "rtn,gptq", "--group-size", 32, *data, "--pairs", 8, "--json")
    assert result.exit_code == 0, result.output
    assert [entry["name"] for entry in json.loads(result.stdout)["entries"]] == ["rtn-4bit-g32", "gptq-4bit-g32"]
    assert all(entry["error"] is None for entry in json.loads(result.stdout)["entries"])


def test_data_that_no_method_takes_is_refused(run: Run, llama: Path, texts: Path) -> None:
    result = run("compare", llama, "--methods", "rtn,cast", "--calibration", texts)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("[HFC501] Calibration data was given, but none of rtn-4bit-g64")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("-m", "rtn", "--rows", 9), "HFC501", "RTNQuantConfig needs no calibration data"),
        (("-m", "gptq", "--rows", 0), "HFC501", "rows=0"),
        (("-m", "gptq", "--seed", -1), "HFC501", "seed=-1"),
        (("-m", "gptq", "--sequence-length", 1), "HFC501", "sequence_length=1"),
        (("-m", "gptq", "--observer", "mse"), "HFC202", "Unknown key 'observer'"),
        (("-m", "int8_static", "--observer", "mode"), "HFC202", "observer='mode'"),
        (("-m", "int8_static", "--smoothing", 2), "HFC202", "smoothing=2.0"),
        (("-m", "autoround", "--preset", "slow"), "HFC202", "preset='slow'"),
        (("-m", "autoround", "--iterations", -1), "HFC202", "iterations=-1"),
        (("-c", "rtn-int4", "--act-order"), "HFC202", "Unknown key 'act_order'"),
        (("-m", "gptq", *SMALL, "--calibration", "absent.txt"), "HFC501", "absent.txt"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    options: tuple[object, ...], code: str, words: str, run: Run, llama: Path, tmp_path: Path
) -> None:
    result = run("quantize", llama, tmp_path / "out", *options)
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith(f"[{code}] ")
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_options_change_the_data_of_a_recipe(texts: Path) -> None:
    recipe = texts.with_name("mine.yaml")
    recipe.write_text("method: gptq\nbits: 3\ncalibration: {path: texts.txt, rows: 9, seed: 4}\n")
    as_written = configuration(None, str(recipe))
    changed = configuration(None, str(recipe), rows=8, bits=2)
    assert as_written is not None
    assert changed is not None
    assert vars(as_written.calibration) == vars(hfc.Calibration(texts, rows=9, seed=4))
    assert vars(changed.calibration) == vars(hfc.Calibration(texts, rows=8, seed=4))
    assert changed.fields.bits == 2


def test_generated_data_is_no_file() -> None:
    made = calibration(None, {"calibration": "generated", "rows": 8})
    assert vars(made) == vars(hfc.Calibration.generated(rows=8))
    assert calibration(None, {"bits": 4}) is None
