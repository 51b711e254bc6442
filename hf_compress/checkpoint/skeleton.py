"""Plain modules: no config rebuilds them, so their checkpoint is read into a skeleton that the user builds.

A skeleton has the classes, names and shapes of the module that was saved; its values don't matter, it may be on meta.
The checkpoint is the guarded form: `hf_compress.safetensors` with the whole state dict, and a `config.json` that stock
transformers refuses.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import (
    AlreadyQuantizedError,
    ConfigError,
    InputError,
    ProofError,
    UnsupportedModelError,
    first_line,
    listed,
)
from ..core.plan import Plan, PlanRow
from ..core.weights import Weight, list_weights
from ..formats.base import encode_model, format_of
from ..modules.kernels.choose import choose_kernels
from ..modules.packed import PackedTensor
from ..modules.swap import packed_modules, unpack_module
from .handover import forget_plan, hand_over, plan_of
from .inputs import InputSet, normalise_inputs
from .load import check_guard, read_tensors, renamed
from .proof import compare, file_hashes, reference_outputs
from .record import KEY, Check, Proof, Record, read_config, record_of, sort_metadata, weight_files
from .session import place, release_ties

_MODULE = "hf_compress_module"
_SHARED = "hf_compress_shared"


def is_plain(path: Path) -> bool:
    """Whether a checkpoint holds a plain module.

    Raises:
        CorruptCheckpointError: Its config can't be read.
    """
    return _MODULE in read_config(path)


def needs_skeleton(path: Path) -> ConfigError:
    """The error for reading a plain module without a skeleton."""
    name = read_config(path).get(_MODULE)
    return ConfigError(
        f"{path} holds a plain module, {name}; only its code can build it.",
        f'build one as it was saved and pass it: hf_compress.load("{path}", model={name}(...))',
    )


def write_plain(module: nn.Module, plan: Plan, folder: Path) -> None:
    """Write a packed plain module.

    Args:
        module: The module.
        plan: Its plan, of the guarded format.
        folder: An existing directory.

    Raises:
        UnsupportedModelError: Its state dict holds something other than tensors.
    """
    layout = format_of(plan)
    tensors, shared = _stored(_encoded(module, plan))
    metadata = {"format": "pt", KEY: record_of(module, plan).model_dump_json(), _SHARED: json.dumps(shared)}
    file = folder / str(layout.weights_file)
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)
    config = {_MODULE: _original(module).__name__, "quantization_config": layout.quantization_config(plan)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """
    twin = load_into(path, record, _blank(module, record.plan))
    expected, found = _encoded(module, record.plan), _encoded(twin, record.plan)
    wrong = [name for name, value in expected.items() if name not in found or not _same(value, found[name])]
    if wrong or expected.keys() != found.keys():
        raise ProofError(f"Tensors differ after the reload: {listed(wrong)}. Nothing was written.", "report this")
    checks = [Check(name=f"{len(expected)} tensors re-read", difference=0.0, relative=0.0, limit=0.0)]
    reason = "a plain module: stock transformers has no class for it, so our own reader filled an empty copy of it"
    if inputs is None:
        reason += "; outputs were not compared, since no inputs were given"
    else:
        reference = _on_cpu(module)
        checks += compare(reference_outputs(reference, inputs), reference_outputs(twin, inputs), 0.0)
    return Proof(level="own-reader", reason=reason, reader="hf_compress", checks=checks, files=file_hashes(path))


def check_plain(path: Path, record: Record) -> Proof:
    """Check that every tensor of a checkpoint can be read and has the planned form; its proof stays what it was.

    Raises:
        CorruptCheckpointError: Something is missing or has another form.
    """
    _decoded(record.plan, _tensors(path))
    note = "outputs need the module: hf_compress.load(path, model=...), then hf_compress.save(..., inputs=[...])"
    reason = record.proof.reason.partition(" (verified again")[0]
    return record.proof.model_copy(update={"reason": f"{reason} (verified again: files and tensors; {note})"})


def load_into(path: Path, record: Record, skeleton: nn.Module) -> nn.Module:
    """Fill a skeleton with a guarded checkpoint, in place; nothing is changed unless everything fits.

    Args:
        path: The checkpoint directory.
        record: Its record.
        skeleton: A module of the same structure, dense, on the CPU or meta.

    Returns:
        The skeleton, packed, in evaluation mode, with kernels chosen. Data types are those of the checkpoint.

    Raises:
        UnsupportedModelError: Names, shapes or kinds differ, or a buffer that is not saved is on meta.
        AlreadyQuantizedError: The skeleton is packed or quantized already.
        ConfigError: The checkpoint is not guarded, and needs no skeleton.
        CorruptCheckpointError: It is damaged.
    """
    _check_skeleton(skeleton)
    if record.plan.format != "guarded":
        raise ConfigError(
            f"{path} is a {record.plan.format} checkpoint; a skeleton is for guarded ones.",
            f'leave it out: hf_compress.load("{path}")',
        )
    check_guard(path, record.plan)
    tensors = _tensors(path)
    if isinstance(skeleton, PreTrainedModel):
        tensors = renamed(tensors, skeleton)
    packed = _decoded(record.plan, tensors)
    owned = {key for row in record.plan.quantized for key in format_of(record.plan).keys(row)}
    dense = {name: value for name, value in tensors.items() if name not in owned}
    _check_fit(path, record.plan, skeleton, dense)
    _fill(skeleton, dense)
    for row in record.plan.quantized:
        if row.tied_to is None:
            place(skeleton, record.plan, row, packed[row.name])
    release_ties(skeleton, record.plan)
    if isinstance(skeleton, PreTrainedModel):
        skeleton.tie_weights(recompute_mapping=False)
    choose_kernels(skeleton)
    hand_over(skeleton, record.plan)
    return skeleton.eval()


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


def _named(call: object, module: nn.Module) -> object:
    """One call's arguments by name."""
    if isinstance(call, Tensor):
        call = (call,)
    if not isinstance(call, tuple):
        return call
    parameters = list(inspect.signature(_original(module).forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(call) > len(names):
        raise InputError(
            f"{len(call)} inputs were given, {_original(module).__name__}.forward names {len(names)} arguments.",
            'pass inputs=[{"name": tensor}]',
        )
    return dict(zip(names, call, strict=False))


def _original(module: nn.Module) -> type[nn.Module]:
    """The module's class before packing."""
    found: type[nn.Module] = vars(type(module)).get("hfc_base", type(module))
    return found


def _check_skeleton(skeleton: object) -> None:
    """Refuse what can't be filled."""
    if not isinstance(skeleton, nn.Module):
        raise UnsupportedModelError(
            f"model is a {type(skeleton).__name__}, not a module.", "pass a module built as the saved one was"
        )
    packed = next((path for path, _ in packed_modules(skeleton)), None)
    if packed is not None or plan_of(skeleton) is not None or vars(skeleton).get("hf_quantizer") is not None:
        raise AlreadyQuantizedError(
            f"The skeleton {type(skeleton).__name__} is quantized already{f' ({packed})' if packed else ''}.",
            "pass a fresh module of the same class",
        )


def _check_fit(path: Path, plan: Plan, skeleton: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and kinds.

    Raises:
        UnsupportedModelError: With everything that differs.
    """
    own = _state(skeleton)
    weights = {weight.key: weight for weight in list_weights(skeleton)}
    planned = {row.key for row in plan.quantized}
    planned |= {name for name, value in own.items() if any(value is own.get(key) for key in planned)}
    tied = set(skeleton.all_tied_weights_keys) if isinstance(skeleton, PreTrainedModel) else set()
    problems = {
        "it lacks": sorted((set(dense) | planned) - set(own)),
        "the checkpoint lacks": sorted(set(own) - set(dense) - planned - tied),
        "other shapes:": [
            f"{name} {tuple(own[name].shape)} instead of {tuple(value.shape)}"
            for name, value in dense.items()
            if name in own and own[name].shape != value.shape
        ],
        "other weights:": [_other(row, weights[row.key]) for row in plan.quantized if _differs(row, weights)],
        "tied, but saved apart:": _torn(own, dense),
        "buffers without values:": [
            name for name, value in skeleton.named_buffers() if value.is_meta and name not in own
        ],
    }
    said = [f"{what} {listed(names)}" for what, names in problems.items() if names]
    if said:
        raise UnsupportedModelError(
            f"{type(skeleton).__name__} does not fit {path}: {'; '.join(said)}. Nothing was changed.",
            "build it with the arguments of the module that was saved, on the CPU where buffers are not saved",
        )


def _differs(row: PlanRow, weights: Mapping[str, Weight]) -> bool:
    """Whether a planned weight has another kind or shape in the skeleton."""
    weight = weights.get(row.key)
    form = (row.kind, row.shape, row.transposed, row.kernel)
    return weight is not None and form != (weight.kind, weight.shape, weight.transposed, weight.kernel)


def _other(row: PlanRow, weight: Weight) -> str:
    """How a weight differs from its plan."""
    return f"{row.name} {weight.kind} {weight.shape} instead of {row.kind} {row.shape}"


def _torn(own: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> list[str]:
    """Names that are one parameter in the skeleton and have different values in the checkpoint."""
    first: dict[int, str] = {}
    pairs = [(first.setdefault(id(own[name]), name), name) for name in dense if name in own]
    return [f"{name} to {other}" for other, name in pairs if other != name and not _same(dense[name], dense[other])]


def _fill(skeleton: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers, keeping ties of the skeleton."""
    state = _state(skeleton)
    made: dict[int, Tensor] = {}
    for name, value in dense.items():
        path, _, attribute = name.rpartition(".")
        module, old = skeleton.get_submodule(path), state[name]
        if id(old) not in made:
            new = value.clone()
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        if isinstance(old, nn.Parameter):
            setattr(module, attribute, made[id(old)])
        else:
            module._buffers[attribute] = made[id(old)]


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with the parameters themselves, so that ties can be told."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return state


def _encoded(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors to write.

    Raises:
        UnsupportedModelError: There is other state than tensors.
    """
    state: Mapping[str, object] = encode_model(module, plan, format_of(plan))
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise UnsupportedModelError(
            f"{type(module).__name__} keeps state that is no tensor: {listed(foreign)}.",
            "turn it into buffers; a checkpoint holds tensors only",
        )
    return {name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, and the names of those that are the same as an earlier one."""
    seen: dict[tuple[object, ...], str] = {}
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, value in sorted(tensors.items()):
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if place in seen:
            shared[name] = seen[place]
        else:
            seen[place] = name
            stored[name] = value.contiguous().clone()
    return stored, shared


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, shared ones under each of their names."""
    tensors = read_tensors(path)
    for file in weight_files(path):
        with safe_open(file, framework="pt") as opened:
            shared = json.loads((opened.metadata() or {}).get(_SHARED, "{}"))
        tensors |= {name: tensors[source] for name, source in shared.items() if source in tensors}
    return tensors


def _decoded(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """Every packed weight, by its row's name."""
    layout = format_of(plan)
    return {row.name: layout.decode(row, tensors) for row in plan.quantized if row.tied_to is None}


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
    for value in _state(twin).values():
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


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return bool(((left == right) | (left != left)).all()) if left.numel() else True
