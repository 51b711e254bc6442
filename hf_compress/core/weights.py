"""Which weights a model has: every parameter with two or more dimensions, its kind, and what it is tied to.

Works on a model on the meta device; reads no values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import listed

PACKED_SUFFIXES = ("packed", "scale", "zero_point", "codebook", "g_idx", "input_scale", "input_zero_point")
"""Of the buffers that a packed parameter becomes."""


class WeightKind(StrEnum):
    """How a weight is used, which decides how it can be packed."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    CONV = "conv"
    RECURRENT = "recurrent"
    OTHER = "other"


class Role(StrEnum):
    """Why the default rules keep a weight."""

    HEAD = "head"
    ROUTER = "router"
    NORM = "norm"
    EMBEDDING = "embedding"
    NONE = ""


@dataclass(frozen=True)
class Weight:
    """One parameter with two or more dimensions.

    Attributes:
        name: Its name without `.weight`; what patterns match.
        module: Path of the owning module.
        parameter: Attribute name on that module.
        kind: How it is used.
        role: Why default rules would keep it.
        owner: Class name of the owning module.
        shape: Canonical shape: rows × columns, with experts first for fused experts. Columns are the inputs; of a
            convolution, input channels per group × kernel.
        transposed: Whether the stored parameter has rows and columns swapped.
        dtype: The parameter's data type.
        tied_to: Name of the first weight that shares this parameter, or None.
        parts: Checkpoint names of fused experts' weights, with `{}` for the expert; rows are split evenly among
            them. Empty when transformers stores the weight as it is.
        kernel: Of a convolution, the parameter's dimensions after the first: input channels per group, then the
            kernel's; else empty.
        stays_float32: Whether stock quantizers leave its module alone, as one that this architecture wants in float32
            (T5's `wo`).
        token_inputs: Whether its module multiplies it with inputs that can be quantized per token: linear layers, and
            `nn.LSTM` and `nn.GRU` with PyTorch's own forward, which ours can then replace step by step.
        unpackable: Why its module can't work with a packed weight, or empty.
    """

    name: str
    module: str
    parameter: str
    kind: WeightKind
    role: Role
    owner: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype
    tied_to: str | None = None
    parts: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()
    stays_float32: bool = False
    token_inputs: bool = False
    unpackable: str = ""

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def key(self) -> str:
        """Full parameter name in the state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def list_weights(model: nn.Module) -> list[Weight]:
    """All weights of a model, in module order; a tied one is listed each time, with `tied_to` after the first."""
    heads, declared, converters = _heads(model), _declared_ties(model), _converters(model)
    wide = list(model._keep_in_fp32_modules or ()) if isinstance(model, PreTrainedModel) else []
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    found = []
    for path, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if value.ndim < 2:
                continue
            weight = _describe(path, module, parameter, value, head=module in heads)
            if not should_convert_module(path, wide):
                weight = replace(weight, stays_float32=True)
            if weight.kind is WeightKind.EXPERTS:
                weight = replace(weight, parts=_expert_parts(weight, converters))
            owner = first.setdefault(id(value), weight.name)
            owner = names.get(declared.get(weight.key, ""), owner)
            names[weight.key] = weight.name
            found.append(weight if owner == weight.name else replace(weight, tied_to=owner))
    return found


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters transformers leaves in float32 when it loads this architecture in a 16-bit type.

    Args:
        model: The model.
        dtype: The 16-bit type.

    Returns:
        A predicate on parameter names.
    """
    if not isinstance(model, PreTrainedModel):
        return lambda name: False
    patterns = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    parts = [re.compile(rf"(?:^|\.){pattern}(?:\.|$)") for pattern in sorted(patterns)]
    return lambda name: any(part.search(name) is not None for part in parts)


def small_parameters(model: nn.Module) -> int:
    """Number of values in biases, norm weights and other parameters with fewer than two dimensions."""
    return sum(value.numel() for value in model.parameters() if value.ndim < 2)


def _describe(path: str, module: nn.Module, parameter: str, value: nn.Parameter, head: bool) -> Weight:
    """Kind, role and canonical shape of one parameter."""
    kind, transposed = _kind(module, parameter, value)
    shape = tuple(value.shape)
    kernel = shape[1:] if kind is WeightKind.CONV else ()
    if kernel:
        shape = (shape[0], prod(kernel))
    return Weight(
        name=path if parameter == "weight" and path else ".".join(part for part in (path, parameter) if part),
        module=path,
        parameter=parameter,
        kind=kind,
        role=_role(path, module, kind, head),
        owner=type(module).__name__,
        shape=(*shape[:-2], shape[-1], shape[-2]) if transposed else shape,
        transposed=transposed,
        dtype=value.dtype,
        kernel=kernel,
        token_inputs=_token_inputs(module, kind),
        unpackable=_unpackable(module, kind) or _taken(module, parameter),
    )


def _token_inputs(module: nn.Module, kind: WeightKind) -> bool:
    """Whether a module's inputs can be quantized per token."""
    if kind is WeightKind.RECURRENT:
        return type(module).forward in (nn.LSTM.forward, nn.GRU.forward)
    # nn.MultiheadAttention reads the weight of its output layer, and never calls that layer.
    return kind in (WeightKind.LINEAR, WeightKind.CONV1D) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _taken(module: nn.Module, parameter: str) -> str:
    """Which of the names that packing would give to buffers a module has already, or empty."""
    wanted = (*PACKED_SUFFIXES, "shape")  # compressed-tensors stores the shape beside the codes
    taken = {f"{parameter}_{suffix}" for suffix in wanted}.intersection(dir(module))
    return f"{type(module).__name__} has its own {min(taken)}, a name that packing would take" if taken else ""


def _unpackable(module: nn.Module, kind: WeightKind) -> str:
    """Why a module can't work with a packed weight, or empty."""
    owner = type(module).__name__
    if kind is WeightKind.RECURRENT:
        dtypes = {str(value.dtype).removeprefix("torch.") for value in module.parameters(recurse=False)}
        if len(dtypes) > 1:
            names = ", ".join(sorted(dtypes))
            return f"{owner} has parameters of different data types ({names}), which its forward refuses"
    if isinstance(module, nn.Embedding) and kind is WeightKind.EMBEDDING:
        if module.max_norm is not None:
            return f"max_norm={module.max_norm} makes {owner} rescale rows of its table while it looks them up"
        if len(inspect.signature(type(module).forward).parameters) != 2:
            return f"{owner}.forward does not take row numbers alone, which no reader of quantized tables allows for"
        if module._buffers:
            return f"{owner} has {listed(module._buffers)} beside its table, which readers of quantized tables lose"
    if isinstance(module, nn.EmbeddingBag):
        return f"{owner} sums rows of its table inside PyTorch, which needs it dense"
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return f"{owner} has its output channels in the second dimension, a scale per channel is not defined there"
    if isinstance(module, ParametrizationList):
        return "torch.nn.utils.parametrize computes a weight from it in every forward"
    return f"{owner} weights are not supported" if kind is WeightKind.OTHER else ""


def _kind(module: nn.Module, parameter: str, value: nn.Parameter) -> tuple[WeightKind, bool]:
    """The kind of a parameter and whether it is stored transposed."""
    if parameter == "weight" and value.ndim == 2:
        if isinstance(module, nn.Linear):
            return WeightKind.LINEAR, False
        if isinstance(module, Conv1D):
            return WeightKind.CONV1D, True
        if isinstance(module, nn.Embedding):
            return WeightKind.EMBEDDING, False
    if parameter == "weight" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return WeightKind.CONV, False
    if parameter.startswith("weight_") and isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return WeightKind.RECURRENT, False
    layout = vars(module)
    if value.ndim == 3 and "is_transposed" in layout and parameter.endswith("_proj"):
        return WeightKind.EXPERTS, bool(layout["is_transposed"])
    return WeightKind.OTHER, False


def _role(path: str, module: nn.Module, kind: WeightKind, head: bool) -> Role:
    """Why default rules keep a weight. Routers and norms are told by their class, as transformers names them."""
    if head:
        return Role.HEAD
    if kind is WeightKind.EMBEDDING:
        return Role.EMBEDDING
    owner = type(module).__name__.lower()
    if "router" in owner or path.rpartition(".")[2] in ("router", "gate"):
        return Role.ROUTER
    return Role.NORM if "norm" in owner else Role.NONE


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output embeddings, and linears outside the base model whose output size is `num_labels`."""
    if not isinstance(model, PreTrainedModel):
        return set()
    output = model.get_output_embeddings()
    heads = {output} if output is not None else set()
    base = model.base_model
    inside = set(base.modules()) if base is not model else set(model.modules())
    labels = model.config.num_labels if "num_labels" in dir(model.config) else 0
    return heads | {module for module in _linears(model, labels) if module not in inside}


def _linears(model: nn.Module, rows: int) -> Iterator[nn.Module]:
    """Linear modules with the given number of outputs."""
    return (module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == rows)


def _declared_ties(model: nn.Module) -> dict[str, str]:
    """Tied parameter → its source, as transformers declares them (on meta they are not the same object yet)."""
    return dict(model.all_tied_weights_keys) if isinstance(model, PreTrainedModel) else {}


def _converters(model: nn.Module) -> list[WeightConverter]:
    """How transformers fuses per-expert checkpoint weights while loading this model."""
    if not isinstance(model, PreTrainedModel):
        return []
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [entry for entry in mapping if isinstance(entry, WeightConverter)]


def _expert_parts(weight: Weight, converters: Sequence[WeightConverter]) -> tuple[str, ...]:
    """Names of the per-expert checkpoint weights behind a fused one: stacked, then joined along the rows."""
    for converter in converters:
        target = converter.target_patterns[0]
        if len(converter.target_patterns) != 1 or not weight.key.endswith(target) or not _stacks(converter):
            continue
        prefix = weight.key.removesuffix(target)
        names = (source.removesuffix(".weight").replace("*", "{}") for source in converter.source_patterns)
        return tuple(f"{prefix}{name}" for name in names)
    return ()


def _stacks(converter: WeightConverter) -> bool:
    """Whether a converter stacks experts and joins several sources along the rows, nothing else."""
    first, *rest = converter.operations
    joins = all(isinstance(operation, Concatenate) and operation.dim == 1 for operation in rest)
    return isinstance(first, MergeModulelist) and first.dim == 0 and joins and len(rest) <= 1
