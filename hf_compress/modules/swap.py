"""Packing in place by class swap.

The module keeps its class as a base, so `isinstance(module, nn.Linear)` holds and PEFT and user code keep working.
The parameter becomes packed buffers (`weight_packed`, `weight_scale`, `weight_zero_point`), and a property of the
parameter's name gives the dense values on demand. The reference forward is the original forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from .kernels.protocol import Kernel
from .lazy import LazyWeight, refusal
from .packed import Layout, PackedTensor


class PackedModule(nn.Module):
    """Base of all swapped classes.

    Attributes:
        hfc_layouts: Layout of each packed parameter, by attribute name.
        hfc_kernel: The kernel that replaces the reference forward, or None.
    """

    hfc_layouts: dict[str, Layout]
    hfc_kernel: Kernel | None

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
        value, *rest = args or (kwargs.pop(next(iter(kwargs))),)
        if self.hfc_kernel is not None and runs_kernel(value):
            return self.hfc_kernel.run(self, value)
        return super().forward(_quantized_input(value, inputs, self), *rest, **kwargs)


def runs_kernel(value: Tensor) -> bool:
    """Whether an input may take a kernel: float32, (batch, tokens, features), no gradient, not being compiled."""
    differentiable = torch.is_grad_enabled() and value.requires_grad
    return (
        value.dtype == torch.float32 and value.ndim == 3 and not differentiable and not torch.compiler.is_compiling()
    )


def _quantized_input(value: Tensor, args: QuantizationArgs, module: nn.Module) -> Tensor:
    """compressed-tensors' fake quantization of an input; gradients pass straight through the rounding."""
    if value.numel() == 0:
        return value
    scale, zero_point = compute_dynamic_scales_and_zp(value=value.detach(), args=args, module=module)
    rounded = fake_quantize(value.detach(), scale, zero_point, args)
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
    base = _original(type(module))
    layouts = {**vars(module).get("hfc_layouts", {}), name: packed.layout}
    del module._parameters[name]
    module.__class__ = _packed_class(base, tuple(layouts))  # type: ignore[arg-type] # nn.Module is hashable
    vars(module).update(hfc_layouts=layouts, hfc_kernel=None, _is_hf_initialized=True)
    module.register_buffer(f"{name}_packed", packed.codes)
    module.register_buffer(f"{name}_scale", packed.scale)
    if packed.zero_point is not None:
        module.register_buffer(f"{name}_zero_point", packed.zero_point)


def unpack_module(module: PackedModule) -> None:
    """Turn a packed module back into its original class, with the dequantized values as parameters."""
    for name in module.hfc_layouts:
        value = packed_tensor(module, name).dense().contiguous()
        for suffix in ("packed", "scale", "zero_point"):
            module._buffers.pop(f"{name}_{suffix}", None)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    base = _original(type(module))
    for name in ("hfc_layouts", "hfc_kernel"):
        del vars(module)[name]
    object.__setattr__(module, "__class__", base)


def packed_tensor(module: nn.Module, name: str) -> PackedTensor:
    """The packed form of a module's parameter, as it is now (data type and device follow `.to`)."""
    buffers = module._buffers
    codes, scale = buffers[f"{name}_packed"], buffers[f"{name}_scale"]
    if not isinstance(module, PackedModule) or codes is None or scale is None:
        raise TypeError(f"{type(module).__name__}.{name} is not packed")
    return PackedTensor(module.hfc_layouts[name], codes, scale, buffers.get(f"{name}_zero_point"))


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """Paths and packed modules of a model."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, PackedModule))


@functools.cache
def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` whose attributes `names` are packed."""
    properties = {name: property(_reader(name)) for name in names}
    return type(base.__name__, (PackedModule, base), {**properties, "hfc_base": base, "__module__": base.__module__})


def _original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class before packing."""
    return vars(kind).get("hfc_base", kind)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    """The getter of a packed parameter. A compiler sees plain arithmetic, eager code a lazy stand-in."""

    def read(module: nn.Module) -> Tensor:
        packed = packed_tensor(module, name)
        return packed.dense() if torch.compiler.is_compiling() else LazyWeight(packed)

    return read
