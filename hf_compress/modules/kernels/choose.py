"""Choosing a kernel per packed module, and going back to the reference for proofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..swap import PackedModule, packed_modules
from .int_mm import IntMatmul, StaticIntMatmul
from .int_recurrent import RecurrentIntMatmul
from .protocol import Kernel

KERNELS: tuple[Kernel, ...] = (IntMatmul(), StaticIntMatmul(), RecurrentIntMatmul())
"""Fastest first."""

REFERENCE = "reference"


def choose_kernels(model: nn.Module) -> None:
    """Give every packed module the first kernel that supports it and passes its probe here."""
    for _, module in packed_modules(model):
        module.hfc_kernel = _choose(module)


def kernel_counts(model: nn.Module) -> dict[str, int]:
    """How many packed modules each kernel runs."""
    names = (_running(module) for _, module in packed_modules(model))
    return dict(sorted(Counter(names).items()))


def _running(module: PackedModule) -> str:
    """The kernel that a module really runs: after `.to(bfloat16)` kernels for float32 no longer do."""
    scale = module._buffers.get(f"{next(iter(module.hfc_layouts))}_scale")
    usable = module.hfc_kernel is not None and scale is not None and scale.dtype == torch.float32
    return module.hfc_kernel.name if usable and module.hfc_kernel is not None else REFERENCE


@contextmanager
def reference_kernels(model: nn.Module) -> Iterator[None]:
    """Run all packed modules through the reference forward for a while."""
    chosen = [(module, module.hfc_kernel) for _, module in packed_modules(model)]
    try:
        for module, _ in chosen:
            module.hfc_kernel = None
        yield
    finally:
        for module, kernel in chosen:
            module.hfc_kernel = kernel


def _choose(module: PackedModule) -> Kernel | None:
    """The fastest kernel for a module, or None for the reference."""
    layout = next(iter(module.hfc_layouts.values()))
    fitting = (kernel for kernel in KERNELS if kernel.refusal(module, layout) is None)
    return next((kernel for kernel in fitting if kernel.probe() is None), None)
