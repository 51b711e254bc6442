"""Proof of save: what was written reloads, in a process without us, to the same outputs, or saving fails.

Levels: *full* reloads the whole model with stock transformers in a clean process (a guarded checkpoint must be
refused there, and our reader must agree). *truncated* is for models that don't fit twice: a stock key check, the
outputs of the model cut to its first and last two blocks, and every tensor compared. *own-reader* is for formats
whose stock reader isn't installed; `hf_compress.verify` raises the level where it is.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..core.errors import CorruptCheckpointError, InputError, ProofError, listed
from ..core.plan import Plan
from ..formats.base import CheckpointFormat, Limits, encode_model, format_of
from ..formats.torchao import LibraryFormat
from ..modules.kernels.choose import reference_kernels
from ..modules.packed import dequantize
from ..modules.swap import packed_modules, packed_tensor
from .inputs import InputSet, example_inputs
from .load import load_packed, read_tensors
from .proof_worker import float_outputs, resident_bytes, run_inputs
from .record import FILE, Check, Proof, Record, read_record
from .truncate import truncate
from .worker import CleanWorker

HEADROOM = 1.3
"""A full proof needs this many times the dense bytes free."""


@dataclass(frozen=True)
class Subject:
    """What is proven.

    Attributes:
        path: The checkpoint directory.
        plan: Its plan.
        model: The reference: the model that was saved, or what our own reader makes of the checkpoint.
        inputs: Forward arguments.
        worker: The clean process.
        free_bytes: Memory that a full proof may use.
    """

    path: Path
    plan: Plan
    model: PreTrainedModel
    inputs: Sequence[InputSet]
    worker: CleanWorker
    free_bytes: int

    @property
    def layout(self) -> CheckpointFormat:
        """The checkpoint's format."""
        return LibraryFormat(self.plan.backend) if self.plan.backend else format_of(self.plan)

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    @property
    def limits(self) -> Limits:
        """How far stock may be from the reference, as the format declares it."""
        return self.layout.limits(self.plan)


def prove(
    path: Path,
    plan: Plan,
    model: PreTrainedModel,
    *,
    worker: CleanWorker,
    inputs: Sequence[InputSet] | None = None,
    free_bytes: int | None = None,
) -> Proof:
    """Prove a checkpoint against a model.

    Args:
        path: The checkpoint directory.
        plan: Its plan.
        model: The model that was saved. On another device than the CPU, our own reader's copy stands in for it.
        worker: The clean process.
        inputs: Forward arguments; made from the model's signature by default.
        free_bytes: Memory that may be used; what the system has free by default.

    Raises:
        ProofError: The checkpoint does not reload to the same outputs; says what differs.
        InputError: No inputs can be made for this model.
    """
    reference = model if model.device.type == "cpu" else load_packed(path)
    made = inputs if inputs is not None else example_inputs(reference)
    free = psutil.virtual_memory().available if free_bytes is None else free_bytes
    subject = Subject(path, plan, reference, made, worker, free)
    proof = _prove(subject)
    return proof.model_copy(update={"files": file_hashes(path)})


def _prove(subject: Subject) -> Proof:
    """Choose the level and run it."""
    reader = subject.layout.stock_reader
    if reader is None:
        return _guarded(subject)
    if not subject.worker.request("has", package=reader).get("importable"):
        return _own_reader(
            subject,
            f"the stock reader {reader!r} is not installed; with it, hf-compress verify raises the level",
        )
    if subject.plan.backend:
        _check_room(subject)
        return _full(subject)
    if dense_bytes(subject.plan, subject.model) * HEADROOM <= subject.free_bytes:
        return _full(subject)
    if not subject.limits.on_meta:
        return _own_reader(subject, f"too large to load twice, and {reader!r} reads nothing on the meta device")
    return _truncated(subject)


def _check_room(subject: Subject) -> None:
    """Refuse to prove a model of another library that does not fit twice: its blocks can't be cut."""
    needed = int(resident_bytes(subject.model) * HEADROOM)
    if needed > subject.free_bytes:
        raise ProofError(
            f"The proof loads the model a second time, which needs {needed} bytes; {subject.free_bytes} are free. "
            "Nothing was written.",
            "free memory, or write it unproven with model.save_pretrained(path)",
        )


def _full(subject: Subject) -> Proof:
    """Stock reload of the whole model in the clean process."""
    expected = reference_outputs(subject.model, subject.inputs)
    weights = _stock_weights(subject, subject.path, subject.model)
    answer, outputs = _stock_forward(subject, subject.path, subject.inputs)
    checks = (*weights, *compare(expected, outputs, subject.limits.outputs))
    resident = (int(answer["resident_bytes_before"]), int(answer["resident_bytes_after"]))
    return Proof(level="full", reader=_reader(answer), checks=checks, resident_bytes=resident)


def _guarded(subject: Subject) -> Proof:
    """Stock must refuse the checkpoint, and every tensor and our reader must agree with the model."""
    answer = _checked(subject.worker.request("raises", path=subject.path, architecture=subject.architecture))
    if answer["exception"] is None:
        raise ProofError("Stock transformers loads a guarded checkpoint without an error.", "report this")
    tensors = _tensor_check(subject)
    loaded = reference_outputs(load_packed(subject.path), subject.inputs)
    checks = (tensors, *compare(reference_outputs(subject.model, subject.inputs), loaded, 0.0))
    reason = f"guarded: stock transformers refuses it ({answer['exception']}), hf_compress.load reads it"
    return Proof(level="full", reason=reason, reader=f"hf_compress; stock: {answer['exception']}", checks=checks)


def _own_reader(subject: Subject, reason: str) -> Proof:
    """Our own reader in this process, and every tensor compared."""
    tensors = () if subject.plan.backend else (_tensor_check(subject),)  # bitsandbytes changes weights it lists
    loaded = reference_outputs(load_packed(subject.path), subject.inputs)
    checks = (*tensors, *compare(reference_outputs(subject.model, subject.inputs), loaded, 0.0))
    return Proof(level="own-reader", reason=reason, reader="hf_compress", checks=checks)


def _truncated(subject: Subject) -> Proof:
    """Stock key check, outputs of the first and last two blocks, every tensor compared."""
    device = "meta" if subject.limits.weights is None else "cpu"  # readers that keep weights packed read some values
    request = {"path": subject.path, "architecture": subject.architecture, "device": device}
    _check_keys(_checked(subject.worker.request("keys", **request)))
    with tempfile.TemporaryDirectory(prefix=f".{subject.path.name}-cut-", dir=subject.path.parent) as folder:
        cut = Path(folder) / "model"
        if not truncate(subject.path, cut, subject.model):
            return _own_reader(subject, "too large to load twice, and its blocks could not be told apart")
        loaded = load_packed(cut)
        weights = _stock_weights(subject, cut, loaded)
        answer, outputs = _stock_forward(subject, cut, subject.inputs)
        checks = (*weights, *compare(reference_outputs(loaded, subject.inputs), outputs, subject.limits.outputs))
    reason = "the dense model does not fit into memory; proven on its first and last two blocks, all tensors compared"
    return Proof(level="truncated", reason=reason, reader=_reader(answer), checks=(*checks, _tensor_check(subject)))


def dense_bytes(plan: Plan, model: nn.Module) -> int:
    """Bytes of the dense model that a stock reload holds after its first forward."""
    quantized = sum(row.dense_bytes for row in plan.quantized)
    return quantized + sum(value.numel() * value.element_size() for value in model.parameters())


def compare(reference: Mapping[str, Tensor], found: Mapping[str, Tensor], limit: float) -> tuple[Check, ...]:
    """Compare outputs by name.

    Raises:
        ProofError: An output is missing or differs by more than the limit.
    """
    missing = sorted(set(reference) - set(found))
    if missing:
        raise ProofError(f"The reload gives no {listed(missing)}.", "report this with the model's config")
    empty = [name for name, value in reference.items() if value.numel() and not bool(torch.isfinite(value).any())]
    if empty:
        raise ProofError(
            f"The model's outputs hold no finite value ({listed(empty)}), so nothing is proven. Nothing was written.",
            "repair the model, or pass inputs=[...] that it can run",
        )
    checks = tuple(_check(name, value, found[name], limit) for name, value in sorted(reference.items()))
    failed = [check for check in checks if not check.relative <= limit]
    if failed:
        worst = max(failed, key=lambda check: check.relative)
        raise ProofError(
            f"The reload differs: {worst.name} by {worst.difference:.3g} (relative {worst.relative:.3g}, limit "
            f"{limit:g}); {len(failed)} of {len(checks)} outputs are off. Nothing was written.",
            "if the model was moved to another dtype after it was compressed, compress it again with "
            'from_pretrained(dtype=...); else try format="guarded" and report this with the model\'s config',
        )
    return checks


def _check(name: str, value: Tensor, found: Tensor, limit: float) -> Check:
    """One comparison; NaN equals NaN in the same place, other shapes are infinitely far."""
    if value.shape != found.shape:
        return Check(name=name, difference=float("inf"), relative=float("inf"), limit=limit)
    left, right = value.double(), found.double()
    same = (left == right) | (left.isnan() & right.isnan())
    difference = (
        float(torch.where(same, 0.0, (left - right).abs().nan_to_num(nan=float("inf"))).max()) if same.numel() else 0.0
    )
    largest = float(left.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if left.numel() else 0.0
    relative = 0.0 if difference == 0 else difference / largest if largest else float("inf")
    return Check(name=name, difference=difference, relative=relative, limit=limit)


def reference_outputs(
    model: nn.Module, inputs: Sequence[InputSet], pick: Callable[[Any], dict[str, Tensor]] = float_outputs
) -> dict[str, Tensor]:
    """Outputs on the reference path, in evaluation mode: what `pick` takes of them."""
    training = model.training
    with reference_kernels(model):
        try:
            return run_inputs(model.eval(), list(inputs), pick)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise InputError(
                f"{type(model).__name__} can't run the inputs of the proof: {error}",
                "pass inputs=[...] that it can run",
            ) from error
        finally:
            model.train(training)


def _stock_weights(subject: Subject, path: Path, model: PreTrainedModel) -> tuple[Check, ...]:
    """Compare weights that stock dequantizes in the clean process with ours, where the format declares a limit.

    For readers that round inputs, whose outputs alone would not show a wrong scale. Dequantized layers are linear:
    outputs × inputs.
    """
    allowed = subject.limits.weights
    if allowed is None:
        return ()
    packed = {name: packed_tensor(module, "weight") for name, module in packed_modules(model)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "weights.safetensors"
        request = {"architecture": subject.architecture, "names": list(packed), "output": result}
        _check_keys(_checked(subject.worker.request("dense", path=path, **request)))
        with safe_open(result, framework="pt") as opened:
            checks = [_check(name, dequantize(packed[name]), opened.get_tensor(name), allowed) for name in packed]
    worst = max(checks, key=lambda check: check.relative)
    if not worst.relative <= allowed:
        raise ProofError(
            f"Stock reads other weights: {worst.name} is off by a relative {worst.relative:.3g}, limit "
            f"{allowed:g}. Nothing was written.",
            'try format="guarded", and report this with the model\'s config',
        )
    return (worst.model_copy(update={"name": f"{len(checks)} weights dequantized by stock"}),)


def _attention(config: PreTrainedConfig) -> str | dict[str, str] | None:
    """How a model computes attention; of a composite, by part: a backbone may have other ways than the whole."""
    whole: str | None = config._attn_implementation
    values = vars(config)
    parts = {name: values[name]._attn_implementation for name in config.sub_configs if values.get(name) is not None}
    found = {name: part for name, part in parts.items() if part is not None}
    return {"": whole, **found} if whole is not None and found else whole


def _stock_forward(
    subject: Subject, path: Path, inputs: Sequence[InputSet]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load with stock transformers in the clean process and run the inputs."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "inputs.safetensors", Path(folder) / "outputs.safetensors"
        tensors = {f"{index}.{name}": value for index, one in enumerate(inputs) for name, value in one.items()}
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, given)
        answer = _checked(
            subject.worker.request(
                "forward",
                path=path,
                architecture=subject.architecture,
                inputs=given,
                output=result,
                attn_implementation=_attention(subject.model.config),
                device_map="cpu" if subject.plan.backend else None,
            )
        )
        _check_keys(answer)
        return answer, load_file(result)


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, unless the request failed in the clean process."""
    if "error" in answer:
        raise ProofError(
            f"Stock transformers fails on what was written: {answer['error']}: {answer['message']}. "
            "Nothing was written.",
            'try format="guarded", and report this with the model\'s config',
        )
    return answer


def _check_keys(answer: Mapping[str, Any]) -> None:
    """No key may be missing, unexpected or of another shape."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if answer[kind]:
            raise ProofError(
                f"Stock transformers reports {kind.replace('_', ' ')}: {listed(answer[kind])}. Nothing was written.",
                "report this with the model's config",
            )


def _reader(answer: Mapping[str, Any]) -> str:
    """What reloaded the checkpoint."""
    return f"transformers {answer['versions'].get('transformers', transformers.__version__)}"


def _tensor_check(subject: Subject) -> Check:
    """Re-read every tensor and compare it with the model in memory: by name, or else one of the same bytes each.

    Raises:
        ProofError: A tensor differs or is missing, or the checkpoint holds one that the model doesn't have.
    """
    written = read_tensors(subject.path)
    expected = _stored_state(subject, written)
    wrong = [name for name in expected.keys() & written.keys() if not same_bytes(expected[name], written[name])]
    missing = sorted(expected.keys() - written.keys())
    spare = {name: _digest(written[name]) for name in sorted(written.keys() - expected.keys())}
    for name in missing:
        digest = _digest(expected[name])
        twin = next((other for other, found in spare.items() if found == digest), None)
        if twin is None:
            wrong.append(name)
        else:
            del spare[twin]
    wrong += spare
    if wrong:
        raise ProofError(
            f"Tensors differ on disk: {listed(sorted(wrong))}. Nothing was written.", "check the disk and save again"
        )
    return Check(name=f"{len(expected)} tensors re-read", difference=0.0, relative=0.0, limit=0.0)


def _stored_state(subject: Subject, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a save writes of a model, by name on disk; of tied tensors the one that is there.

    transformers saves under the names that a model was loaded with, or on request under the model's own.
    """
    model = subject.model
    ignored = model._keys_to_ignore_on_save or ()
    state = encode_model(model, subject.plan, subject.layout)
    own = {name: value for name, value in state.items() if name not in ignored}
    stored: dict[str, Tensor] = revert_weight_conversion(model, own)
    named = min(stored, own, key=lambda one: len(one.keys() - written.keys()))
    places = {_place(value) for name, value in named.items() if name in written}
    kept = {}
    for name, value in named.items():
        if name in written or _place(value) not in places:
            kept[name] = value
            places.add(_place(value))
    return kept


def _place(value: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where a tensor's values lie in memory."""
    return value.data_ptr(), value.shape, value.stride()


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes: 0 is not -0, and NaN is itself."""
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(_bytes(left), _bytes(right))


def _digest(value: Tensor) -> str:
    """A hash of a tensor's type, shape and bytes."""
    head = f"{value.dtype} {tuple(value.shape)}".encode()
    return hashlib.sha256(head + _bytes(value).numpy().tobytes()).hexdigest()


def _bytes(value: Tensor) -> Tensor:
    """The bytes of a tensor's values, in order."""
    return value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the record."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != FILE)
    return {file.relative_to(path).as_posix(): _sha256(file) for file in files}


def current_record(path: Path) -> Record:
    """The record of a checkpoint; its proof only counts while the files are those that were proven."""
    record = read_record(path)
    if record.proof.level == "none":
        return record
    try:
        check_files(path, record.proof.files)
    except CorruptCheckpointError as error:
        return record.model_copy(update={"proof": Proof(reason=error.message)})
    return record


def _sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_files(path: Path, recorded: Mapping[str, str]) -> None:
    """Compare a checkpoint's files with what was proven.

    Raises:
        CorruptCheckpointError: A file is missing or was changed.
    """
    now = {name: digest for name, digest in file_hashes(path).items() if name in recorded}
    changed = [name for name, digest in recorded.items() if now.get(name) != digest]
    if changed:
        raise CorruptCheckpointError(
            f"Changed since they were proven: {listed(changed)} in {path}.", "save the model again"
        )
