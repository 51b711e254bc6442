"""Packed tensors for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.core import scheme as schemes
from hf_compress.core.registry import Quantized
from hf_compress.modules.packed import Layout, PackedTensor, pack


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    """int8 codes over the whole range of the width, extremes included."""
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << (bits - 1)
    made = torch.randint(-limit, limit, shape, dtype=torch.int8, generator=generator)
    flat = made.view(-1)
    flat[0], flat[-1] = -limit, limit - 1
    return made


def packed_of(
    shape: tuple[int, ...],
    bits: int = 4,
    group_size: int | str = 8,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
    transposed: bool = False,
    seed: int = 0,
) -> PackedTensor:
    """A packed weight of the canonical shape with random codes, scales and zero points."""
    generator = torch.Generator().manual_seed(seed + 1)
    made = schemes.scheme(schemes.weight_args(bits, group_size, symmetric))
    layout = Layout(shape, made, transposed)
    form = schemes.groups(shape, layout.weights)
    scale = (torch.rand(form, generator=generator) * 0.1 + 0.01).to(dtype)
    limit = 1 << (bits - 1)
    zeros = torch.randint(-limit, limit, form, dtype=torch.int8, generator=generator)
    return pack(Quantized(codes_of(shape, bits, seed), scale, None if symmetric else zeros), layout)
