"""Failures of saving, loading, verifying and inspecting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.core import errors

from .error_cases import Act, Arena, Case, edit_json, edit_record, edit_row, edit_weights, weights_of

LAYER = "model.layers.0.self_attn.q_proj"
"""The first row that is quantized."""

FULL_DISK = """
import json, resource, sys
import hf_compress as hfc
from tests._utils.tiny import tiny
model = hfc.quantize(tiny("llama"), hfc.RTNQuantConfig())
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    hfc.save(model, sys.argv[1])
except hfc.HFCompressError as error:
    print(json.dumps([type(error).__name__, error.message, error.fix]))
"""


def save(prepare: Callable[[Arena], Any] = lambda arena: arena.packed(), **options: Any) -> Any:
    """A row's call: saving what is prepared to the arena's output; callable options get the arena."""

    def provoke(arena: Arena) -> Act:
        model = prepare(arena)
        given = {name: value(arena) if callable(value) else value for name, value in options.items()}
        path = given.pop("path", arena.out)
        return lambda: hfc.save(model, path, **{"worker": arena.worker, **given})

    return provoke


def read(entry: str, prepare: Callable[[Arena], Any], **options: Any) -> Any:
    """A row's call: `load`, `verify` or `inspect` of the path that is prepared."""

    def provoke(arena: Arena) -> Act:
        path = prepare(arena)
        given = {"worker": arena.worker, **options} if entry == "verify" else options
        return lambda: getattr(hfc, entry)(path, **given)

    return provoke


def _dense(arena: Arena) -> Path:
    return arena.dense()


def _missing(arena: Arena) -> Path:
    return arena.folder / "none"


def _empty(arena: Arena) -> Path:
    (arena.folder / "empty").mkdir()
    return arena.folder / "empty"


def _file(arena: Arena) -> Path:
    (arena.folder / "file").write_text("x")
    return arena.folder / "file"


def _link(arena: Arena) -> Path:
    (arena.folder / "link").symlink_to(_empty(arena))
    return arena.folder / "link"


def _folder_with_notes(arena: Arena) -> Path:
    folder = _empty(arena)
    (folder / "notes.txt").write_text("mine")
    return folder


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def _read_only(arena: Arena) -> Act:
    model = arena.packed()
    parent = Path(mkdtemp(prefix="hfc-read-only-", dir="/tmp"))
    parent.chmod(0o555)

    def act() -> None:
        try:
            with _as_nobody():
                hfc.save(model, parent / "out", worker=arena.worker)
        finally:
            left = list(parent.iterdir())
            shutil.rmtree(parent)
            if left:
                raise RuntimeError(f"left behind: {left}")

    return act


def _full_disk(arena: Arena) -> Act:
    def act() -> None:
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(arena.out)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not done.stdout.strip():
            raise RuntimeError(done.stderr[-2000:] or "saved on a full disk")
        kind, message, fix = json.loads(done.stdout.splitlines()[-1])
        raise getattr(errors, kind)(message, fix)

    return act


def _small_disk(arena: Arena) -> Act:
    model = arena.packed()
    arena.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    return lambda: hfc.save(model, arena.out, worker=arena.worker)


def _killed_worker(arena: Arena) -> Act:
    model, worker = arena.packed(), CleanWorker()
    worker.request("ping")

    def act() -> None:
        with worker:
            os.kill(worker.pid or 0, signal.SIGKILL)
            hfc.save(model, arena.out, worker=worker)

    return act


def _closed(arena: Arena) -> CleanWorker:
    worker = CleanWorker()
    worker.close()
    return worker


def _slow(arena: Arena) -> CleanWorker:
    return CleanWorker(timeout=0.01)


def _changed_forward(arena: Arena) -> Any:
    """A model that computes something its checkpoint doesn't tell."""
    model = arena.packed()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * 1.5)
    return model


def changed(name: str, text: str | bytes | None, family: str = "llama", **options: Any) -> Callable[[Arena], Path]:
    """A checkpoint of ours with another content of one file; None deletes it."""

    def prepare(arena: Arena) -> Path:
        folder = arena.checkpoint(family, **options)
        file = weights_of(folder) if name == "weights" else folder / name
        if text is None:
            file.unlink()
        else:
            file.write_bytes(text.encode() if isinstance(text, str) else text)
        return folder

    return prepare


def _truncated(arena: Arena) -> Path:
    folder = arena.checkpoint()
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def _flipped(arena: Arena) -> Path:
    folder = arena.checkpoint()
    file = weights_of(folder)
    data = bytearray(file.read_bytes())
    data[-100] ^= 0xFF
    file.write_bytes(data)
    return folder


def tensors(change: Callable[[dict[str, Tensor]], object], family: str = "llama", **options: Any) -> Any:
    """A checkpoint of ours with other tensors."""
    return lambda arena: edit_weights(arena.checkpoint(family, **options), change)


def row(family: str = "llama", **values: Any) -> Callable[[Arena], Path]:
    """A checkpoint of ours whose plan says something else about its first quantized weight."""
    return lambda arena: edit_row(arena.checkpoint(family), **values)


def weights_scheme(**values: Any) -> Callable[[Arena], Path]:
    """A checkpoint of ours whose plan has another grid for its first quantized weight."""

    def change(record: dict[str, Any]) -> None:
        rows = [one for one in record["plan"]["rows"] if one["quantization"] is not None]
        rows[0]["quantization"]["weights"].update(values)

    return lambda arena: edit_record(arena.checkpoint(), change)


def record(change: Callable[[dict[str, Any]], object], name: str = "hf_compress.json") -> Callable[[Arena], Path]:
    """A checkpoint of ours with another JSON file."""
    return lambda arena: edit_json(arena.checkpoint() / name, change).parent


def _without_native_config(arena: Arena) -> Path:
    """Stock would start from random weights."""
    folder = arena.unproven()
    edit_json(folder / "config.json", lambda values: values.pop("quantization_config"))
    return folder


def _verify_slow(arena: Arena) -> Act:
    path, worker = arena.checkpoint(), _slow(arena)
    return lambda: hfc.verify(path, worker=worker)


def _ids(value: int) -> dict[str, Tensor]:
    return {"input_ids": torch.full((1, 4), value)}


def _experts_row(arena: Arena, **values: Any) -> Path:
    def change(record: dict[str, Any]) -> None:
        next(one for one in record["plan"]["rows"] if one["kind"] == "experts").update(values)

    return edit_record(arena.checkpoint("mixtral"), change)


def _no_grid(arena: Arena) -> Path:
    def change(record: dict[str, Any]) -> None:
        rows = [one for one in record["plan"]["rows"] if one["quantization"] is not None]
        rows[0]["quantization"]["weights"] = None

    return edit_record(arena.checkpoint(), change)


WRONG_PATHS = (("none", None), ("number", 42))
FAR = (1 << 60, 1 << 60)

CASES = (
    # What can't be saved.
    Case(name="save-dense", provoke=save(lambda a: a.live()), code="HFC403", words=("LlamaFor", "quantize")),
    Case(name="save-none", provoke=save(lambda arena: None), code="HFC403", words=("NoneType",)),
    Case(name="save-string", provoke=save(lambda arena: "some/model"), code="HFC403", words=("str",)),
    Case(name="save-path-none", provoke=save(path=None), code="HFC202", words=("path", "NoneType")),
    Case(name="save-path-number", provoke=save(path=42), code="HFC202", words=("path", "int")),
    Case(name="save-tokenizer", provoke=save(tokenizer=object()), code="HFC202", words=("tokenizer", "object")),
    Case(name="save-tokenizer-id", provoke=save(tokenizer="gpt2"), code="HFC202", words=("tokenizer", "str")),
    Case(
        name="save-tokenizer-class",
        provoke=save(tokenizer=lambda arena: AutoTokenizer),
        code="HFC202",
        words=("tokenizer",),
    ),
    Case(name="save-inputs-text", provoke=save(inputs="a text"), code="HFC503", words=("text", "tensors")),
    Case(name="save-inputs-name", provoke=save(inputs={"input_idz": torch.ones(1)}), code="HFC503", words=("_ids",)),
    Case(name="save-inputs-empty", provoke=save(inputs=[]), code="HFC503", words=("non-empty", "[]")),
    Case(name="save-inputs-list", provoke=save(inputs=[{"input_ids": [1]}]), code="HFC503", words=("tensor", "[1]")),
    Case(name="save-inputs-ids", provoke=save(inputs=_ids(10**6)), code="HFC503", words=("inputs",)),
    # Where nothing can be saved.
    Case(
        name="save-exists",
        provoke=save(path=lambda arena: arena.checkpoint()),
        code="HFC701",
        words=("llama-packed", "exists", "overwrite=True"),
    ),
    Case(
        name="save-over-other-things",
        provoke=save(path=_folder_with_notes, overwrite=True),
        code="HFC701",
        words=("empty", "no checkpoint"),
    ),
    Case(name="save-over-file", provoke=save(path=_file), code="HFC701", words=("is a file",)),
    Case(name="save-over-link", provoke=save(path=_link), code="HFC701", words=("is a link",)),
    Case(name="save-below-file", provoke=save(path=lambda a: _file(a) / "out"), code="HFC704", words=("file/out",)),
    Case(name="save-long-name", provoke=save(path=lambda a: a.folder / ("x" * 300)), code="HFC704", words=("xxx",)),
    Case(name="save-null-byte", provoke=save(path=lambda a: a.folder / "a\0b"), code="HFC704", words=("null byte",)),
    Case(name="save-read-only", provoke=_read_only, code="HFC704", words=("Permission denied", "may write")),
    Case(name="save-full-disk", provoke=_full_disk, code="HFC704", words=("File too large", "Nothing was left")),
    Case(name="save-small-disk", provoke=_small_disk, code="HFC704", words=("1000 bytes free", "free some")),
    # Proofs.
    Case(
        name="save-other-outputs",
        provoke=save(_changed_forward),
        code="HFC703",
        words=("differs", "logits", "Nothing was written"),
    ),
    Case(name="save-worker-killed", provoke=_killed_worker, code="HFC706", words=("died", "-9")),
    Case(name="save-worker-closed", provoke=save(worker=_closed), code="HFC706", words=("closed",)),
    Case(name="save-worker-slow", provoke=save(worker=_slow), code="HFC706", words=("0.01 s",)),
    Case(name="verify-worker-slow", provoke=_verify_slow, code="HFC706", words=("0.01 s",)),
    Case(
        name="verify-missing-keys",
        provoke=read("verify", _without_native_config),
        code="HFC703",
        words=("missing keys", "weight"),
    ),
    Case(
        name="verify-flipped",
        provoke=read("verify", _flipped),
        code="HFC702",
        words=("Changed since", "model.safetensors"),
    ),
    Case(
        name="verify-file-gone",
        provoke=read("verify", changed("generation_config.json", None)),
        code="HFC702",
        words=("Changed since", "generation_config.json"),
    ),
    Case(
        name="verify-inputs",
        provoke=read("verify", lambda a: a.checkpoint(), inputs="a text"),
        code="HFC503",
        words=("text",),
    ),
    # No checkpoint.
    *(
        Case(
            name=f"{entry}-path-{name}",
            provoke=read(entry, lambda arena, given=given: given),
            code="HFC403",
            words=(type(given).__name__,),
        )
        for entry in ("load", "verify", "inspect")
        for name, given in WRONG_PATHS
    ),
    *(
        Case(name=f"{entry}-{name}", provoke=read(entry, prepare), code="HFC705", words=(word,))
        for entry in ("load", "verify", "inspect")
        for name, prepare, word in (
            ("missing", _missing, "none"),
            ("empty", _empty, "empty"),
            ("file", _file, "file"),
            ("dense", _dense, "from_pretrained"),
            ("null-byte", lambda arena: "a\0b", "a"),
        )
    ),
    # Damaged weights.
    Case(name="load-truncated", provoke=read("load", _truncated), code="HFC702", words=("whole safetensors",)),
    Case(name="verify-truncated", provoke=read("verify", _truncated), code="HFC702", words=("model.safetensors",)),
    Case(name="load-zero-bytes", provoke=read("load", changed("weights", b"")), code="HFC702", words=("safetensors",)),
    Case(name="load-no-weights", provoke=read("load", changed("weights", None)), code="HFC702", words=("no weights",)),
    Case(
        name="load-guarded-no-weights",
        provoke=read("load", changed("weights", None, "gpt2")),
        code="HFC702",
        words=("no weights",),
    ),
    Case(
        name="load-codes-gone",
        provoke=read("load", tensors(lambda found: found.pop(f"{LAYER}.weight_packed"))),
        code="HFC702",
        words=("q_proj",),
    ),
    Case(
        name="load-scale-gone",
        provoke=read("load", tensors(lambda found: found.pop(f"{LAYER}.weight_scale"))),
        code="HFC702",
        words=("weight_scale",),
    ),
    Case(
        name="load-zero-point-gone",
        provoke=read(
            "load", tensors(lambda found: found.pop(f"{LAYER}.weight_zero_point"), symmetric=False, group_size=32)
        ),
        code="HFC702",
        words=("weight_zero_point",),
    ),
    Case(
        name="load-norm-gone",
        provoke=read("load", tensors(lambda found: found.pop("model.norm.weight"))),
        code="HFC702",
        words=("model.norm",),
    ),
    Case(
        name="load-head-gone",
        provoke=read("load", tensors(lambda found: found.pop("lm_head.weight"))),
        code="HFC702",
        words=("lm_head",),
    ),
    Case(
        name="verify-head-gone",
        provoke=read(
            "verify", lambda arena: edit_weights(arena.unproven(), lambda found: found.pop("lm_head.weight"))
        ),
        code="HFC702",
        words=("lm_head",),
    ),
    Case(
        name="load-codes-shape",
        provoke=read("load", tensors(lambda found: found.update({f"{LAYER}.weight_packed": torch.ones(3, 5).int()}))),
        code="HFC702",
        words=("q_proj", "(3, 5)"),
    ),
    Case(
        name="load-scale-shape",
        provoke=read("load", tensors(lambda found: found.update({f"{LAYER}.weight_scale": torch.ones(3, 5)}))),
        code="HFC702",
        words=("q_proj", "(3, 5)"),
    ),
    Case(
        name="load-scale-integers",
        provoke=read("load", tensors(lambda found: found.update({f"{LAYER}.weight_scale": torch.ones(64, 1).int()}))),
        code="HFC702",
        words=("q_proj",),
    ),
    Case(
        name="load-codes-floating",
        provoke=read("load", tensors(lambda found: found.update({f"{LAYER}.weight_packed": torch.ones(64, 8)}))),
        code="HFC702",
        words=("q_proj",),
    ),
    Case(
        name="load-norm-shape",
        provoke=read("load", tensors(lambda found: found.update({"model.norm.weight": torch.ones(3)}))),
        code="HFC702",
        words=("model.norm",),
    ),
    Case(
        name="load-guarded-shape",
        provoke=read(
            "load",
            tensors(
                lambda found: found.update({"transformer.h.0.attn.c_attn.weight_packed": torch.ones(3, 5).int()}),
                "gpt2",
            ),
        ),
        code="HFC702",
        words=("c_attn", "(3, 5)"),
    ),
    # Damaged JSON.
    Case(name="load-config-json", provoke=read("load", changed("config.json", "{")), code="HFC702", words=("config",)),
    Case(
        name="load-config-gone", provoke=read("load", changed("config.json", None)), code="HFC702", words=("config",)
    ),
    Case(
        name="load-config-list", provoke=read("load", changed("config.json", "[]")), code="HFC702", words=("config",)
    ),
    Case(
        name="load-config-type",
        provoke=read("load", record(lambda values: values.update(model_type="fooo"), "config.json")),
        code="HFC702",
        words=("config.json", "fooo"),
    ),
    Case(
        name="load-config-class",
        provoke=read("load", record(lambda values: values.update(architectures=["FooModel"]), "config.json")),
        code="HFC403",
        words=("FooModel", "transformers"),
    ),
    Case(
        name="load-config-width",
        provoke=read("load", record(lambda values: values.update(hidden_size=32), "config.json")),
        code="HFC702",
        words=("q_proj", "(64, 32)"),
    ),
    Case(
        name="load-config-string",
        provoke=read("load", record(lambda values: values.update(hidden_size="64"), "config.json")),
        code="HFC702",
        words=("hidden_size",),
    ),
    Case(
        name="load-generation-json",
        provoke=read("load", changed("generation_config.json", "{")),
        code="HFC702",
        words=("generation_config",),
    ),
    *(
        Case(
            name=f"{entry}-record-json",
            provoke=read(entry, changed("hf_compress.json", "{")),
            code="HFC702",
            words=("record",),
        )
        for entry in ("load", "verify", "inspect")
    ),
    Case(
        name="inspect-record-bytes",
        provoke=read("inspect", changed("hf_compress.json", b"\xff\xfe")),
        code="HFC702",
        words=("hf_compress.json",),
    ),
    Case(
        name="inspect-record-list",
        provoke=read("inspect", changed("hf_compress.json", "[]")),
        code="HFC702",
        words=("record",),
    ),
    Case(
        name="inspect-newer",
        provoke=read("inspect", record(lambda values: values.update(schema_version=2))),
        code="HFC702",
        words=("schema_version", "upgrade"),
    ),
    Case(
        name="inspect-newer-plan",
        provoke=read("inspect", record(lambda values: values["plan"].update(schema_version=99))),
        code="HFC702",
        words=("schema_version", "upgrade"),
    ),
    Case(
        name="load-unknown-format",
        provoke=read("load", record(lambda values: values["plan"].update(format="zip"))),
        code="HFC702",
        words=("'zip'",),
    ),
    # Hostile plans.
    Case(name="load-module-gone", provoke=read("load", row(name="a.b", module="a.b")), code="HFC702", words=("a.b",)),
    Case(
        name="load-parent-path",
        provoke=read("load", row(name="../../x", module="../../x")),
        code="HFC702",
        words=("../../x",),
    ),
    Case(name="load-parameter", provoke=read("load", row(parameter="forward")), code="HFC702", words=("forward",)),
    Case(name="load-huge", provoke=read("load", row(shape=FAR)), code="HFC702", words=("q_proj", "(64, 64)")),
    Case(name="load-negative", provoke=read("load", row(shape=(-64, -64))), code="HFC702", words=("rows.1.shape",)),
    Case(name="load-no-shape", provoke=read("load", row(shape=())), code="HFC702", words=("rows.1.shape",)),
    Case(name="load-kind", provoke=read("load", row(kind="experts")), code="HFC702", words=("q_proj",)),
    Case(
        name="load-transposed",
        provoke=read("load", row(transposed=True, shape=(64, 64))),
        code="HFC702",
        words=("q_proj",),
    ),
    Case(
        name="load-parts",
        provoke=read("load", lambda a: _experts_row(a, parts=["{foo.__class__}"])),
        code="HFC702",
        words=("gate_up_proj", "experts"),
    ),
    Case(name="verify-dtype", provoke=read("verify", row(dtype="float33")), code="HFC702", words=("float33",)),
    Case(name="load-group-zero", provoke=read("load", weights_scheme(group_size=0)), code="HFC702", words=("group",)),
    Case(name="load-bits", provoke=read("load", weights_scheme(num_bits=0)), code="HFC702", words=("q_proj", "codes")),
    Case(name="load-no-grid", provoke=read("load", _no_grid), code="HFC702", words=("rows.1.quantization",)),
)
