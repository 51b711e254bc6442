from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass

import pytest

from hf_compress.core.errors import FormatError, HFCompressError, MethodError, listed, nearest
from hf_compress.core.registry import FORMATS, METHODS, Registry


@dataclass(frozen=True)
class Entry:
    name: str


def test_built_ins() -> None:
    assert {"rtn", "int8_dynamic", "cast"} <= set(METHODS.names())
    assert {"compressed-tensors", "guarded", "dense"} <= set(FORMATS.names())
    for method in METHODS:
        assert METHODS.get(method.config.method) is method
        assert method.config().spec is method
        assert method.summary
    assert [entry.name for entry in FORMATS] == FORMATS.names()


def test_duplicates_are_refused() -> None:
    registry: Registry[Entry] = Registry("thing")
    first = registry.register(Entry("a"))
    with pytest.raises(MethodError, match="The thing 'a' is registered already"):
        registry.register(Entry("a"))
    assert registry.get("a") is first


def test_unknown_name_lists_the_known() -> None:
    registry: Registry[Entry] = Registry("thing")
    registry.register(Entry("gptq"))
    with pytest.raises(MethodError, match=r"Unknown thing 'gptp'.*Did you mean 'gptq'") as caught:
        registry.get("gptp")
    assert caught.value.fix == "choose one of gptq"
    assert registry.names() == ["gptq"]


def test_declared_is_imported_when_asked_for() -> None:
    registry: Registry[Entry] = Registry("thing")
    registry.declare("late", "wave")
    sys.modules.pop("wave", None)
    assert registry.names() == ["late"]
    assert "wave" not in sys.modules
    with pytest.raises(MethodError):
        registry.get("late")
    assert "wave" in sys.modules


def subclasses(kind: type[HFCompressError]) -> list[type[HFCompressError]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in subclasses(sub))]


def test_codes_are_unique() -> None:
    kinds = [kind for kind in subclasses(HFCompressError) if kind.__module__.startswith("hf_compress.core")]
    assert len({kind.code for kind in kinds}) == len(kinds) > 20


def test_error_says_code_and_fix_and_survives_a_process_boundary() -> None:
    error = FormatError("it is 3.", "make it 4")
    assert str(error) == "[HFC801] it is 3. Fix: make it 4"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is FormatError
    assert (again.message, again.fix, str(again)) == (error.message, error.fix, str(error))
    assert str(HFCompressError("plain")) == "[HFC000] plain"


def test_helpers() -> None:
    assert nearest("bit", ["bits", "group_size"]) == "Did you mean 'bits'?"
    assert nearest("zzz", ["bits"]) == ""
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefg", 2) == "a, b and 5 more"
