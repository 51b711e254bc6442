"""Packing in place by class swap.

The module keeps its class as a base, so `isinstance(module, nn.Linear)` holds and PEFT and user code keep working.
The parameter becomes packed buffers (`weight_packed`, `weight_scale`, and where there are any `weight_zero_point`,
`weight_codebook`, `weight_g_idx`, `weight_input_scale`, `weight_input_zero_point`), and a property of the parameter's
name gives the dense values on demand. The reference forward is the original forward.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from ..core.weights import PACKED_SUFFIXES
from . import recurrent
from .kernels.protocol import Kernel
from .lazy import LazyWeight, dense, refusal
from .packed import Layout, PackedTensor


class PackedModule(nn.Module):
    """Base of all swapped classes.

    Attributes:
        hfc_layouts: Layout of each packed parameter, by attribute name.
        hfc_kernel: The kernel that replaces the reference forward, or None.
        hfc_input: Name of the first parameter of the original forward; that of a packed `weight` is its input.
    """

    hfc_layouts: dict[str, Layout]
    hfc_kernel: Kernel | None
    hfc_input: str

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace a packed parameter."""
        if name in vars(self).get("hfc_layouts", {}):
            raise refusal(f"{type(self).__name__}.{name} = ...")
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The chosen kernel, or the original forward on dequantized weights and, if planned, quantized inputs."""
        inputs = self.hfc_layouts["weight"].scheme.input_activations if "weight" in self.hfc_layouts else None
        if inputs is None:
            return super().forward(*args, **kwargs)
        value = args[0] if args else kwargs.get(self.hfc_input)
        if not isinstance(value, Tensor) or value.ndim == 0:  # the original forward says what is wrong
            return super().forward(*args, **kwargs)
        if self.hfc_kernel is not None and len(args) + len(kwargs) == 1 and runs_kernel(self, value):
            return self.hfc_kernel.run(self, value)
        quantized = _quantized_input(value, inputs, self)
        if args:
            return super().forward(quantized, *args[1:], **kwargs)
        return super().forward(**{**kwargs, self.hfc_input: quantized})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move or cast; weights shared with another module stay shared once both have been moved.

        Codebooks are only moved: they are float32 in models of any type.
        """
        names = [f"{name}_{PACKED_SUFFIXES[3]}" for name in self.hfc_layouts]
        tables = {name: table for name in names if (table := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        for name, (peer, other) in vars(self).get("hfc_shared", {}).items():
            for suffix in PACKED_SUFFIXES:
                mine, theirs = self._buffers.get(f"{name}_{suffix}"), peer._buffers.get(f"{other}_{suffix}")
                if mine is not None and theirs is not None and _alike(mine, theirs):
                    self._buffers[f"{name}_{suffix}"] = theirs
        return self


class FlatWeights(nn.Module):
    """For `nn.LSTM`, `nn.GRU` and `nn.RNN`, which read their weights from a list that they keep in step.

    The list is made when it is read, of what the module's attributes give then; kept, it would hold the parameters.
    """

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Copies of a module come with a list; there is nothing to keep."""

    def _init_flat_weights(self) -> None:
        """Nothing to keep in step."""

    def _update_flat_weights(self) -> None:
        """Nothing to keep in step."""

    def flatten_parameters(self) -> None:
        """What the attributes give is not laid out for cuDNN."""

    def drop_flat_weights(self) -> None:
        """Let go of the list that the original class has kept."""
        vars(self).pop("_flat_weights", None)
        vars(self)["_flat_weight_refs"] = []


class PackedRecurrent(FlatWeights, PackedModule):
    """Packed `nn.LSTM`, `nn.GRU` and `nn.RNN`, on lazy weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward on dequantized weights, or the same step by step where inputs are quantized."""
        if not any(layout.scheme.input_activations for layout in self.hfc_layouts.values()):
            return super().forward(*args, **kwargs)
        return self._stepwise(*args, **kwargs)

    def _stepwise(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The forward of `nn.LSTM` and `nn.GRU` with quantized inputs, under its own parameter names."""
        data = input.data if isinstance(input, PackedSequence) else input
        states = hx if isinstance(hx, tuple) else (hx,)
        if self.hfc_kernel is not None and runs_kernel(self, data, *(one for one in states if one is not None)):
            return self.hfc_kernel.run(self, input, hx)
        return recurrent.run(self, input, hx, partial(recurrent_product, self))  # type: ignore[arg-type]


def recurrent_product(module: PackedModule, name: str, bias: str | None) -> recurrent.Product:
    """The reference product with one weight of a recurrent layer, dequantized once per forward, not per step."""
    offset = None if bias is None else module.get_parameter(bias)
    layout = module.hfc_layouts.get(name)
    inputs = None if layout is None else layout.scheme.input_activations
    weight = dense(getattr(module, name))
    if inputs is None:
        return lambda tokens: functional.linear(tokens, weight, offset)
    return lambda tokens: functional.linear(_quantized_input(tokens, inputs, module), weight, offset)


def runs_kernel(module: nn.Module, *values: Tensor) -> bool:
    """Whether inputs may take a module's kernel: float32, no gradient for them or its biases, not being compiled."""
    if torch.compiler.is_compiling() or not all(value.dtype == torch.float32 for value in values):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(value.requires_grad for value in (*values, *module.parameters(recurse=False)))


def _quantized_input(value: Tensor, args: QuantizationArgs, module: nn.Module) -> Tensor:
    """compressed-tensors' fake quantization of an input; gradients pass straight through the rounding.

    A static scale is the stored one. A dynamic scale per token is that of (batch, tokens, features). In two
    dimensions it would span the batch, in four the third one, so inputs of other ranks are given as one batch of
    tokens: a row never depends on another.
    """
    if value.numel() == 0:
        return value
    given = value.detach()
    if not args.dynamic:
        scale, zero_point = module.get_buffer("weight_input_scale"), module._buffers.get("weight_input_zero_point")
    else:
        if args.strategy == "token" and value.ndim != 3:
            given = given.reshape(1, -1, value.shape[-1])
        scale, zero_point = compute_dynamic_scales_and_zp(value=given, args=args, module=module)
    rounded = fake_quantize(given, scale, zero_point, args).view(value.shape)
    if torch.is_grad_enabled() and value.requires_grad:
        return value + (rounded - value).detach()
    return rounded


def pack_module(module: nn.Module, name: str, packed: PackedTensor) -> None:
    """Replace one parameter of a module by its packed form, in place.

    Args:
        module: The module; its class is swapped for a packed subclass.
        name: Name of the parameter, such as `weight` or `gate_up_proj`.
        packed: The packed weight.
    """
    base = original_class(type(module))
    layouts = {**vars(module).get("hfc_layouts", {}), name: packed.layout}
    del module._parameters[name]
    module.__class__ = _packed_class(base, tuple(layouts))  # type: ignore[arg-type] # nn.Module is hashable
    vars(module).update(hfc_layouts=layouts, hfc_kernel=None, _is_hf_initialized=True)
    if isinstance(module, PackedRecurrent):  # else its lists would keep the dense weights alive
        module.drop_flat_weights()
    for suffix, value in packed.parts().items():
        module.register_buffer(f"{name}_{suffix}", value)


def share_packed(source: nn.Module, name: str, module: nn.Module, parameter: str) -> None:
    """Pack a parameter that is tied to a packed one: both modules then hold the same buffers.

    Args:
        source: The module that is packed already.
        name: Its parameter.
        module: The other module.
        parameter: Its parameter, of the same shape.
    """
    pack_module(module, parameter, packed_tensor(source, name))
    for one, own, peer, other in ((source, name, module, parameter), (module, parameter, source, name)):
        shared = {**vars(one).get("hfc_shared", {}), own: (peer, other)}
        vars(one)["hfc_shared"] = shared


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether two buffers could be one."""
    return (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)


def unpack_module(module: PackedModule) -> None:
    """Turn a packed module back into its original class, with the dequantized values as parameters."""
    for name in module.hfc_layouts:
        value = packed_tensor(module, name).dense().contiguous()
        for suffix in PACKED_SUFFIXES:
            module._buffers.pop(f"{name}_{suffix}", None)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    base = original_class(type(module))
    for name in ("hfc_layouts", "hfc_kernel", "hfc_shared"):
        vars(module).pop(name, None)
    object.__setattr__(module, "__class__", base)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def packed_tensor(module: nn.Module, name: str) -> PackedTensor:
    """The packed form of a module's parameter, as it is now (data type and device follow `.to`)."""
    buffers = module._buffers
    codes, scale = buffers[f"{name}_packed"], buffers[f"{name}_scale"]
    if not isinstance(module, PackedModule) or codes is None or scale is None:
        raise TypeError(f"{type(module).__name__}.{name} is not packed")
    rest = (buffers.get(f"{name}_{suffix}") for suffix in PACKED_SUFFIXES[2:])
    return PackedTensor(module.hfc_layouts[name], codes, scale, *rest)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """Paths and packed modules of a model."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, PackedModule))


@functools.cache
def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` whose attributes `names` are packed."""
    properties = {name: property(_reader(name)) for name in names}
    kind = PackedRecurrent if issubclass(base, nn.RNNBase) else PackedModule
    facts = {"hfc_base": base, "hfc_input": first_parameter(base), "__module__": base.__module__}
    return type(base.__name__, (kind, base), {**properties, **facts})


def first_parameter(kind: type[nn.Module]) -> str:
    """The name of the first parameter of a class's forward, or empty."""
    return next(itertools.islice(inspect.signature(kind.forward).parameters, 1, None), "")


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class before packing."""
    return vars(kind).get("hfc_base", kind)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    """The getter of a packed parameter. A compiler sees plain arithmetic, eager code a lazy stand-in."""

    def read(module: nn.Module) -> Tensor:
        packed = packed_tensor(module, name)
        return packed.dense() if torch.compiler.is_compiling() else LazyWeight(packed)

    return read
