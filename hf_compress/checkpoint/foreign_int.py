"""GPTQ and AWQ checkpoints that others wrote, read on any machine without their libraries.

Which layers are packed is told by the tensors on disk; bits, groups and layout by the config, checked against shapes.
Older tools wrote their settings beside a config that does not mention them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..core import scheme as schemes
from ..core.errors import FormatError, TiedWeightsError, UnsupportedModelError, listed
from ..core.fit import holds
from ..core.plan import DTYPES, Plan, PlanRow, row_of
from ..core.registry import FORMATS
from ..core.weights import Role, Weight, WeightKind, list_weights, small_parameters
from ..formats.awq import AWQFormat, stock_refusal
from ..formats.gptq import GPTQFormat
from ..modules.packed import PackedTensor, layout_of
from .foreign_settings import BITS, Settings, damaged, of_another_tool
from .load import ReadRequest, check_plan, load_state, read_files, renamed, stored_config
from .record import weight_files
from .session import LoadSession
from .stock import damaged_if_it_fails

Layout: TypeAlias = GPTQFormat | AWQFormat

_HELD = (WeightKind.LINEAR, WeightKind.CONV1D)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A GPTQ or AWQ checkpoint on disk.

    Attributes:
        path: Its directory.
        settings: What it says of itself.
        layout: The format whose tensors it holds.
        config: The model's config, without quantization.
        architecture: The model's class.
        tensors: All its tensors, mapped from their files, by name on disk.
    """

    path: Path
    settings: Settings
    layout: Layout
    config: PreTrainedConfig
    architecture: type[PreTrainedModel]
    tensors: Mapping[str, Tensor]

    def skeleton(self) -> PreTrainedModel:
        """The dense model on meta, in the config's data type."""
        with damaged_if_it_fails(str(self.path)), torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = self.architecture(self.config)
        return model.to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The config's data type."""
        named = self.config.dtype
        return named if isinstance(named, torch.dtype) else DTYPES.get(str(named), torch.float32)


class ForeignRequest(ReadRequest):
    """Reads the tensors that another tool wrote."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__(plan, tensors)
        self.layout = layout

    def session(self, model: PreTrainedModel) -> LoadSession:
        """A load session whose packer reads a foreign layout."""
        check_plan(self.plan, model)
        tensors = renamed(self.tensors, model)

        def read(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
            return _read(row, tensors, self.layout), None

        return LoadSession(self.plan, read)


@of_another_tool()
def open_foreign(path: Path, settings: Settings) -> ForeignCheckpoint:
    """A checkpoint with its tensors mapped.

    Args:
        path: Its directory.
        settings: What it says of itself.

    Raises:
        FormatError: It has a layout or a bit width that is not read.
        CorruptCheckpointError: Its weights are damaged, or there are none in safetensors.
    """
    layout = _layout(path, settings)
    config, architecture = stored_config(path)
    if isinstance(config.dtype, torch.dtype) and not config.dtype.is_floating_point:
        raise damaged(f"{path / 'config.json'} has the data type {str(config.dtype).removeprefix('torch.')}")
    files = weight_files(path) or sorted(path.glob("*.safetensors"))
    if not files:
        raise damaged(f"{path} has no safetensors file; pickled weights are never read")
    tensors = read_files(files)
    packed = {key: value for key, value in tensors.items() if key.endswith(".qweight")}
    if not packed:
        raise damaged(f"{path} says that it is a {settings.method.upper()} checkpoint, and has no packed tensor")
    for key, value in packed.items():
        if value.dtype != torch.int32:
            raise FormatError(
                f"{key} of {path} is {value.dtype}; packing into int32 words is read.",
                'write it with pack_dtype="int32"',
            )
    return ForeignCheckpoint(path, settings, layout, config, architecture, tensors)


@of_another_tool()
def load_foreign_int(path: Path, settings: Settings) -> PreTrainedModel:
    """A model from a foreign GPTQ or AWQ checkpoint, kept packed, on the CPU, in the config's data type.

    Args:
        path: Its directory.
        settings: What it says of itself.

    Raises:
        FormatError: It has a layout or a bit width that is not read.
        CorruptCheckpointError: It is damaged, or its tensors disagree with its config.
        UnsupportedModelError: transformers has no such model, or no place in it for a packed layer.
    """
    source = open_foreign(path, settings)
    model = source.skeleton()
    plan = foreign_plan(source, model)
    owned = source.layout.owned(source.tensors) | _idle_biases(source, plan, model)
    state = {key: value for key, value in source.tensors.items() if key not in owned}
    state |= dict.fromkeys((row.key for row in plan.quantized), torch.empty(0))
    request = ForeignRequest(plan, {key: source.tensors[key] for key in owned}, source.layout)
    return load_state(path, source.architecture, source.config, state, request, closed=True, dtype=source.dtype)


@of_another_tool()
def foreign_plan(source: ForeignCheckpoint, model: PreTrainedModel) -> Plan:
    """A plan that says what a foreign checkpoint holds. Reads zero points, scales and `g_idx`, no codes.

    Args:
        source: The checkpoint.
        model: Its model; the meta device will do.

    Raises:
        CorruptCheckpointError: Tensors are missing or disagree with the config.
        UnsupportedModelError: The model has no place for a packed layer.
        TiedWeightsError: A packed layer is tied to another.
        FormatError: Groups do not divide the inputs.
    """
    tensors = renamed(source.tensors, model)
    weights = list_weights(model)
    packed = {weight.key: _parts(weight, tensors) for weight in weights}
    _check_places(source, tensors, {name for names in packed.values() for name in names})
    found = [weight for weight in weights if packed[weight.key]]
    rows = {weight.key: _row(source, weight, packed[weight.key], tensors) for weight in found}
    if not any(_asymmetric(source, row, name, tensors) for row in rows.values() for name in packed[row.key]):
        rows = {key: _symmetric(row) for key, row in rows.items()}
    kept = {weight.key: _kept(weight) for weight in weights if weight.key not in rows}
    plan = Plan(
        method=source.settings.method,
        request={},
        format="guarded",
        rows=tuple({**rows, **kept}[weight.key] for weight in weights),
        small_parameters=small_parameters(model),
        notes=_notes(source, rows.values(), tensors),
    )
    return plan.model_copy(update={"format": _format(source, plan, model)})


def _format(source: ForeignCheckpoint, plan: Plan, model: PreTrainedModel) -> str:
    """The format that a save will have: the one that was read where it holds everything, else the guarded one."""
    if source.settings.method == "awq" and stock_refusal(model, plan) is not None:
        return "guarded"
    return next(name for name in (source.layout.name, "guarded") if holds(plan, name))


def _layout(path: Path, settings: Settings) -> Layout:
    """The format whose tensors a checkpoint holds.

    Raises:
        FormatError: Its layout or bit width is not read.
    """
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[settings.method]
    found = "marlin" if settings.is_marlin_format else settings.layout or known[0]
    found = "llm-awq" if settings.backend == "llm-awq" else found
    if found not in known:
        raise FormatError(
            f"{path} is in the {settings.method.upper()} layout {found!r}, whose words are in another order; read are "
            f"{', '.join(map(repr, known))}.",
            f"convert it to {known[0]!r} with the tool that wrote it, or compress the original model",
        )
    _check_bits(str(path), settings.method, settings.bits)
    return cast(Layout, FORMATS.get("awq" if settings.method == "awq" else found))


def _check_bits(where: str, method: str, bits: int) -> None:
    """Refuse widths that are not read.

    Raises:
        FormatError: This is one.
    """
    if bits not in BITS[method]:
        allowed = ", ".join(map(str, BITS[method]))
        raise FormatError(
            f"{where} has {method.upper()} weights of {bits} bits; read are {allowed}.", "compress the original model"
        )


def _parts(weight: Weight, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the packed layers that hold a weight: one, or one per expert and part; none where it is dense."""
    if weight.kind in _HELD and weight.parameter == "weight":
        names = [weight.module]
    elif weight.kind is WeightKind.EXPERTS:
        names = [part.format(expert) for expert in range(weight.shape[0]) for part in weight.parts]
    else:
        names = []
    return names if any(f"{name}.qweight" in tensors for name in names) else []


def _check_places(source: ForeignCheckpoint, tensors: Mapping[str, Tensor], places: set[str]) -> None:
    """Refuse packed layers that the model has no linear layer for.

    Raises:
        UnsupportedModelError: There are some.
    """
    lost = sorted({key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")} - places)
    if lost:
        raise UnsupportedModelError(
            f"{source.path} has packed weights for {listed(lost)}, where {source.architecture.__name__} has no linear "
            "layer.",
            "check that config.json names the architecture that was compressed",
        )


def _row(source: ForeignCheckpoint, weight: Weight, names: list[str], tensors: Mapping[str, Tensor]) -> PlanRow:
    """The plan's row for a packed weight, with zero points.

    Raises:
        CorruptCheckpointError: Its tensors disagree with the config.
        FormatError: Its groups do not divide its inputs, or those of experts are in another order.
        TiedWeightsError: It is tied to another weight.
    """
    if weight.tied_to is not None:
        raise TiedWeightsError(
            f"{source.path} has a packed {weight.name}, and its config ties it to {weight.tied_to}.",
            'set "tie_word_embeddings": false in its config.json',
        )
    if any(key in tensors for key in (weight.key, *(f"{name}.weight" for name in names))):
        raise damaged(f"{source.path} holds {weight.name} both packed and dense")
    bits, size = source.settings.of(names[0])
    _check_bits(weight.name, source.settings.method, bits)
    columns = weight.shape[-1]
    if size < -1 or size == 0:
        raise damaged(f"The group size of {weight.name} is {size}")
    whole = size == -1 or size > columns
    if not whole and columns % size:
        raise FormatError(
            f"The groups of {size} of {weight.name} do not divide its {columns} inputs.", "compress the original model"
        )
    args = schemes.weight_args(bits, "channel" if whole else size, symmetric=False)
    reordered = any(_is_reordered(source, name, columns, columns if whole else size, tensors) for name in names)
    if reordered and weight.kind is WeightKind.EXPERTS:
        raise FormatError(f"The experts {weight.name} have groups in another order.", "compress the original model")
    made = schemes.scheme(args).model_copy(update={"reordered": reordered})
    reason = f"read from {'a GPTQ' if source.settings.method == 'gptq' else 'an AWQ'} checkpoint{source.settings.tool}"
    return row_of(weight, made, reason, in_scope=True)


def _is_reordered(
    source: ForeignCheckpoint, name: str, columns: int, size: int, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a layer's groups are not consecutive inputs.

    Raises:
        CorruptCheckpointError: Its `g_idx` is missing though the config says `desc_act`, or has another shape.
    """
    order = tensors.get(f"{name}.g_idx")
    if source.settings.method == "awq" or (order is None and not source.settings.desc_act):
        return False
    if order is None or order.dtype != torch.int32 or tuple(order.shape) != (columns,):
        seen = "missing" if order is None else f"{order.dtype} {tuple(order.shape)}"
        raise damaged(f"{name}.g_idx is {seen}, expected torch.int32 {(columns,)}")
    return not torch.equal(order, torch.arange(columns, dtype=torch.int32) // size)


def _asymmetric(source: ForeignCheckpoint, row: PlanRow, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer has a zero point that is not the middle of the grid: what the config says of it varies."""
    return bool(source.layout.zero_points(_part(row, name), tensors).any())


def _symmetric(row: PlanRow) -> PlanRow:
    """A row without zero points."""
    scheme = layout_of(row).scheme
    made = scheme.model_copy(update={"weights": layout_of(row).weights.model_copy(update={"symmetric": True})})
    return row.model_copy(update={"quantization": made, "scheme": schemes.label(made)})


def _kept(weight: Weight) -> PlanRow:
    """The plan's row for a weight that is dense on disk."""
    in_scope = weight.role not in (Role.HEAD, Role.EMBEDDING)
    return row_of(weight, "dense in its checkpoint", "", in_scope=in_scope)


def _part(row: PlanRow, name: str) -> PlanRow:
    """The row itself, or of fused experts one expert's part as a linear layer of its own."""
    if row.kind is not WeightKind.EXPERTS:
        return row
    shape = (row.shape[-2] // len(row.parts), row.shape[-1])
    changes = {"name": name, "module": name, "kind": WeightKind.LINEAR, "shape": shape, "transposed": False}
    return row.model_copy(update={**changes, "parts": ()})


def _read(row: PlanRow, tensors: Mapping[str, Tensor], layout: Layout) -> PackedTensor:
    """One packed weight, fused experts from their parts."""
    if row.kind is not WeightKind.EXPERTS:
        return layout.read(row, tensors)
    experts = [
        [layout.read(_part(row, name.format(expert)), tensors) for name in row.parts] for expert in range(row.shape[0])
    ]
    codes = torch.stack([torch.cat([part.codes for part in parts]) for parts in experts])
    scale = torch.stack([torch.cat([part.scale for part in parts]) for parts in experts])
    zeros = [[part.zero_point for part in parts if part.zero_point is not None] for parts in experts]
    zero_point = torch.stack([torch.cat(parts) for parts in zeros]) if zeros[0] else None
    return PackedTensor(layout_of(row), codes, scale, zero_point)


def _idle_biases(source: ForeignCheckpoint, plan: Plan, model: PreTrainedModel) -> set[str]:
    """Names on disk of biases that AutoGPTQ adds to layers without any: all zeros.

    Raises:
        UnsupportedModelError: One is not zero, and the model has no place for it.
    """
    names = {id(value): key for key, value in source.tensors.items()}
    idle = set()
    tensors = renamed(source.tensors, model)
    for row in plan.quantized:
        value = tensors.get(f"{row.module}.bias")
        if value is None or model.get_submodule(row.module)._parameters.get("bias") is not None:
            continue
        if bool(value.any()):
            raise UnsupportedModelError(
                f"{source.path} has a bias for {row.module}, where {source.architecture.__name__} has none.",
                "check that config.json names the architecture that was compressed",
            )
        idle.add(names[id(value)])
    return idle


def _notes(source: ForeignCheckpoint, rows: Iterable[PlanRow], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """That scales lose digits in the config's data type, where they do."""
    scales = [tensors[f"{row.module}.scales"] for row in rows if f"{row.module}.scales" in tensors]
    rounded = [scale for scale in scales if not torch.equal(scale.to(source.dtype).to(scale.dtype), scale)]
    if not rounded:
        return ()
    name = str(source.dtype).removeprefix("torch.")
    return (
        f"scales of {len(rounded)} weights are {str(rounded[0].dtype).removeprefix('torch.')} and were rounded to "
        f'{name}, the data type in config.json; "dtype": "float32" there keeps them exact',
    )
