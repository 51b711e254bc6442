"""Results on disk while a model is compressed, so that a killed run goes on where it was.

One safetensors file per block, and one with the activations behind it. Their names hold a hash of the block's key and
one of their content, and they appear under them only when they are whole and flushed: what is found is finished, or
damaged and done again. The manifest tells what the results belong to; results of anything else are never mixed in, and
files of other names never touched.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from .. import _version
from ..calibration.block import Finished
from ..calibration.results import State
from ..core.errors import HFCompressError, OutputExistsError, WriteError, first_line, listed
from ..core.plan import Plan
from ..modules.packed import PackedTensor, layout_of
from .atomic import disk_errors, held, sync
from .record import FILE, read_record

MANIFEST = "manifest.json"
_FACTS, _SQNR, _FOLLOWED = "hf_compress", "sqnr_db", "followed"
_PACKED, _CHANGED = "packed", "changed"
_RESULT, _STATE = ".safetensors", ".state"
_OWN = re.compile(r"manifest\.json(\.tmp)?|[0-9a-f]{16}(\.tmp|-[0-9a-f]{64}\.(safetensors|state))")
"""Names of the files that a store makes."""

Signature = Mapping[str, Any]
"""What results depend on, as JSON types."""


def signature_of(files: Sequence[Path], config: PreTrainedConfig, plan: Plan) -> Signature:
    """What the results of a run depend on: with the same signature, the same bytes.

    Args:
        files: The weights files of the source; told by their content, wherever they are.
        config: The source's config: the same weights make another function under another one.
        plan: The plan, with the request in it and what is known of the calibration data.
    """
    return {
        "weights": {file.name: _content_hash(file) for file in files},
        "config": _config_hash(config),
        **_request_of(plan),
        "plan": hashlib.sha256(plan.model_dump_json().encode()).hexdigest(),
        "versions": {
            "hf_compress": _version.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def _config_hash(config: PreTrainedConfig) -> str:
    """SHA-256 of everything in a config but the place that it was read from."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _request_of(plan: Plan) -> Signature:
    """What was asked for: the part of a signature that the finished checkpoint tells too."""
    data = None if plan.calibration is None else plan.calibration.model_dump(mode="json")
    return {"method": plan.method, "request": plan.request, "calibration": data}


class ResultsStore:
    """Results in a directory; see `Results`. Made by `open_store` and `passing_store`.

    Args:
        directory: Where they are; it exists.
        plan: The plan that they carry out; tells the layouts of packed weights.
        resumable: Whether activations are kept too, which a run needs to go on from.
    """

    def __init__(self, directory: Path, plan: Plan, resumable: bool = True) -> None:
        self._directory = directory
        self._resumable = resumable
        self._layouts = {row.name: layout_of(row) for row in plan.quantized}
        self._checked: set[Path] = set()

    def get(self, key: str) -> Finished | None:
        """What a block became, mapped from its file; None where there is none."""
        file = self._find(key, _RESULT)
        return None if file is None else self._read(file)

    def state(self, key: str) -> State | None:
        """The activations behind a finished block, mapped from their file; empty where nothing follows, else None."""
        file = self._find(key, _STATE)
        if file is None:
            return {} if self._is_last(key) else None
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping

    def put(self, key: str, finished: Finished, state: State, forget: str | None = None) -> Finished:
        """Write a block's result, and give it back mapped from its file.

        Raises:
            WriteError: The disk is full, or can't be written to. Earlier results stay.
        """
        try:
            with disk_errors(self._directory):
                if state and self._resumable:
                    self._write(key, _STATE, state, {})
                facts = json.dumps({_SQNR: finished.sqnr, _FOLLOWED: bool(state)}, sort_keys=True)
                file = self._write(key, _RESULT, _tensors(finished), {_FACTS: facts})
                for old in [] if forget is None else self._files(forget, _STATE):
                    old.unlink()
        except WriteError as error:
            told, fix = error.message, error.fix.rstrip(".")
            if not self._resumable:
                raise WriteError(told, f"{fix}; the environment variable TMPDIR names the directory") from error
            told = told.replace("Nothing was left behind.", "What is finished stays there.")
            raise WriteError(told, f"{fix}; the same command then goes on from there") from error
        return self._read(file)

    def _is_last(self, key: str) -> bool:
        """Whether a block is finished, and was put without activations."""
        file = self._find(key, _RESULT)
        if file is None:
            return False
        with safe_open(file, framework="pt") as opened:
            return not json.loads(opened.metadata()[_FACTS])[_FOLLOWED]

    def _files(self, key: str, kind: str) -> list[Path]:
        """Whole files of a block; more than one only where a damaged one was done again."""
        return sorted(self._directory.glob(f"{_name_of(key)}-*{kind}"))

    def _find(self, key: str, kind: str) -> Path | None:
        """A block's file, if it is what was written; a damaged one is deleted."""
        for file in self._files(key, kind):
            if file in self._checked or _content_hash(file) == file.stem.rpartition("-")[2]:
                self._checked.add(file)
                return file
            with disk_errors(self._directory):
                file.unlink()
        return None

    def _write(self, key: str, kind: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
        """Write a file completely, then give it its name."""
        temporary = self._directory / f"{_name_of(key)}.tmp"
        save_file(_separate(tensors), temporary, metadata=metadata)
        file = self._directory / f"{_name_of(key)}-{_content_hash(temporary)}{kind}"
        if self._resumable:  # else nothing of it has to survive
            sync(temporary)
        temporary.replace(file)
        if self._resumable:
            sync(self._directory)
        self._checked.add(file)
        return file

    def _read(self, file: Path) -> Finished:
        """A file's content, mapped."""
        parts: dict[str, dict[str, Tensor]] = {}
        finished = Finished()
        with safe_open(file, framework="pt") as opened:
            finished.sqnr = json.loads(opened.metadata()[_FACTS])[_SQNR]
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition("/")
                if kind == _CHANGED:
                    finished.changed[name] = opened.get_tensor(key)
                else:
                    weight, _, suffix = name.rpartition("/")
                    parts.setdefault(weight, {})[suffix] = opened.get_tensor(key)
        finished.packed = {name: self._packed(name, parts[name]) for name in finished.sqnr}
        return finished

    def _packed(self, name: str, parts: Mapping[str, Tensor]) -> PackedTensor:
        """A packed weight from its parts."""
        others = ("zero_point", "codebook", "g_idx", "input_scale", "input_zero_point")
        return PackedTensor(
            self._layouts[name], parts["packed"], parts["scale"], **{other: parts.get(other) for other in others}
        )


@contextmanager
def passing_store(plan: Plan) -> Iterator[ResultsStore]:
    """A place for results outside of memory, in the system's temporary directory. They are gone after the block.

    Args:
        plan: The plan that they carry out.

    Raises:
        WriteError: The disk is full, or can't be written to, or there is no such directory.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="hf_compress-")
    except OSError as error:
        raise WriteError(
            f"The temporary directory can't be used: {first_line(error)}.",
            "set the environment variable TMPDIR to a directory with room for the packed model",
        ) from error
    with disk_errors(Path(made.name).parent), made as directory:
        yield ResultsStore(Path(directory), plan, resumable=False)


@contextmanager
def open_store(directory: Path, signature: Signature, plan: Plan, overwrite: bool = False) -> Iterator[ResultsStore]:
    """The results of a run, begun or to be gone on with. They stay after the block; see `remove_store`.

    Args:
        directory: Where they are; made where it does not exist.
        signature: What they depend on.
        plan: The plan that they carry out.
        overwrite: Delete results of something else instead of refusing.

    Raises:
        OutputExistsError: There are results of something else, files that are no results, or another process is at
            work there.
        WriteError: The disk is full, or can't be written to.
    """
    with ExitStack() as locks:
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(held(directory))
            except BlockingIOError:
                raise OutputExistsError(
                    f"Another process is compressing into {directory}.", "wait for it, or choose another output"
                ) from None
        _claim(directory, signature, overwrite)
        yield ResultsStore(directory, plan)


def has_results(directory: Path) -> bool:
    """Whether there are results of some run in a directory."""
    return directory.is_dir() and any(file.suffix == _RESULT for file in _own_files(directory))


def remove_store(directory: Path) -> None:
    """Delete results, and their directory if it is empty then; files of others, and what can't be deleted, stay."""
    with suppress(OSError):
        for file in _own_files(directory):
            file.unlink(missing_ok=True)
        directory.rmdir()


def remove_leftover(directory: Path, output: Path) -> None:
    """Delete the results behind a proven output: what a kill left that came after it got its name.

    Results of another request, and those that are newer than the output, which a later run was to replace, stay.

    Args:
        directory: Where the results are, if there are any.
        output: The checkpoint.
    """
    with suppress(OSError, HFCompressError), held(directory):
        found, wanted = _manifest(directory), _request_of(read_record(output).plan)
        finished = (output / FILE).stat().st_mtime_ns
        same = found is None or all(found.get(key) == value for key, value in wanted.items())
        if same and all(file.stat().st_mtime_ns <= finished for file in _own_files(directory)):
            remove_store(directory)


def _own_files(directory: Path) -> list[Path]:
    """The files of a store in a directory, the manifest last: as long as anything is left it says of what."""
    found = [file for file in directory.iterdir() if _OWN.fullmatch(file.name)]
    return sorted(found, key=lambda file: (file.name == MANIFEST, file.name))


def _claim(directory: Path, signature: Signature, overwrite: bool) -> None:
    """Compare the manifest with a signature, or write it."""
    wanted = json.loads(json.dumps(signature, sort_keys=True, default=str))
    found = _manifest(directory)
    if found is not None and found != wanted and not overwrite:
        changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        shown = [key for key in changed if key not in ("config", "plan", "weights")]  # those are only hashes
        detail = "; ".join(_difference(key, found.get(key), wanted.get(key)) for key in shown)
        raise OutputExistsError(
            f"{directory} holds unfinished results of another request: {listed(changed)} differ"
            f"{f' ({detail})' if detail else ''}.",
            "repeat that request to go on with it, choose another output, or pass overwrite=True to begin anew",
        )
    with disk_errors(directory):
        for file in _own_files(directory):
            if found != wanted or file.suffix == ".tmp":
                file.unlink()
        if found != wanted:
            temporary = directory / f"{MANIFEST}.tmp"
            temporary.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            sync(temporary)
            temporary.replace(directory / MANIFEST)
            sync(directory)


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The signature of what is there; None in a new directory, or where the manifest is damaged.

    Raises:
        OutputExistsError: The manifest can't be read, or is none of ours and the directory holds other files.
    """
    file = directory / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    except OSError as error:
        raise OutputExistsError(
            f"{file} can't be read: {first_line(error)}.", f"move {directory} away, or choose another output"
        ) from None
    if isinstance(found, dict):
        return found
    others = sorted(other.name for other in directory.iterdir() if not _OWN.fullmatch(other.name))
    if others:
        raise OutputExistsError(
            f"{directory} is where unfinished results go, and holds something else: {listed(others)}.",
            "move the directory away, or choose another output",
        )
    return None


def _difference(key: str, old: Any, new: Any) -> str:
    """How one entry differs, for the message."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        return ", ".join(f"{key}.{name} {old.get(name)!r} there, {new.get(name)!r} now" for name in names[:3])
    return f"{key} {old!r} there, {new!r} now"


def _tensors(finished: Finished) -> dict[str, Tensor]:
    """The tensors of a result, by their names in its file."""
    tensors = {
        f"{_PACKED}/{name}/{suffix}": value
        for name, packed in finished.packed.items()
        for suffix, value in packed.parts().items()
    }
    return tensors | {f"{_CHANGED}/{name}": value for name, value in finished.changed.items()}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    made = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        value = value.detach()
        made[name] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return made


def _name_of(key: str) -> str:
    """The beginning of the name of a block's file."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _content_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
