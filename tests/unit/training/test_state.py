"""The file in a Trainer's checkpoint that holds what callbacks keep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.core.errors import CorruptCheckpointError, ResumeError, WriteError
from hf_compress.training.state import FILE, TRAINER_STATE, Section, read_section, write_section

CONFIG = {"bits": 4, "skip": ("head",), "start": 0.1, "nested": {"every": [1, 2]}}


def tensors() -> dict[str, torch.Tensor]:
    """Of several types and forms."""
    return {
        "layer.0.weight": torch.arange(6.0).reshape(2, 3).T,
        "mask": torch.tensor([True, False]),
        "moment": torch.tensor(3.5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "nothing": torch.empty(0),
    }


def test_a_section_comes_back(tmp_path: Path) -> None:
    write_section(tmp_path, "qat", Section(CONFIG, 12, tensors(), length=40))
    found = read_section(tmp_path, "qat", CONFIG, 12)
    assert (found.step, found.length) == (12, 40)
    assert found.config == {**CONFIG, "skip": ["head"]}
    assert found.tensors.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)


def test_sections_do_not_touch_each_other(tmp_path: Path) -> None:
    write_section(tmp_path, "a", Section({"x": 1}, 3, {"t": torch.ones(2)}))
    write_section(tmp_path, "ab", Section({"x": 2}, 3, {"t": torch.zeros(2)}))
    write_section(tmp_path, "a", Section({"x": 3}, 4, {"u": torch.full((1,), 5.0)}))
    assert read_section(tmp_path, "ab", {"x": 2}, 3).tensors["t"].tolist() == [0, 0]
    again = read_section(tmp_path, "a", {"x": 3}, 4)
    assert {name: value.tolist() for name, value in again.tensors.items()} == {"u": [5.0]}


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("pruning", "qat"):
            write_section(tmp_path / folder, name, Section(CONFIG, 12, tensors()))
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    assert [file.name for file in (tmp_path / "one").iterdir()] == [FILE]


def test_missing_file_and_section_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="not written by a run with this callback"):
        read_section(tmp_path, "qat", {}, 1)
    write_section(tmp_path, "pruning", Section({}, 1))
    with pytest.raises(ResumeError, match=r"holds state of pruning, not of 'qat'"):
        read_section(tmp_path, "qat", {}, 1)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"bits": 3, "start": 0.1}, "bits was 4 and is 3"),
        ({"bits": 4}, "start was 0.1 and is None"),
        ({"bits": 4, "start": 0.1, "freeze": 9}, "freeze was None and is 9"),
    ],
)
def test_changed_configuration_names_the_change(now: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_section(tmp_path, "qat", Section({"bits": 4, "start": 0.1}, 1))
    with pytest.raises(ResumeError, match=said):
        read_section(tmp_path, "qat", now, 1)


def test_another_step_is_refused(tmp_path: Path) -> None:
    write_section(tmp_path, "qat", Section({}, 10))
    with pytest.raises(ResumeError, match="of step 10, the checkpoint of step 20"):
        read_section(tmp_path, "qat", {}, 20)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _foreign(file: Path) -> None:
    save_file({"weight": torch.ones(1)}, file)


def _no_json(file: Path) -> None:
    save_file(load_file(file), file, metadata={"hf_compress": "{"})


def _other_json(file: Path) -> None:
    save_file(load_file(file), file, metadata={"hf_compress": '{"qat": {"step": 1}}'})


def _text(file: Path) -> None:
    file.write_text("hello")


@pytest.mark.parametrize("damage", [_truncated, _foreign, _no_json, _other_json, _text])
def test_damaged_file_is_told_when_read_and_replaced_when_written(damage: Any, tmp_path: Path) -> None:
    """A directory that was used before must not stop a new run at its first checkpoint."""
    write_section(tmp_path, "qat", Section({}, 1, tensors()))
    damage(tmp_path / FILE)
    with pytest.raises(CorruptCheckpointError, match=FILE) as raised:
        read_section(tmp_path, "qat", {}, 1)
    assert raised.value.fix == "resume from another checkpoint"
    assert "Error(" not in raised.value.message  # one message, not one inside of another
    write_section(tmp_path, "qat", Section({}, 2, tensors()))
    assert read_section(tmp_path, "qat", {}, 2).tensors.keys() == tensors().keys()


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    import resource

    write_section(tmp_path, "qat", Section({}, 1, {"small": torch.ones(3)}))
    before = (tmp_path / FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="File too large"):
            write_section(tmp_path, "qat", Section({}, 2, {"large": torch.ones(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_sections_of_an_earlier_run_are_not_kept(tmp_path: Path) -> None:
    """A reused output directory: the Trainer writes its state anew, and nothing of ours may survive from before."""
    (tmp_path / TRAINER_STATE).write_text('{"global_step": 3, "run": 1}', encoding="utf-8")
    write_section(tmp_path, "one", Section({"a": 1}, 3, {"x": torch.ones(2)}))
    write_section(tmp_path, "two", Section({"b": 1}, 3, {"y": torch.ones(2)}))
    assert read_section(tmp_path, "one", {"a": 1}, 3).tensors["x"].sum() == 2
    (tmp_path / TRAINER_STATE).write_text('{"global_step": 3, "run": 2}', encoding="utf-8")
    write_section(tmp_path, "two", Section({"b": 2}, 3))
    assert read_section(tmp_path, "two", {"b": 2}, 3).tensors == {}
    with pytest.raises(ResumeError, match="not of 'one'"):
        read_section(tmp_path, "one", {"a": 1}, 3)
