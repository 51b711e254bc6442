"""Reading a guarded checkpoint into a skeleton that the user builds, strictly.

A skeleton has the classes, names and shapes of the module that was saved; its values don't matter, it may be on meta.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import AlreadyQuantizedError, ConfigError, UnsupportedModelError, listed
from ..core.plan import Plan, PlanRow
from ..core.weights import Weight, list_weights
from ..formats.base import format_of
from ..modules.kernels.choose import choose_kernels
from ..modules.swap import packed_modules
from .handover import hand_over, plan_of
from .load import check_guard, renamed
from .plain import decoded, named_tensors, read_plain
from .proof import same_bytes
from .record import Record
from .session import place, release_ties


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
    tensors = read_plain(path)
    if isinstance(skeleton, PreTrainedModel):
        tensors = renamed(tensors, skeleton)
    packed = decoded(record.plan, tensors)
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


def saved_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that the state dict holds, themselves, so that ties can be told."""
    held = named_tensors(module)
    return {name: held[name] for name in module.state_dict() if name in held}


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
    own = saved_state(skeleton)
    filled = {*dense, *(row.key for row in plan.quantized)}
    problems = {
        "it lacks": sorted(filled - own.keys()),
        "the checkpoint lacks": _unfilled(skeleton, plan, filled),
        "other forms:": _other_forms(own, dense),
        "other weights:": _other_weights(own, plan, skeleton),
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


def _unfilled(skeleton: nn.Module, plan: Plan, filled: set[str]) -> list[str]:
    """Names of state that the checkpoint has nothing for."""
    others = _other_paths(skeleton, plan)
    packed = {row.key for row in plan.quantized}
    declared = skeleton.all_tied_weights_keys if isinstance(skeleton, PreTrainedModel) else {}
    tied = {name for name, source in declared.items() if source not in packed}  # ties of packed ones are planned
    state = skeleton.state_dict()
    made = (skeleton._keys_to_ignore_on_save or ()) if isinstance(skeleton, PreTrainedModel) else ()
    computed = {name for name in made if name in state and not state[name].is_meta}  # never stored, Marian's positions
    return sorted(state.keys() - filled - others - tied - computed)


def _other_paths(skeleton: nn.Module, plan: Plan) -> set[str]:
    """Names of planned weights whose module lies in the skeleton under a second path."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    planned = {(id(modules.get(row.module)), row.parameter) for row in plan.quantized}
    names = ((path, module, name) for path, module in modules.items() for name in module._parameters)
    return {f"{path}.{name}" if path else name for path, module, name in names if (id(module), name) in planned}


def _other_forms(own: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> list[str]:
    """Dense tensors that have another shape or kind of numbers in the skeleton."""
    pairs = [(name, _form(own[name]), _form(value)) for name, value in dense.items() if name in own]
    return [f"{name} {mine} instead of {saved}" for name, mine, saved in pairs if mine != saved]


def _form(value: Tensor) -> str:
    """Shape and kind of numbers; data types may differ otherwise."""
    shape = str(tuple(value.shape))
    return (
        shape if value.is_floating_point() else f"{shape} of {'complex numbers' if value.is_complex() else 'integers'}"
    )


def _other_weights(own: Mapping[str, Tensor], plan: Plan, skeleton: nn.Module) -> list[str]:
    """Planned weights that are something else in the skeleton."""
    weights = {weight.key: weight for weight in list_weights(skeleton)}
    other = [row for row in plan.quantized if row.key in own and not _fits(row, weights.get(row.key))]
    return [
        f"{row.name} {_found(row, own[row.key], skeleton, weights.get(row.key))} instead of {row.kind} {row.shape}"
        for row in other
    ]


def _fits(row: PlanRow, weight: Weight | None) -> bool:
    """Whether a weight of the skeleton is what the plan says."""
    if weight is None or weight.unpackable:
        return False
    form = (weight.kind, weight.shape, weight.transposed, weight.kernel)
    return form == (row.kind, row.shape, row.transposed, row.kernel)


def _found(row: PlanRow, value: Tensor, skeleton: nn.Module, weight: Weight | None) -> str:
    """What the skeleton has in the place of a planned weight, which need not be a weight."""
    if weight is None:
        return f"{type(skeleton.get_submodule(row.module)).__name__}.{row.parameter} {tuple(value.shape)}"
    return f"{weight.kind} {weight.shape}" + (f" ({weight.unpackable})" if weight.unpackable else "")


def _torn(own: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> list[str]:
    """Names that are one parameter in the skeleton and have different values in the checkpoint."""
    first: dict[int, str] = {}
    pairs = [(first.setdefault(id(own[name]), name), name) for name in dense if name in own]
    return [
        f"{name} to {other}" for other, name in pairs if other != name and not same_bytes(dense[name], dense[other])
    ]


def _fill(skeleton: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers, keeping ties of the skeleton."""
    state = saved_state(skeleton)
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
