"""`hf_compress.save` and `hf_compress.verify`: atomic, proven by reload."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from ..core.errors import CheckpointNotFoundError, ConfigError, InputError, UnsupportedModelError, WriteError
from ..core.plan import Plan
from .atomic import atomic_directory, check_output, disk_errors, ensure_space, recover
from .foreign import settle
from .foreign_int import load_foreign_int
from .foreign_settings import foreign_settings
from .handover import current_plan, handed_over, refuse_wrapped, training_plan_of
from .inputs import InputSet, normalise_inputs
from .load import load_packed
from .plain import check_storable, is_plain, needs_skeleton, stored_bytes, write_plain
from .plain_proof import check_plain, plain_inputs, prove_plain
from .proof import check_files, prove
from .proof_worker import resident_bytes
from .record import FILE, Proof, Record, read_record, record_of, sort_metadata
from .skeleton import load_into
from .worker import CleanWorker


class Saveable(Protocol):
    """A tokenizer, processor or anything else that saves itself into a directory."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write its files."""


def save(
    model: nn.Module,
    path: str | Path,
    tokenizer: Saveable | None = None,
    overwrite: bool = False,
    *,
    format: str | None = None,
    inputs: Sequence[InputSet] | None = None,
    worker: CleanWorker | None = None,
    free_bytes: int | None = None,
) -> Proof:
    """Write a compressed model or module, prove that it reloads to the same outputs, then put it in place.

    The output appears only when it is proven. After a kill at any moment it is old, new, or absent with `.NAME.old`
    beside it, which the next save or load restores.

    Args:
        model: A model that this package compressed, or a plain module, which `load` reads into a skeleton.
        path: Output directory.
        tokenizer: Tokenizer or processor to save beside the model.
        overwrite: Replace an existing checkpoint.
        format: Another format than the plan's, such as `guarded`; the model stays as it is. GPTQ and AWQ layouts store
            float16 scales: compress float32 models for them, with `format="gptq_v2"` in the configuration.
        inputs: Forward arguments for the proof; made from the model's signature by default. Of a plain module also
            tensors or tuples of them; without inputs its tensors are compared and its outputs are not.
        worker: A clean process to reuse; started for this call by default.
        free_bytes: Memory that the proof may use; what the system has free by default.

    Returns:
        The proof, which is also in `hf_compress.json`.

    Raises:
        ProofError: It does not reload to the same outputs. Nothing is left behind.
        FormatError: The format can't hold the model.
        OutputExistsError, WriteError, UnsupportedModelError, ConfigError: As their names say.
    """
    target = output_path(path)
    plan = _saveable_plan(model)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}, which can't be saved.", "pass a tokenizer object"
        )
    plain = not isinstance(model, PreTrainedModel)
    if plain:
        check_storable(model)
    given = None if inputs is None else plain_inputs(inputs, model) if plain else normalise_inputs(inputs, model)
    recover(target)
    check_output(target, overwrite)
    ensure_space(target, stored_bytes(model) if plain else resident_bytes(model))
    with handed_over(model, plan, format) as wanted:
        if plain:
            return _save_plain(model, wanted, target, tokenizer, overwrite, given)
        with _worker(worker) as clean, atomic_directory(target, overwrite) as temporary, disk_errors(target):
            _write_weights(model, wanted, temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            _make_readable(temporary)
            proof = prove(temporary, wanted, model, worker=clean, inputs=given, free_bytes=free_bytes)
            _write_record(temporary, record_of(model, wanted).model_copy(update={"proof": proof}))
    return proof


def _saveable_plan(model: object) -> Plan:
    """The plan of a model that can be saved.

    Raises:
        UnsupportedModelError: It is no model of ours, or has an adapter, or layers that are wrapped or compiled.
    """
    plan = current_plan(model) if isinstance(model, nn.Module) else None
    if training_plan_of(model) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} only computes with fake-quantized values so far; its weights are floating point.",
            "call hf_compress.convert(model) first; model.save_pretrained writes it as it is",
        )
    if plan is None or not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} was not compressed by hf_compress.",
            "compress it with hf_compress.quantize, or use its own save_pretrained",
        )
    if vars(model).get("_hf_peft_config_loaded"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter attached, which is saved apart from the model.",
            "save the adapter with model.save_pretrained, and the model before an adapter is added",
        )
    refuse_wrapped(model)
    return plan


def _save_plain(
    module: nn.Module,
    plan: Plan,
    target: Path,
    tokenizer: Saveable | None,
    overwrite: bool,
    inputs: Sequence[InputSet] | None,
) -> Proof:
    """Write and prove a plain module."""
    record = record_of(module, plan)
    with atomic_directory(target, overwrite) as temporary, disk_errors(target):
        write_plain(module, plan, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _make_readable(temporary)
        proof = prove_plain(temporary, record, module, inputs)
        _write_record(temporary, record.model_copy(update={"proof": proof}))
    return proof


def verify(path: str | Path, *, worker: CleanWorker | None = None, inputs: Sequence[InputSet] | None = None) -> Proof:
    """Prove a checkpoint again, or for the first time, and record the level reached.

    Our own reader's model is the reference; files are compared with their recorded hashes. Of a plain module, whose
    code is not in the checkpoint, files and tensors are checked and the recorded proof stays what it was.

    Args:
        path: A checkpoint directory that this package wrote, proven or not.
        worker: A clean process to reuse; started for this call by default.
        inputs: Forward arguments; made from the model's signature by default.

    Raises:
        ProofError: Stock transformers and our reader disagree, or stock refuses it.
        CorruptCheckpointError: Files are damaged or were changed since they were proven.
        CheckpointNotFoundError: There is no checkpoint of ours.
    """
    source = checkpoint_path(path)
    recover(source)
    settings = foreign_settings(source)
    if settings is not None:
        raise CheckpointNotFoundError(
            f"{source} is a {settings.method.upper()} checkpoint of another tool: nothing tells what it should give.",
            f'read it with hf_compress.load("{source}"); hf_compress.save writes what was read, with a proof',
        )
    record = read_record(source)
    check_files(source, record.proof.files)
    if is_plain(source):
        return _verify_plain(source, record, inputs)
    model = load_packed(source)
    given = None if inputs is None else normalise_inputs(inputs, model)
    with _worker(worker) as clean:
        proof = prove(source, record.plan, model, worker=clean, inputs=given)
    with disk_errors(source):
        _write_record(source, record.model_copy(update={"proof": proof}))
    return proof


def _verify_plain(source: Path, record: Record, inputs: object) -> Proof:
    """Check a plain module's files and tensors."""
    if inputs is not None:
        raise InputError(
            f"{source} holds a plain module, which only its code can run.",
            f'load it and compare: hf_compress.load("{source}", model=...)',
        )
    proof = check_plain(source, record)
    with disk_errors(source):
        _write_record(source, record.model_copy(update={"proof": proof}))
    return proof


def load(path: str | Path, model: nn.Module | None = None) -> Any:
    """Load a checkpoint that this package wrote, kept packed, with the fastest kernels that this machine has.

    GPTQ and AWQ checkpoints that others wrote are read as well, without their libraries, in the config's data type.

    Args:
        path: The checkpoint directory, stock format or guarded.
        model: A skeleton for a plain module: built as the module that was saved, dense, on the CPU or meta; it is
            filled in place, strictly, and returned. A transformers model may be given for a guarded checkpoint.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointNotFoundError: There is no checkpoint of ours.
        CorruptCheckpointError: It is damaged or inconsistent.
        FormatError: It is a GPTQ or AWQ checkpoint in a layout that is not read; the message names it.
        ConfigError: A plain module needs a skeleton, or a stock checkpoint takes none.
        UnsupportedModelError, AlreadyQuantizedError: The skeleton does not fit, or is packed. It was not changed.
    """
    source = checkpoint_path(path)
    recover(source)
    if model is not None:
        return load_into(source, read_record(source), model)
    settings = foreign_settings(source)
    if settings is not None:
        return load_foreign_int(source, settings)
    record = read_record(source)
    if record.plan.format == "guarded" and is_plain(source):
        raise needs_skeleton(source)
    return load_packed(source)


def output_path(path: object) -> Path:
    """The output directory.

    Raises:
        ConfigError: It is not a path.
        WriteError: No file can have that name.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"path is a {type(path).__name__}.", "pass a directory name")
    if "\0" in str(path):
        raise WriteError(f"{str(path)!r} has a null byte.", "choose another name")
    return Path(path).absolute()


def checkpoint_path(path: object) -> Path:
    """The directory of a checkpoint to read.

    Raises:
        UnsupportedModelError: It is not a path.
        CheckpointNotFoundError: No file can have that name.
    """
    if not isinstance(path, str | Path):
        raise UnsupportedModelError(f"Expected a directory, got {type(path).__name__}.", "pass the checkpoint's path")
    if "\0" in str(path):
        raise CheckpointNotFoundError(f"{str(path)!r} has a null byte.", "check the path")
    return Path(path).absolute()


def _worker(given: CleanWorker | None) -> Any:
    """The worker given, left running, or a new one that is closed at the end."""
    return CleanWorker() if given is None else nullcontext(given)


def _write_weights(model: Any, plan: Plan, folder: Path) -> None:
    """What transformers writes of a model, the same bytes every time.

    It can't undo how it reads other libraries' checkpoints; without that, their weights are written as they are.
    """
    if plan.backend:
        settle(model)
    if plan.backend or plan.format == "dense":  # these weights have no place for the record, which readers need
        folder.mkdir(exist_ok=True)
        _write_record(folder, record_of(model, plan))
    model.save_pretrained(folder, save_original_format=not (plan.backend and model.hf_quantizer.pre_quantized))
    for file in sorted(folder.glob("model*.safetensors")):
        sort_metadata(file)


def _make_readable(folder: Path) -> None:
    """Give weights the mode of the config: safetensors writes files that only the owner can read."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _write_record(folder: Path, record: Record) -> None:
    """Write `hf_compress.json` in one step."""
    temporary = folder / f".{FILE}.tmp"
    temporary.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / FILE)
