"""Errors teach: every provoked failure is typed and coded, names what it saw, and leaves nothing behind."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core import errors
from hf_compress.core.errors import HFCompressError

from . import (
    error_cases_backends,
    error_cases_calibration,
    error_cases_config,
    error_cases_files,
    error_cases_models,
    error_cases_training,
    error_cases_use,
)
from .error_cases import Arena, Case, CommandFailed, Library, fingerprint, tree

CASES: tuple[Case, ...] = (
    *error_cases_config.CASES,
    *error_cases_models.CASES,
    *error_cases_files.CASES,
    *error_cases_use.CASES,
    *error_cases_backends.CASES,
    *error_cases_calibration.CASES,
    *error_cases_training.CASES,
)

NOT_PROVOKED = {
    "HFCompressError": "the base, never raised itself",
    "PackedWeightError": "tests/invariants/test_honest.py: raised by writes to a tensor, not by an entry point",
    "RowError": "tests/conformance/test_kinds.py: raised in the forward of an embedding, not by an entry point",
}

EXAMPLES = {
    "HFC102": "coverage",
    "HFC201": "pattern-typo",
    "HFC202": "misspelt-key",
    "HFC204": "method-unknown",
    "HFC401": "group-size",
    "HFC402": "nan-live",
    "HFC405": "twice-live",
    "HFC406": "path-missing",
    "HFC701": "save-exists",
    "HFC702": "verify-flipped",
}
"""Codes whose example in docs/errors.md is the message of a case."""

BARE = (KeyError, AttributeError, NameError, IndexError, AssertionError, TypeError)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, worker: CleanWorker) -> Library:
    return Library(tmp_path_factory.mktemp("library"), worker)


@pytest.fixture
def arena(tmp_path: Path, library: Library, worker: CleanWorker, monkeypatch: pytest.MonkeyPatch) -> Arena:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Arena(tmp_path, library, worker, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_failure_is_typed_and_leaves_nothing(case: Case, arena: Arena) -> None:
    with torch.random.fork_rng(devices=[]):
        act = case.provoke(arena)
    files, models = tree(arena.folder), [fingerprint(model) for model in arena.models]

    # transformers draws values for weights that a checkpoint lacks before the load is refused.
    with torch.random.fork_rng(devices=[]), pytest.raises(Exception) as caught:  # noqa: PT011
        act()

    error = caught.value
    message = _of_command(case, str(error)) if isinstance(error, CommandFailed) else _of_library(case, error)
    for word in case.words:
        assert word in message
    assert "Traceback" not in message
    assert " object at 0x" not in message
    assert tree(arena.folder) == files
    assert [fingerprint(model) for model in arena.models] == models
    if EXAMPLES.get(case.code) == case.name:
        example = message.replace(f"{arena.folder}/", "")
        assert example in DOCS.read_text(encoding="utf-8")


def _of_command(case: Case, output: str) -> str:
    """What a command printed: one line, or an object with the same content."""
    if output.startswith("{"):
        assert json.loads(output)["error"]["code"] == case.code
        return output
    (line,) = output.splitlines()
    assert line.startswith(f"[{case.code}] ")
    return line


def _of_library(case: Case, error: Exception) -> str:
    """The message of a typed error that can travel between processes."""
    if not isinstance(error, HFCompressError):
        raise error
    assert not isinstance(error, BARE)
    assert type(error) is not HFCompressError
    assert error.code == case.code
    assert str(error).startswith(f"[{case.code}] ")
    assert bool(error.fix) or not case.fix
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes
    return str(error)


Interrupt = Callable[[Arena], Callable[[], object]]


def _stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


class _Stopping:
    """A tokenizer that the user interrupts."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")
        raise KeyboardInterrupt


def _in_weights(arena: Arena) -> Callable[[], object]:
    model = arena.packed()
    arena.patch.setattr("transformers.modeling_utils.safe_save_file", _stop)
    return lambda: hfc.save(model, arena.out, worker=arena.worker)


def _in_tokenizer(arena: Arena) -> Callable[[], object]:
    model = arena.packed()
    return lambda: hfc.save(model, arena.out, _Stopping(), worker=arena.worker)


def _in_proof(arena: Arena) -> Callable[[], object]:
    model = arena.packed()
    arena.patch.setattr(CleanWorker, "request", _stop)
    return lambda: hfc.save(model, arena.out, worker=arena.worker)


def _in_overwrite(arena: Arena) -> Callable[[], object]:
    model, path = arena.packed(), arena.checkpoint()
    arena.patch.setattr("hf_compress.checkpoint.save.prove", _stop)
    return lambda: hfc.save(model, path, overwrite=True, worker=arena.worker)


def _in_verify(arena: Arena) -> Callable[[], object]:
    path = arena.checkpoint()
    arena.patch.setattr(CleanWorker, "request", _stop)
    return lambda: hfc.verify(path, worker=arena.worker)


def _in_live(arena: Arena) -> Callable[[], object]:
    model = arena.live()
    return lambda: hfc.quantize(model, hfc.RTNQuantConfig(), progress=_stop)


def _in_id(arena: Arena) -> Callable[[], object]:
    path = arena.dense()
    return lambda: hfc.quantize(path, hfc.RTNQuantConfig(), progress=_stop)


@pytest.mark.parametrize(
    "interrupted", [_in_weights, _in_tokenizer, _in_proof, _in_overwrite, _in_verify, _in_live, _in_id]
)
def test_interrupted_run_leaves_nothing(interrupted: Interrupt, arena: Arena) -> None:
    act = interrupted(arena)
    files, models = tree(arena.folder), [fingerprint(model) for model in arena.models]

    with pytest.raises(KeyboardInterrupt):
        act()

    assert tree(arena.folder) == files
    assert [fingerprint(model) for model in arena.models] == models


def test_stock_refuses_guarded_checkpoint_with_our_code_in_its_config(arena: Arena) -> None:
    path = arena.checkpoint("gpt2")

    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(path)

    guard = json.loads((path / "config.json").read_text())["quantization_config"]["guard"]
    assert guard.startswith("HFC901")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_refuses_our_request_for_a_quantized_checkpoint(family: str, arena: Arena) -> None:
    """transformers' own error: it compares the two configurations before it asks us."""
    path = arena.checkpoint(family)

    with pytest.raises(ValueError, match="quantiz"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=hfc.RTNQuantConfig())


def _classes() -> dict[str, type[HFCompressError]]:
    found = vars(errors).items()
    return {name: kind for name, kind in found if inspect.isclass(kind) and issubclass(kind, HFCompressError)}


def test_every_class_is_provoked_or_excused() -> None:
    provoked = {case.code for case in CASES}
    kinds = _classes()

    assert provoked <= {kind.code for kind in kinds.values()}
    assert {name for name, kind in kinds.items() if kind.code not in provoked} == set(NOT_PROVOKED)


def test_codes_and_names_are_unique() -> None:
    codes = Counter(kind.code for kind in _classes().values())
    names = Counter(case.name for case in CASES)

    assert [code for code, count in codes.items() if count > 1] == []
    assert [name for name, count in names.items() if count > 1] == []
    assert {*EXAMPLES.values()} <= set(names)


def test_every_code_is_documented_once() -> None:
    rows = re.findall(r"^\| `(HFC\d{3})` \| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(rows) == sorted((kind.code, name) for name, kind in _classes().items())
