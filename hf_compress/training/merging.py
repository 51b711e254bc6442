"""One layer with an adapter, merged on trial: into packed weights by us, into all others by PEFT."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.foreign import Foreign
from ..core.errors import MergeError, first_line
from ..core.packages import require
from ..core.plan import PlanRow, dtype_name
from ..core.registry import METHODS, Quantized
from ..modules.packed import PackedTensor, dequantize
from ..modules.results import canonical, check_values, pack_result
from ..modules.swap import PackedModule, packed_tensor, unpack_module

WAYS_OUT = (
    'keep the adapter apart: model.save_pretrained("adapter"); or merge into the dense model and compress that: '
    'PeftModel.from_pretrained(hf_compress.load(path).dequantize(), "adapter").merge_and_unload()'
)

_REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError)
"""What PEFT raises where a layer or a variant of LoRA can't be merged."""


@dataclass(frozen=True)
class LayerMerge:
    """What merging does to one layer.

    Attributes:
        name: The layer's path in the base model.
        scheme: What its weight is stored as, such as `int4-g64`, `bitsandbytes nf4` or `float16`.
        error: Norm of what rounding the merged weight changes.
        effect: Norm of what the adapter changes.
    """

    name: str
    scheme: str
    error: float
    effect: float

    @property
    def ratio(self) -> float:
        """Error over effect; 0 where nothing is lost, infinite where an adapter that does nothing would do harm."""
        return ratio(self.error, self.effect)


@dataclass(frozen=True)
class Merging:
    """One layer with its merged weight, not yet in place.

    Attributes:
        told: What merging does to it.
        layer: PEFT's layer.
        base: The module below it.
        packed: The merged weight, where this package packed the layer; PEFT merges the others.
        noise: Of the packed weight against the merged one, in dB; None where exact.
        bias: The merged bias of a packed layer, where the adapter has one.
    """

    told: LayerMerge
    layer: Any
    base: nn.Module
    packed: PackedTensor | None = None
    noise: float | None = None
    bias: Tensor | None = None


def merge_packed(row: PlanRow, layer: Any, base: PackedModule, seen: Tensor | None, method: str) -> Merging:
    """A layer that this package packed: merged in float32, then put back onto its grid in the better way."""
    before = packed_tensor(base, "weight")
    clone = copy.deepcopy(base)
    unpack_module(clone)
    merge(_around(layer, clone).float(), row.module)
    merged = canonical(clone.get_parameter("weight").detach(), before.layout)
    check_values(row.name, merged)
    narrow = merged.to(before.scale.dtype)
    tries = [_rounded(narrow, before, method)]
    if before.codebook is None:
        tries.append(_on_grid(narrow, before))
    made = [pack_result(row, merged, one) for one in tries]
    errors = [_norm(dequantize(packed).float() - merged, seen) for packed, _ in made]
    best = errors.index(min(errors))
    effect = _norm(merged - dequantize(before).float(), seen)
    told = LayerMerge(row.module, row.scheme, errors[best], effect)
    biased = any(layer.lora_bias.get(name) for name in active(layer))
    bias = clone.get_parameter("bias").detach().to(base.get_parameter("bias").dtype) if biased else None
    return Merging(told, layer, base, *made[best], bias)


def _rounded(weight: Tensor, before: PackedTensor, method: str) -> Quantized:
    """A weight rounded to nearest with new scales, by the method's own rounding where it has one without data."""
    run = METHODS.get(method).quantize or METHODS.get("rtn").quantize
    if run is None:
        raise ValueError("rounding to nearest is a method")
    if before.g_idx is None:
        made = run(weight, before.layout.scheme)
    else:  # columns of a group side by side
        order = torch.argsort(before.g_idx, stable=True)
        made = run(weight[:, order], before.layout.scheme)
        made = replace(made, codes=torch.empty_like(made.codes).index_copy_(-1, order, made.codes))
    return _with_inputs(made, before)


def _on_grid(weight: Tensor, before: PackedTensor) -> Quantized:
    """A weight rounded to the nearest points of the very grid that its layer has."""
    limit = 2 ** (before.layout.weights.num_bits - 1)
    scaled = weight.float() / _per_column(before.scale, before).float()
    if before.zero_point is not None:
        scaled += _per_column(before.zero_point, before).float()
    codes = scaled.round_().clamp_(-limit, limit - 1).to(torch.int8)
    return _with_inputs(Quantized(codes, before.scale, before.zero_point), before)


def _per_column(value: Tensor, before: PackedTensor) -> Tensor:
    """Scales or zero points as they apply to rows × columns."""
    if before.layout.weights.strategy != "group":
        return value
    if before.g_idx is not None:
        return value[:, before.g_idx.long()]
    return value.repeat_interleave(before.layout.shape[-1] // value.shape[-1], dim=-1)


def _with_inputs(made: Quantized, before: PackedTensor) -> Quantized:
    """A result with the order of columns, and the grid of inputs, that the layer has."""
    return replace(made, g_idx=before.g_idx, input_scale=before.input_scale, input_zero_point=before.input_zero_point)


def merge_by_library(path: str, layer: Any, foreign: Foreign, seen: Tensor | None) -> Merging:
    """A layer of bitsandbytes or torchao, merged on trial by PEFT."""
    base = layer.get_base_layer()
    before = _library_values(base, foreign)
    merged = before + sum(layer.get_delta_weight(name).float() for name in active(layer))
    clone = _twin(base, foreign)
    merge(_around(layer, clone), path)
    if "state" in vars(clone):  # of 8-bit layers: still holds the old scales, until the next forward
        clone.state.SCB = None
    told = LayerMerge(
        path, foreign.label, _norm(_library_values(clone, foreign) - merged, seen), _norm(merged - before, seen)
    )
    return Merging(told, layer, base)


def _library_values(base: Any, foreign: Foreign) -> Tensor:
    """The dense weight of a layer of bitsandbytes or torchao, float32, rows × columns."""
    if foreign.library == "bitsandbytes":
        tools = require("peft.utils.integrations")
        made: Tensor = tools.dequantize_bnb_weight(base.weight, state=vars(base).get("state"))
    else:
        made = base.weight.dequantize()
    return made.detach().float()


def _twin(base: nn.Module, foreign: Foreign) -> Any:
    """A copy of a library's layer that can be merged into without touching the original."""
    if foreign.label != "bitsandbytes int8":
        return copy.deepcopy(base)
    twin = copy.copy(base)  # 8-bit parameters lose their scales when they are copied, and are only replaced
    vars(twin)["_parameters"] = dict(base._parameters)
    vars(twin)["state"] = copy.copy(vars(base)["state"])
    return twin


def merge_dense(path: str, layer: Any, seen: Tensor | None) -> Merging:
    """A dense layer: its error is that of adding in its own data type."""
    base = layer.get_base_layer()
    wide, narrow = copy.deepcopy(base), copy.deepcopy(base)
    merge(_around(layer, wide).float(), path)
    merge(_around(layer, narrow), path)
    before, exact, stored = (_rows(module) for module in (base, wide, narrow))
    told = LayerMerge(path, dtype_name(base.weight.dtype), _norm(stored - exact, seen), _norm(exact - before, seen))
    return Merging(told, layer, base)


def _rows(module: nn.Module) -> Tensor:
    """A dense weight in float32, rows × columns."""
    weight = module.get_parameter("weight").detach().float()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def _around(layer: Any, base: nn.Module) -> Any:
    """A copy of PEFT's layer with another module below it."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.train()  # variants forget what they cached with its graph, which can't be copied
    for module, mode in modes:
        module.training = mode
    return copy.deepcopy(layer, {id(layer.get_base_layer()): base})


def merge(layer: Any, path: str) -> None:
    """PEFT's own merge.

    Raises:
        MergeError: It can't.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Merge lora module to")  # what it warns of is what we measure
            layer.merge(safe_merge=True)
    except _REFUSALS as error:
        raise MergeError(
            f"{path} can't be merged: {first_line(error).rstrip('.')}. Nothing was changed.", WAYS_OUT
        ) from error


def _norm(change: Tensor, seen: Tensor | None) -> float:
    """The norm of a change of a weight, or of what it does to inputs.

    Args:
        change: Rows × columns, float32.
        seen: Tokens × columns, groups × windows × columns, or row numbers of an embedding; None for the weight's own.
    """
    if seen is None:
        made = change
    elif not seen.is_floating_point():
        made = change[seen]
    elif seen.ndim == 3:
        made = seen @ change.unflatten(0, (len(seen), -1)).transpose(-1, -2)
    else:
        made = seen @ change.T
    return float(torch.linalg.vector_norm(made, dtype=torch.float64))


def ratio(error: float, effect: float) -> float:
    """Error over effect, 0 where there is no error."""
    if error == 0:
        return 0.0
    return error / effect if effect else math.inf


def active(layer: Any) -> list[str]:
    """Names of the active adapters that a layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]
