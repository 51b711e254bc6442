"""Weights that bitsandbytes, torchao or another library quantized: what they are and which bytes they take.

Read from the loaded model itself. Neither transformers' `is_quantized` nor `get_memory_footprint` tells: the first
says what was asked for, the second counts torchao's tensors as if they were dense.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..core.errors import UnsupportedModelError, listed
from ..core.plan import Plan, PlanRow, row_of
from ..core.registry import FORMATS
from ..core.scheme import Scheme, label
from ..core.weights import Role, Weight, list_weights, small_parameters
from ..formats.base import plain_path
from ..modules.kernels.choose import kernel_counts
from ..modules.swap import packed_modules
from .proof_worker import held_tensors

LIBRARIES = ("bitsandbytes", "torchao")
"""Libraries whose models this package saves, loads, proves and evaluates through transformers' own quantizer."""

PACKED_FOR_CPU = "packing_format_for_cpu"
"""What bitsandbytes notes on a weight that it repacked for this processor."""


@dataclass(frozen=True)
class Foreign:
    """One weight that another library quantized.

    Attributes:
        library: Its name.
        scheme: What it made of the weight, such as `nf4`, `int8` or `int8-dynamic` (inputs quantized as they come).
        stored_bytes: Bytes of the weight with its scales and tables.
    """

    library: str
    scheme: str
    stored_bytes: int

    @property
    def label(self) -> str:
        """`bitsandbytes nf4`."""
        return f"{self.library} {self.scheme}"


def foreign_of(module: nn.Module, parameter: str) -> Foreign | None:
    """What bitsandbytes or torchao made of a module's parameter; None where it is dense.

    Args:
        module: The module; the meta device will do for torchao.
        parameter: The parameter's name.
    """
    value = module._parameters.get(parameter)
    library = type(value).__module__.partition(".")[0]
    if value is None or library not in LIBRARIES:
        return None
    scheme = _bitsandbytes_scheme(value) if library == "bitsandbytes" else _torchao_scheme(value)
    if scheme is None:
        return None
    beside = {id(other) for name, other in module._parameters.items() if name != parameter and other is not None}
    return Foreign(library, scheme, _bytes(held for held in held_tensors(module) if id(held) not in beside))


def _bitsandbytes_scheme(value: Tensor) -> str | None:
    """`nf4`, `fp4` or `int8`; None where nothing is quantized (yet)."""
    state = vars(value)
    if type(value).__name__ == "Params4bit":
        return str(state["quant_type"]) if state["quant_state"] is not None else None
    return "int8" if value.dtype == torch.int8 else None


def _torchao_scheme(value: Tensor) -> str | None:
    """Type of the values, `-dynamic` where inputs are quantized too."""
    if not is_traceable_wrapper_subclass(value):
        return None
    context = value.__tensor_flatten__()[1]
    told = context if isinstance(context, dict) else {}
    target = told.get("target_dtype")
    named = re.match(r"(int|uint|float)\d+", type(value).__name__.lower())
    kind = str(target).removeprefix("torch.") if target else named.group() if named else type(value).__name__
    dynamic = told.get("act_quant_kwargs") is not None or told.get("activation_quantization") is not None
    return f"{kind}-dynamic" if dynamic else kind


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values, tensors that share their memory once."""
    found = {(id(one) if one.is_meta else one.data_ptr()): one.numel() * one.dtype.itemsize for one in tensors}
    return sum(found.values())


def foreign_row(weight: Weight, made: Foreign | str, reason: str = "") -> PlanRow:
    """A plan's row for a weight in the hands of another library.

    Args:
        weight: The weight.
        made: What became of it, or why it stays as it is.
        reason: Why, where it is not kept.
    """
    if isinstance(made, str):
        return row_of(weight, made, "", in_scope=weight.role not in (Role.HEAD, Role.EMBEDDING))
    changes = {"scheme": made.scheme, "backend": made.label, "stored_bytes": made.stored_bytes, "reason": reason}
    return row_of(weight, "", "", in_scope=True).model_copy(update=changes)


def measured_plan(model: nn.Module) -> Plan | None:
    """A plan that says what a model is, whoever made it; None where this package packed it.

    Args:
        model: A model with weights, as stock transformers loaded it, or a plain module.
    """
    if any(True for _ in packed_modules(model)):
        return None
    config = quantization_of(model)
    method = method_name(config)
    weights = list_weights(_skeleton(model) if method else model)
    modules = {plain_path(path): module for path, module in model.named_modules()}
    rows = tuple(_measured_row(weight, modules.get(weight.module), method) for weight in weights)
    known = method if method in FORMATS.names() else "dense"
    return Plan(
        method=method or "none",
        request={},
        format=known if any(row.covered for row in rows) else "dense",
        rows=rows,
        small_parameters=small_parameters(model),
        notes=_notes(rows, method),
    )


def quantization_of(model: nn.Module) -> object | None:
    """The quantization config of a model that stock transformers loaded quantized, or None."""
    quantizer = vars(model).get("hf_quantizer")
    return None if quantizer is None else quantizer.quantization_config


def method_name(config: object | None) -> str:
    """`quant_method` of a quantization config as our formats are named; empty without a config."""
    found = "" if config is None else vars(config).get("quant_method", "")
    return str(found.value if isinstance(found, Enum) else found)


def _skeleton(model: nn.Module) -> nn.Module:
    """The dense architecture of a transformers model, on meta; libraries have replaced its modules or weights."""
    if not isinstance(model, PreTrainedModel):
        return model
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made: nn.Module = vars(type(model)).get("hfc_base", type(model))(config)
    return made.to(model.dtype)


def _measured_row(weight: Weight, module: nn.Module | None, method: str) -> PlanRow:
    """What a weight is in a loaded model."""
    if module is None:
        return foreign_row(weight, f"{method} has put something else in its place")
    made = foreign_of(module, weight.parameter)
    if made is not None:
        return foreign_row(weight, made, "measured")
    scheme = vars(module).get("quantization_scheme")
    value = module._parameters.get(weight.parameter)
    dense = value is not None and value.is_floating_point() and tuple(value.shape) == _shape(weight)
    if isinstance(scheme, QuantizationScheme) and scheme.weights is not None:
        called = label(Scheme.model_validate(scheme.model_dump()))
        reason = "compressed on disk, dense in memory" if dense else "measured"
        return foreign_row(weight, Foreign("compressed-tensors", called, _own_bytes(module)), reason)
    if dense or weight.tied_to:
        return foreign_row(weight, "dense")
    return foreign_row(weight, Foreign(method, type(module).__name__, _own_bytes(module)), "measured")


def _own_bytes(module: nn.Module) -> int:
    """Bytes of everything that a module holds itself but its bias."""
    bias = module._parameters.get("bias")
    return _bytes(tensor for tensor in held_tensors(module) if tensor is not bias)


def _shape(weight: Weight) -> tuple[int, ...]:
    """The parameter's shape from the canonical one."""
    if weight.kernel:
        return (weight.shape[0], *weight.kernel)
    return (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if weight.transposed else weight.shape


def _notes(rows: Iterable[PlanRow], method: str) -> tuple[str, ...]:
    """What a reader of a measured plan should know."""
    dense = [row.name for row in rows if row.backend and row.reason == "compressed on disk, dense in memory"]
    notes = [] if method else ["not quantized"]
    if method and method not in FORMATS.names():
        notes.append(f"hf_compress does not save or load {method} models; use transformers")
    if dense:
        notes.append(
            f"{len(dense)} compressed weights are dense in memory ({listed(dense, 1)}); "
            "hf_compress.optimize_for_inference(model) packs them"
        )
    return tuple(notes)


def check_measured(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the bytes that its weights really take, once each is what the plan says.

    Args:
        plan: A plan of `bitsandbytes` or `torchao`.
        model: The loaded model.

    Raises:
        UnsupportedModelError: A weight is something else; names it.
    """
    rows = []
    modules = {plain_path(path): module for path, module in model.named_modules()}
    for row in plan.rows:
        module = None if row.tied_to else modules.get(row.module)
        found = None if module is None else foreign_of(module, row.parameter)
        seen = "dense" if found is None else found.label
        if seen != (row.backend or "dense") and not row.tied_to:
            raise UnsupportedModelError(
                f"{row.name} of {type(model).__name__} is {seen}, its plan says {row.backend or 'dense'}.",
                "start from the original model: hf_compress.quantize(id, config)",
            )
        rows.append(row if found is None else row.model_copy(update={"stored_bytes": found.stored_bytes}))
    return plan.model_copy(update={"rows": tuple(rows)})


def settle(model: nn.Module) -> None:
    """Undo, exactly, how bitsandbytes repacks 4-bit weights in their first forward on some processors (AVX512-BF16).

    Its own way back, which every `state_dict()` takes, leaves the scales transposed, so that both the saved and the
    live model give other outputs. Afterwards the scales are float32 of the same values and no longer nested; the
    next forward repacks to the same bytes.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ != "Params4bit" or weight is None:
            continue
        state = vars(weight)["quant_state"]
        if state is None or not vars(state).get(PACKED_FOR_CPU):
            continue
        absmax = state.absmax.t().reshape(-1).float().contiguous()
        state.original_nested = False
        module.state_dict()
        state.absmax = absmax


def running_kernels(model: nn.Module, plan: Plan | None) -> dict[str, int]:
    """How many modules each of our kernels runs, and how many weights each other library."""
    rows = () if plan is None else plan.rows
    libraries = Counter(row.backend.partition(" ")[0] for row in rows if row.backend)
    return {**kernel_counts(model), **dict(sorted(libraries.items()))}


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that are as they were before; those of bitsandbytes are flat and left out."""
    return {
        name: tuple(value.shape)
        for name, value in cast("Iterable[tuple[str, Tensor]]", model.named_parameters())
        if not is_lazy(value) and type(value).__module__.partition(".")[0] != "bitsandbytes"
    }
