"""Results on disk: what is found is what was put, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import hf_compress as hfc
from hf_compress.apply.packing import pack_weight
from hf_compress.apply.planning import plan_model
from hf_compress.calibration.block import Finished
from hf_compress.checkpoint.results_store import (
    MANIFEST,
    Signature,
    open_store,
    passing_store,
    remove_store,
    signature_of,
)
from hf_compress.checkpoint.shards import safetensors_files
from hf_compress.core.errors import OutputExistsError, WriteError
from hf_compress.core.plan import Plan
from hf_compress.modules.packed import PackedTensor
from tests._utils.tiny import tiny, tiny_dir


def _finished(config: hfc.QuantConfig) -> tuple[Plan, Finished]:
    """The results of the first block of a tiny model, with changed values."""
    model = tiny("llama")
    plan = plan_model(model, config)
    finished = Finished(changed={"model.layers.0.input_layernorm.weight": torch.linspace(0, 1, 64).bfloat16()})
    for row in plan.quantized:
        if ".0." in row.name:
            packed, noise = pack_weight(row, model.get_submodule(row.module).weight, plan.method)
            finished.packed[row.name], finished.sqnr[row.name] = packed, noise
    return plan, finished


def _same(left: PackedTensor, right: PackedTensor) -> bool:
    found, wanted = left.parts(), right.parts()
    return left.layout == right.layout and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


CONFIGS = {
    "symmetric": hfc.RTNQuantConfig(bits=4),
    "asymmetric": hfc.RTNQuantConfig(bits=3, symmetric=False),
    "int8": hfc.RTNQuantConfig(bits=8, group_size="channel"),
    "codebook": hfc.CodebookQuantConfig(codebook="nf4"),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_put_is_found_again(name: str, tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS[name])
    state = {"hidden.0": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).bfloat16()}
    with open_store(tmp_path / "store", {"a": 1}, plan) as store:
        assert store.get("model.layers.0") is None
        assert store.state("model.layers.0") is None
        kept = store.put("model.layers.0", finished, state)
        assert all(_same(kept.packed[key], value) for key, value in finished.packed.items())
    with open_store(tmp_path / "store", {"a": 1}, plan) as store:
        found = store.get("model.layers.0")
        behind = store.state("model.layers.0")
        assert store.get("model.layers.1") is None
    assert found is not None
    assert found.sqnr == finished.sqnr
    assert found.packed.keys() == finished.packed.keys()
    assert all(_same(found.packed[key], value) for key, value in finished.packed.items())
    assert found.changed.keys() == finished.changed.keys()
    assert all(torch.equal(found.changed[key], value) for key, value in finished.changed.items())
    assert behind is not None
    assert torch.equal(behind["hidden.0"], state["hidden.0"])
    remove_store(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_passing_store_keeps_results_out_of_memory_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan, finished = _finished(CONFIGS["symmetric"])
    with passing_store(plan) as store:
        kept = store.put("0", finished, {"hidden.0": torch.ones(2)})
        assert store.state("0") is None
        assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".safetensors"]
        copies = {name: packed.clone() for name, packed in kept.packed.items()}
    assert list(tmp_path.iterdir()) == []
    assert all(_same(copies[name], packed) for name, packed in finished.packed.items())


@pytest.mark.parametrize("place", ["absent", "a file"])
def test_a_temporary_directory_that_cannot_be_used_is_told(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / place))
    with (
        pytest.raises(WriteError, match=r"temporary directory can't be used.*TMPDIR"),
        passing_store(_finished(CONFIGS["symmetric"])[0]),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_temporary_directory_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays, so nothing can be gone on with."""
    import resource

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan, finished = _finished(CONFIGS["symmetric"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with passing_store(plan) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(WriteError, match="Nothing was left behind") as raised:
                store.put("0", finished, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "goes on" not in raised.value.fix
    assert "TMPDIR" in raised.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_id_leaves_nothing_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_dir("llama", tmp_path / "source")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    data = hfc.Calibration([list(range(5, 69))] * 8, sequence_length=64, min_rows=1, min_tokens=1)
    config = hfc.GPTQQuantConfig(bits=4, group_size=32, calibration=data)
    streamed = hfc.quantize(source, config)
    assert list((tmp_path / "temporary").iterdir()) == []
    live = hfc.quantize(type(tiny("llama")).from_pretrained(source), config)
    found, wanted = streamed.state_dict(), live.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_states_are_forgotten_once_the_next_block_is_safe(tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    with open_store(tmp_path / "store", {}, plan) as store:
        store.put("0", finished, {"hidden.0": torch.ones(2)})
        store.put("1", finished, {"hidden.0": torch.zeros(2)}, forget="0")
        assert store.state("0") is None
        assert store.get("0") is not None
        behind = store.state("1")
        assert behind is not None
        assert torch.equal(behind["hidden.0"], torch.zeros(2))
        store.put("2", finished, {}, forget="1")
        assert store.state("2") == {}


def test_exact_weights_and_tensors_that_share_memory(tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    both = torch.arange(8.0)
    name = next(iter(finished.packed))
    finished.sqnr[name] = None
    finished.changed = {"a": both[:4], "b": both[4:], "c": both.view(2, 4).T}
    with open_store(tmp_path / "store", {}, plan) as store:
        found = store.put("0", finished, {})
    assert found.sqnr[name] is None
    assert all(torch.equal(found.changed[key], value) for key, value in finished.changed.items())


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_result_is_done_again(damage: str, tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    with open_store(tmp_path / "store", {}, plan) as store:
        store.put("0", finished, {})
        store.put("1", finished, {})
    (file, *_) = sorted((tmp_path / "store").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes({"bit": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[damage])
    with open_store(tmp_path / "store", {}, plan) as store:
        found = [store.get(key) for key in ("0", "1")]
        assert sum(one is None for one in found) == 1
        lost = str(found.index(None))
        store.put(lost, finished, {})
        assert store.get(lost) is not None


def test_results_of_another_request_are_refused_or_replaced(tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    with open_store(tmp_path / "store", {"versions": {"torch": "1", "b": 2}, "threads": 2}, plan) as store:
        store.put("0", finished, {})
    other = {"versions": {"torch": "2", "b": 2}, "threads": 2}
    with (
        pytest.raises(OutputExistsError, match=r"versions differ \(versions\.torch '1' there, '2' now\)"),
        open_store(tmp_path / "store", other, plan),
    ):
        pass
    with open_store(tmp_path / "store", other, plan, overwrite=True) as store:
        assert store.get("0") is None
    (tmp_path / "store" / MANIFEST).write_text("{")
    with open_store(tmp_path / "store", {"threads": 3}, plan) as store:
        assert store.get("0") is None


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    plan, _ = _finished(CONFIGS["symmetric"])
    with (
        open_store(tmp_path / "store", {}, plan),
        pytest.raises(OutputExistsError, match="Another process"),
        open_store(tmp_path / "store", {}, plan),
    ):
        pass


def test_signature_tells_sources_and_requests_apart(tmp_path: Path) -> None:
    path = tiny_dir("llama", tmp_path / "a")
    model = tiny("llama")

    def signed(config: str = "symmetric") -> Signature:
        return signature_of(
            safetensors_files(path), AutoConfig.from_pretrained(path), plan_model(model, CONFIGS[config])
        )

    one = signed()
    assert one == signed()
    assert one != signed("asymmetric")
    (file,) = safetensors_files(path)
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1  # other weights of the same names, shapes, types and time
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert one != signed()
    content[-1] ^= 1  # the same weights at another time
    file.write_bytes(bytes(content))
    os.utime(file, ns=(0, 0))
    assert one == signed()
    moved = path.rename(tmp_path / "moved")
    config = AutoConfig.from_pretrained(moved)
    assert one == signature_of(safetensors_files(moved), config, plan_model(model, CONFIGS["symmetric"]))
    config.rms_norm_eps = 0.5  # the same weights with another function
    assert one != signature_of(safetensors_files(moved), config, plan_model(model, CONFIGS["symmetric"]))


def test_files_of_others_are_refused_and_stay(tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    names = ("notes.tmp", "model.safetensors", "run.state")
    (tmp_path / "store").mkdir()
    for name in names:
        (tmp_path / "store" / name).write_text("mine")
    for overwrite in (False, True):
        with (
            pytest.raises(OutputExistsError, match=r"model\.safetensors, notes\.tmp, run\.state"),
            open_store(tmp_path / "store", {}, plan, overwrite),
        ):
            pass
    # Beside results they are left alone.
    with open_store(tmp_path / "mixed", {"a": 1}, plan) as store:
        store.put("0", finished, {"hidden.0": torch.ones(2)})
    for name in names:
        (tmp_path / "mixed" / name).write_text("mine")
    with open_store(tmp_path / "mixed", {"a": 2}, plan, overwrite=True) as store:
        assert store.get("0") is None
        store.put("0", finished, {})
    remove_store(tmp_path / "mixed")
    for folder in ("store", "mixed"):
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == sorted(names)
        assert all((tmp_path / folder / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("manifest", ["{", "[]"])
def test_a_manifest_of_others_is_not_taken_over(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / MANIFEST).write_text(manifest)
    (tmp_path / "store" / "photo.jpg").write_text("mine")
    plan, _ = _finished(CONFIGS["symmetric"])
    with (
        pytest.raises(OutputExistsError, match=r"something else: photo\.jpg"),
        open_store(tmp_path / "store", {}, plan),
    ):
        pass
    assert (tmp_path / "store" / MANIFEST).read_text() == manifest


def test_what_a_kill_before_the_manifest_left_is_taken_over(tmp_path: Path) -> None:
    plan, finished = _finished(CONFIGS["symmetric"])
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / f"{MANIFEST}.tmp").write_text("{")
    with open_store(tmp_path / "store", {}, plan) as store:
        store.put("0", finished, {})
    remove_store(tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_that_cannot_be_read_is_refused(overwrite: bool, tmp_path: Path) -> None:
    plan, _ = _finished(CONFIGS["symmetric"])
    (tmp_path / "store" / MANIFEST).mkdir(parents=True)
    with (
        pytest.raises(OutputExistsError, match=r"manifest\.json can't be read: .*directory"),
        open_store(tmp_path / "store", {}, plan, overwrite),
    ):
        pass


FULL = """
import resource, sys
from pathlib import Path
import torch
from hf_compress.calibration.block import Finished
from hf_compress.checkpoint.results_store import open_store
from hf_compress.core.errors import WriteError
from hf_compress.core.plan import Plan
plan = Plan(method="rtn", request={}, format="dense", rows=(), small_parameters=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with open_store(Path(sys.argv[1]), {}, plan) as store:
    store.put("0", Finished(changed={"a": torch.ones(100)}), {})
    try:
        store.put("1", Finished(changed={"a": torch.ones(100_000)}), {})
    except WriteError as error:
        print(error)
    print(store.get("0") is not None, store.get("1"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "store")], capture_output=True, text=True, timeout=120, check=True
    )
    assert "What is finished stays there" in done.stdout
    assert "goes on from there" in done.stdout
    assert done.stdout.splitlines()[-1] == "True None"
    with open_store(
        tmp_path / "store", {}, Plan(method="rtn", request={}, format="dense", rows=(), small_parameters=0)
    ):
        assert not list((tmp_path / "store").glob("*.tmp"))
