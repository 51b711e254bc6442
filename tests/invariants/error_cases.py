"""Provoked failures: what a row of the table is, and the arena that each one happens in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import hf_compress as hfc
from hf_compress.checkpoint.worker import CleanWorker
from hf_compress.cli.main import app
from tests._utils.tiny import tiny, tiny_dir

Act = Callable[[], object]

TEXTS = ["one text", "another text"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One provoked failure.

    Attributes:
        name: Unique; the id of the test.
        provoke: Prepares the arena and returns the call that must fail.
        code: The error's code.
        words: What the message must hold: the value seen, the place, the way out.
        fix: False where there is nothing that the user could do.
    """

    name: str
    provoke: Callable[[Arena], Act]
    code: str
    words: tuple[str, ...]
    fix: bool = True


class CommandFailed(Exception):
    """A command ended with exit code 1 and this on stderr (with `--json`, on stdout)."""


@dataclass
class Arena:
    """Where a failure happens: a folder and models that must come out of it unchanged.

    Attributes:
        folder: Everything below must be the same before and after.
        library: Checkpoints to copy from; one for the whole session.
        worker: The clean process.
        patch: Undone after the test.
        models: Live models that the failing call gets.
    """

    folder: Path
    library: Library
    worker: CleanWorker
    patch: pytest.MonkeyPatch
    models: list[nn.Module] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where a save shall go."""
        return self.folder / "out"

    def live(self, family: str = "llama", **overrides: Any) -> PreTrainedModel:
        """A dense model in memory."""
        return self.watch(tiny(family, **overrides))

    def packed(self, family: str = "llama", config: Any = None) -> PreTrainedModel:
        """A quantized model in memory."""
        return self.watch(hfc.quantize(tiny(family), config or hfc.RTNQuantConfig()))

    def watch(self, model: Any) -> Any:
        """Check that a model is unchanged."""
        self.models.append(model)
        return model

    def dense(self, family: str = "llama", **overrides: Any) -> Path:
        """The directory of a dense model."""
        return self._copy(self.library.dense(family, **overrides))

    def checkpoint(self, family: str = "llama", **options: Any) -> Path:
        """A proven checkpoint of ours."""
        return self._copy(self.library.checkpoint(family, **options))

    def unproven(self, family: str = "llama", **options: Any) -> Path:
        """A checkpoint of ours as `save_pretrained` writes it: the record is in the weights file."""
        return self._copy(self.library.checkpoint(family, proven=False, **options))

    def cli(self, *words: object) -> Act:
        """A run of the command line."""
        return lambda: command(*words)

    def _copy(self, source: Path) -> Path:
        target = self.folder / source.name
        shutil.copytree(source, target)
        return target


@dataclass
class Library:
    """Checkpoints made once per session, when they are first asked for."""

    root: Path
    worker: CleanWorker
    made: dict[str, Path] = field(default_factory=dict)

    def dense(self, family: str, **overrides: Any) -> Path:
        """The directory of a dense model."""
        key = f"dense-{family}-{overrides}"
        if key not in self.made:
            self.made[key] = tiny_dir(family, self.root / f"d{len(self.made)}", **overrides)
        return self.made[key]

    def checkpoint(self, family: str, *, proven: bool = True, **options: Any) -> Path:
        """A checkpoint of ours, by RTN."""
        key = f"ours-{family}-{proven}-{options}"
        if key not in self.made:
            path = self.root / f"o{len(self.made)}" / f"{family}-packed"
            model = hfc.quantize(tiny(family), hfc.RTNQuantConfig(**options))
            if proven:
                hfc.save(model, path, worker=self.worker)
            else:
                model.save_pretrained(path)
            self.made[key] = path
        return self.made[key]


def command(*words: object) -> None:
    """Run the command line in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 1:
        raise CommandFailed(result.stdout if "--json" in words else result.stderr)
    raise RuntimeError(f"exit code {result.exit_code}: {result.output}")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a JSON file in place."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def weights_of(folder: Path) -> Path:
    """The one weights file of a checkpoint."""
    (file,) = folder.glob("*.safetensors")
    return file


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the weights of a checkpoint; its metadata stays."""
    file = weights_of(folder)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return folder


def edit_row(folder: Path, **values: Any) -> Path:
    """Change the first quantized row of a checkpoint's plan, and forget the proof."""

    def change(record: dict[str, Any]) -> None:
        rows = [row for row in record["plan"]["rows"] if row["quantization"] is not None]
        rows[0].update(values)
        record.pop("proof", None)

    return edit_record(folder, change)


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the record of a checkpoint, as if it had been written so: also in the metadata of the weights."""
    text = edit_json(folder / "hf_compress.json", change).read_text(encoding="utf-8")
    file = weights_of(folder)
    save_file(load_file(file), file, metadata={"format": "pt", "hf_compress": text})
    return folder


def poison(model: nn.Module, value: float = float("nan")) -> Any:
    """Put one bad value into the last weight that is quantized."""
    with torch.no_grad():
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        linears[-2].weight[0, 0] = value  # the last one is the head
    return model


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, with what it is and holds."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a failed call must not change."""
    found: dict[str, object] = {
        name: (value.dtype, tuple(value.shape), bytes_of(value)) for name, value in model.state_dict().items()
    }
    found["classes"] = [(name, type(module), module.training) for name, module in model.named_modules()]
    found["attributes"] = sorted(vars(model))
    if isinstance(model, PreTrainedModel):
        found["config"] = {**model.config.to_dict(), "dtype": None}  # transformers notes it when it saves
    return found


def bytes_of(value: Tensor) -> bytes:
    """The bytes of a tensor; none for one on the meta device."""
    if value.is_meta:
        return b""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
