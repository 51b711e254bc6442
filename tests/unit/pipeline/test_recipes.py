from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import hf_compress as hfc
from hf_compress.core.config import QuantConfig
from hf_compress.core.errors import ConfigError
from hf_compress.core.registry import untrained
from hf_compress.pipeline.recipes import FOLDER, LARGEST, load_config, recipe_names
from tests._utils.tiny import tiny

ROOT = Path(__file__).parents[3]

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a recipe."""

    def write(content: str | bytes, name: str = "mine.yaml") -> Path:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_says_when_and_what_it_costs_and_plans_a_model(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# Cost: ")
    config = load_config(name)
    assert config == QuantConfig.from_dict(config.to_dict())
    plan = hfc.plan(tiny("llama"), config)
    assert plan.method == config.method
    assert plan.coverage == 1.0
    assert f"| `{name}` | {lines[0][2:]} |" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    fields = set(yaml.safe_load("\n".join(lines))) - {"method"}
    assert fields <= set(plan.request)


def test_every_method_has_a_recipe() -> None:
    assert {load_config(name).method for name in recipe_names()} == set(untrained())


def test_the_link_at_the_top_shows_the_packaged_recipes() -> None:
    assert (ROOT / "configs").resolve() == FOLDER


def test_wheel_and_sdist_hold_the_recipes_and_the_matrix(tmp_path: Path) -> None:
    """A wheel is also built from the sdist: what is not in that is lost to most users."""
    wanted = {f"hf_compress/configs/{name}.yaml" for name in recipe_names()} | {"hf_compress/capabilities.json"}
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("hf_compress-*/")
    (second,) = WheelBuilder(str(source)).build(directory=str(tmp_path / "second"), versions=["standard"])
    assert wanted <= set(zipfile.ZipFile(second).namelist())


def test_yaml_and_json_give_the_same_configuration(written: Written) -> None:
    rules = [{"pattern": "v_proj", "bits": 8}]
    wanted = hfc.RTNQuantConfig(bits=3, group_size="channel", skip=["up_proj"], rules=rules)
    dictionary = wanted.to_diff_dict()
    assert load_config(written(json.dumps(dictionary, indent="\t"), "mine.JSON")) == wanted
    assert load_config(written(yaml.safe_dump(dictionary), "mine.yml")) == wanted
    assert load_config(str(written("\ufeff# mine\nmethod: rtn\nbits: 3\ngroup_size: -1\n"))).fields.bits == 3


def test_a_newer_recipe_loads_where_every_key_is_known(written: Written, caplog: pytest.LogCaptureFixture) -> None:
    file = written("version: 99.0\nmethod: rtn\nbits: 8")
    assert load_config(file) == hfc.RTNQuantConfig(bits=8)
    (said,) = caplog.messages
    assert said.startswith(f"{file} was written for hf_compress 99.0")
    file = written("method: rtn\nversion: 99.0\nbits: 8\nentropy: high\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert f"{file}, line 4: Unknown key 'entropy'." in caught.value.message
    assert "hf_compress 99.0" in caught.value.message
    assert caught.value.fix == "pip install --upgrade hf-compress"


def test_calibration_data_is_named_relative_to_the_recipe(written: Written, tmp_path: Path) -> None:
    texts = written("some text\n", "texts.txt")
    settings = "{path: texts.txt, rows: 9, sequence_length: 32, seed: 3, image_size: [8, 9]}"
    config = load_config(written(f"method: gptq\nbits: 3\ncalibration: {settings}\n"))
    assert config == hfc.GPTQQuantConfig(bits=3)
    wanted = hfc.Calibration(texts, rows=9, sequence_length=32, seed=3, image_size=(8, 9))
    assert vars(config.calibration) == vars(wanted)
    assert str(tmp_path) not in config.to_json_string()
    assert load_config(written("method: gptq\ncalibration: {path: generated}\n")).calibration.data == "generated"


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("# mine\nmethod: rtn\nbits: 99\n", 3, "bits=99 is not possible"),
        ("bits: 4\n\nmethod: rtm\n", 3, "Unknown method 'rtm'. Did you mean 'rtn'?"),
        ("method: rtn\ngroupsize: 4\n", 2, "Unknown key 'groupsize'. Did you mean 'group_size'"),
        ("method: rtn\nbits: 99\ntypo: 4\n", 3, "Unknown key 'typo'"),
        ("method: rtn\nrules:\n  - pattern: a\n    bits: 8\n  - pattern: b\n    bits: 9\n", 6, "In rules.1: bits=9"),
        ("method: rtn\nrules:\n  - {pattern: a}\n  - {bits: 9}\n", 4, "rules.1"),
        ("method: rtn\nskip: a\n", 2, "skip='a' is not a list"),
        ("method: rtn\nversion: one\n", 2, "version='one'"),
        ("method: gptq\nbits: 4\ncalibration: [a, b]\n", 3, "a recipe holds no calibration data"),
        ("method: rtn\nbits: 4\ncalibration: {rows: 9}\n", 3, "RTNQuantConfig needs no calibration data"),
        ("method: gptq\ncalibration:\n  rows: 9\n  row: 9\n", 4, "Unknown key 'row'. Did you mean 'rows'"),
        ("method: gptq\ncalibration:\n  path: generated\n  rows: 0\n", 4, "rows=0"),
        ("method: gptq\ncalibration:\n  rows: 9\n  path: absent.txt\n", 4, "There is no file"),
        ("method: gptq\ncalibration: {path: 3}\n", 2, "path=3 is not the name of a file"),
        ("method: rtn\nbits: 4\nbits: 8\n", 3, "the key 'bits' stands twice"),
        ("method: rtn\nrules:\n  - {pattern: a, pattern: b}\n", 3, "the key 'pattern' stands twice"),
        ("method: &name rtn\ncodebook: *name\n", 2, "aliases are not allowed"),
        ("method: rtn\nskip: &me [*me]\n", 2, "aliases are not allowed"),
        ("method: rtn\nbits: !!python/name:os.abort\n", 2, "python/name"),
        ("method: rtn\nskip: [a\n", 3, "expected ',' or ']'"),
        ("method: rtn\n\tbits: 4\n", 2, "'\\t'"),
        ("method: rtn\n? [a]\n: b\n", 2, "unhashable"),
        ("method: rtn\n---\nmethod: rtn\n", 2, "another document"),
    ],
)
def test_a_wrong_line_is_named(content: str, line: int, words: str, written: Written) -> None:
    file = written(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.message.startswith(f"{file}, line {line}: ")
    assert words in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "", "holds nothing"),
        ("a.yaml", "- method: rtn", "holds a list"),
        ("a.yaml", "rtn", "holds a str"),
        ("a.yaml", "method: rtn\n1: 2", "the key 1"),
        ("a.yaml", "bits: 4", "needs the key 'method'"),
        ("a.yaml", "method: rtn\nskip: [2024-99-99]", "month"),
        ("a.yaml", "[" * 50_000, "nested too deeply"),
        ("a.yaml", b"\x80\x04\x95", "not text"),
        ("a.yaml", b"method: rtn\x00", "special characters"),
        ("a.yaml", "#" * (LARGEST + 1), f"has {LARGEST + 1:,} bytes"),
        ("a.json", "[" * 50_000, "nested too deeply"),
        ("a.json", '{"method": "rtn",\n bits: 4}', "line 2"),
        ("a.json", '{"method": "rtn", "bits": 4, "bits": 8}', "the key 'bits' stands twice"),
        ("a.json", '{"method": "rtn", "bits": 99}', "bits=99"),
    ],
)
def test_what_is_no_recipe_is_refused(name: str, content: str | bytes, words: str, written: Written) -> None:
    file = written(content, name)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in caught.value.message
    assert words in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rtn_int4", "Did you mean 'rtn-int4'"),
        ("", "There is no recipe ''"),
        ("rtn-int4.yaml", "There is no file rtn-int4.yaml. Did you mean 'rtn-int4'"),
        ("nowhere/mine.yaml", "There is no file nowhere/mine.yaml"),
        (Path("rtn-int4"), "is not named like a recipe"),
        ("/dev/zero", "is not named like a recipe"),
        ("\0.yaml", "null byte"),
        ("a" * 300 + ".yaml", "can't be read"),
        (4, "got int"),
    ],
)
def test_what_is_not_there_is_refused(given: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(given)  # type: ignore[arg-type]
    assert words in caught.value.message
    assert caught.value.fix


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name in ("folder.yaml", "endless.yaml"):
        with pytest.raises(ConfigError, match="is not a file"):
            load_config(tmp_path / name)
