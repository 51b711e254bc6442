"""The probed matrix is whole, its pages show it, and a sample of it is still true."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core.errors import CorruptCheckpointError
from hf_compress.core.registry import FORMATS
from hf_compress.pipeline.capabilities import Cell, read_capabilities
from scripts import capabilities

FOUND = read_capabilities()


def _sample() -> list[Cell]:
    """Cells in an order that looks random and never changes, each of which adds a pair that no earlier one has."""
    kinds = {family.name: family.kinds for family in FOUND.families}
    methods = {recipe.name: recipe.method for recipe in FOUND.recipes}
    seen: set[tuple[str, str]] = set()
    chosen = []
    for cell in sorted(FOUND.cells, key=lambda cell: hashlib.sha256("/".join(cell.key).encode()).digest()):
        pairs = {(methods[cell.recipe], cell.asked), *((cell.asked, kind) for kind in kinds[cell.family])}
        if not pairs <= seen:
            seen |= pairs
            chosen.append(cell)
    return chosen


def test_every_cell_is_there_and_none_failed() -> None:
    assert list(capabilities.check_data(FOUND)) == []


def test_the_pages_show_the_data() -> None:
    assert capabilities.written(FOUND, write=False) == []


def test_every_refusal_says_what_to_do() -> None:
    refused = [cell for cell in FOUND.cells if cell.result == "refused"]
    assert refused
    assert all(cell.code.startswith("HFC") and cell.message and cell.fix for cell in refused)


def test_the_file_is_what_the_prober_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = capabilities.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(capabilities, "FILE", tmp_path / "capabilities.json")
    capabilities.write(FOUND)
    assert (tmp_path / "capabilities.json").read_text(encoding="utf-8") == committed


def test_cells_of_other_versions_are_neither_kept_nor_stamped_with_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capabilities, "FILE", tmp_path / "capabilities.json")
    capabilities.write(FOUND.model_copy(update={"versions": capabilities.versions()}))
    assert len(capabilities.before()) == len(FOUND.cells)
    old = FOUND.model_copy(update={"versions": {**capabilities.versions(), "torch": "2.0.0"}})
    capabilities.write(old)
    assert capabilities.merged([FOUND.cells[0]]).cells == (FOUND.cells[0],)
    monkeypatch.setattr("sys.argv", ["capabilities.py", "--recipe", "nf4"])
    with pytest.raises(SystemExit):
        capabilities.main()
    assert "probed with torch 2.0.0; probe everything" in capsys.readouterr().err
    assert capabilities.read() == old
    assert capabilities.other_versions(capabilities.keys()) == ""


@pytest.mark.parametrize("cell", _sample(), ids=lambda cell: "-".join(cell.key))
def test_a_cell_is_still_true(cell: Cell, worker: CleanWorker) -> None:
    """A format whose stock reader is not installed here is proven by our own reader only."""
    found = capabilities.probe(cell.key, worker)
    if cell.format and found.proof == "own-reader":
        reader = getattr(FORMATS.get(cell.format), "stock_reader")  # noqa: B009 - not in the planning protocol
        assert not worker.request("has", package=reader).get("importable")
        found = found.model_copy(update={"proof": cell.proof})
    assert found == cell, f"if this change is meant: python scripts/capabilities.py --recipe {cell.recipe}"


def test_the_prober_finds_a_model_that_loads_differently(worker: CleanWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    load = capabilities.hfc.load

    @torch.no_grad()
    def load_damaged(path: Path) -> torch.nn.Module:
        model: torch.nn.Module = load(path)
        model.lm_head.weight[3, 5] += 1e-3
        return model

    monkeypatch.setattr(capabilities.hfc, "load", load_damaged)
    found = capabilities.probe(("rtn-int4", "llama", "auto"), worker)
    assert (found.result, found.format) == ("failed", "compressed-tensors")
    assert "differ" in found.message


def test_the_prober_finds_an_error_that_is_not_typed(worker: CleanWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("weight")

    monkeypatch.setattr(capabilities.hfc, "save", fail)
    found = capabilities.probe(("rtn-int4", "llama", "auto"), worker)
    assert (found.result, found.message) == ("failed", "KeyError: 'weight'")


def test_a_damaged_matrix_is_a_typed_error(tmp_path: Path) -> None:
    file = tmp_path / "capabilities.json"
    for text in ("", "{", '{"cells": []}'):
        file.write_text(text)
        with pytest.raises(CorruptCheckpointError, match=r"capabilities\.json"):
            read_capabilities(file)
    with pytest.raises(CorruptCheckpointError):
        read_capabilities(tmp_path / "absent.json")
