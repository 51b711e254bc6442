"""Proof of plain modules: an emptied copy is filled from the files, and every tensor and output is compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import InputError, ProofError, UnsupportedModelError, first_line, listed
from ..core.plan import Plan
from ..modules.swap import packed_modules, unpack_module
from .handover import forget_plan
from .inputs import InputSet, normalise_inputs
from .plain import decoded, encoded, original_class, read_plain
from .proof import compare, file_hashes, reference_outputs, same_bytes
from .record import Check, Proof, Record
from .skeleton import load_into, saved_state

_REASON = "a plain module: stock transformers has no class for it, so our own reader filled an empty copy of it"


def prove_plain(path: Path, record: Record, module: nn.Module, inputs: Sequence[InputSet] | None) -> Proof:
    """Read a checkpoint into an empty copy of the module and compare every tensor, and the outputs on `inputs`.

    Args:
        path: The checkpoint directory.
        record: Its record.
        module: The module that was saved.
        inputs: Forward arguments, or None to compare tensors only.

    Raises:
        ProofError: Something differs.
        InputError: The module can't run the inputs.
        UnsupportedModelError: The module can't be copied.
    """
    twin = load_into(path, record, _blank(module, record.plan))
    checks = (_compared_tensors(encoded(module, record.plan), encoded(twin, record.plan)),)
    outputs = () if inputs is None else _compared_outputs(module, twin, inputs)
    reason = _REASON + _not_compared(outputs, inputs)
    return Proof(
        level="own-reader", reason=reason, reader="hf_compress", checks=(*checks, *outputs), files=file_hashes(path)
    )


def check_plain(path: Path, record: Record) -> Proof:
    """Check that every tensor of a checkpoint can be read and has the planned form; its proof stays what it was.

    Raises:
        CorruptCheckpointError: Something is missing or has another form.
    """
    decoded(record.plan, read_plain(path))
    note = "outputs need the module: hf_compress.load(path, model=...), then hf_compress.save(..., inputs=[...])"
    reason = record.proof.reason.partition(" (verified again")[0]
    return record.proof.model_copy(update={"reason": f"{reason} (verified again: files and tensors; {note})"})


def plain_inputs(inputs: object, module: nn.Module) -> list[InputSet]:
    """Forward arguments of a plain module, as dicts.

    Args:
        inputs: A list with one entry per call: a dict of tensors, a tensor, or a tuple of tensors in the order of the
            forward's arguments. A single dict or tensor is one call.
        module: The module.

    Raises:
        InputError: Something else.
    """
    calls = list(inputs) if isinstance(inputs, list) else [inputs]
    return normalise_inputs([_named(call, module) for call in calls], module)


def flat_outputs(outputs: object) -> dict[str, Tensor]:
    """Every tensor and number in what a module returns, however nested.

    Args:
        outputs: Tensors and numbers, or lists, tuples, mappings and data classes of them; anything else is left out.

    Returns:
        Dense, real tensors of at least one dimension on the CPU, by their path, such as `1.0`; `output` for a single
        one. Complex ones have a last dimension of two.
    """
    return {path or "output": value for path, value in _leaves(outputs, "")}


def _leaves(value: object, path: str) -> Iterator[tuple[str, Tensor]]:
    """Paths and tensors."""
    if isinstance(value, Tensor):
        yield path, _comparable(value)
    elif isinstance(value, int | float | complex):
        yield path, _comparable(torch.tensor(value))
    else:
        for name, part in _parts(value).items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name))


def _parts(value: object) -> Mapping[object, object]:
    """What a container holds, by key, position or field; nothing of other objects."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _comparable(value: Tensor) -> Tensor:
    """A dense, real copy on the CPU with at least one dimension."""
    value = value.detach().cpu()
    value = value if value.layout is torch.strided else value.to_dense()
    return torch.atleast_1d(torch.view_as_real(value.resolve_conj()) if value.is_complex() else value)


def _compared_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Check:
    """Compare what was saved with what was read.

    Raises:
        ProofError: A tensor is missing, too many, or differs.
    """
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [name for name in expected.keys() & found.keys() if not same_bytes(expected[name], found[name])]
    if wrong:
        raise ProofError(f"Tensors differ after the reload: {listed(wrong)}. Nothing was written.", "report this")
    return Check(name=f"{len(expected)} tensors re-read", difference=0.0, relative=0.0, limit=0.0)


def _compared_outputs(module: nn.Module, twin: nn.Module, inputs: Sequence[InputSet]) -> tuple[Check, ...]:
    """Compare outputs of the module and of what was read, to the bit.

    Raises:
        ProofError: One differs.
        InputError: The module can't run the inputs.
    """
    expected = reference_outputs(_on_cpu(module), inputs, flat_outputs)
    return compare(expected, reference_outputs(twin, inputs, flat_outputs), 0.0)


def _not_compared(outputs: Sequence[Check], inputs: Sequence[InputSet] | None) -> str:
    """What the reason says about outputs that were not compared."""
    if inputs is None:
        return "; outputs were not compared, since no inputs were given"
    compared = {check.name.partition(".")[0] for check in outputs}
    silent = [index for index in range(len(inputs)) if str(index) not in compared]
    return (
        f"; outputs were not compared: those on {listed(f'inputs[{i}]' for i in silent)} hold no tensor"
        if silent
        else ""
    )


def _named(call: object, module: nn.Module) -> object:
    """One call's arguments by name."""
    if isinstance(call, Tensor):
        call = (call,)
    if not isinstance(call, tuple):
        return call
    parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(call) > len(names):
        raise InputError(
            f"{len(call)} inputs were given, {original_class(module).__name__}.forward names {len(names)} arguments.",
            'pass inputs=[{"name": tensor}]',
        )
    return dict(zip(names, call, strict=False))


@torch.no_grad()
def _blank(module: nn.Module, plan: Plan) -> nn.Module:
    """An empty dense copy of a packed module: nothing of its saved state can leak into a proof.

    Raises:
        UnsupportedModelError: It can't be copied.
    """
    twin = _copied(module)
    for _, part in list(packed_modules(twin)):
        unpack_module(part)
    forget_plan(twin)
    for rows in plan.followers.values():
        for row in rows:
            source = next(one for one in plan.quantized if one.name == row.tied_to)
            owner = twin.get_submodule(source.module)
            setattr(twin.get_submodule(row.module), row.parameter, owner.get_parameter(source.parameter))
    for value in saved_state(twin).values():
        value.zero_()
    return twin


def _on_cpu(module: nn.Module) -> nn.Module:
    """The module itself where it is on the CPU, else a copy there."""
    away = any(value.device.type != "cpu" for value in (*module.parameters(), *module.buffers()))
    return _copied(module) if away else module


def _copied(module: nn.Module) -> nn.Module:
    """A copy on the CPU.

    Raises:
        UnsupportedModelError: It can't be copied.
    """
    try:
        return copy.deepcopy(module).cpu()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} can't be copied, which the proof of its checkpoint needs: {first_line(error)}",
            "keep what can't be copied outside of the module",
        ) from error
