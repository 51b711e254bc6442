"""Activations kept for later: in half the memory, and in large pieces of it.

Tensors of a few MiB come from the heap, where those that stay lie between those that go, so that hardly anything is
given back to the system. Pieces larger than `SLAB` are mapped, and given back at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SLAB = 33 << 20
"""Bytes of a piece of memory: just more than what glibc's malloc ever takes from the heap (32 MiB)."""


class Slabs:
    """Places for tensors that are kept together, a few in each piece of memory.

    A piece is given back when none of its tensors is left. What is not used of it takes no memory.
    """

    def __init__(self) -> None:
        self.piece = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def place(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for one tensor, without values."""
        size = shape.numel() * dtype.itemsize
        start = -(-self.used // 64) * 64
        if start + size > len(self.piece):
            self.piece = torch.empty(max(size, SLAB), dtype=torch.uint8)
            start = 0
        self.used = start + size
        return self.piece[start : start + size].view(dtype).view(shape)

    def copy(self, value: Tensor) -> Tensor:
        """A copy of a tensor."""
        return self.place(value.shape, value.dtype).copy_(value)


@dataclass(frozen=True)
class Held:
    """A tensor that is read again later. Finite float32 values are kept as float16 times a power of two.

    The largest magnitude is brought to 2^13 … 2^14, so nothing overflows; values down to 2^-27 of it keep float16's
    relative precision of 2^-11.

    Attributes:
        value: float16, or the tensor itself where it was no float32.
        scale: What `value` is to be multiplied with, a power of two.
        dtype: Data type of the tensor.
    """

    value: Tensor
    scale: float
    dtype: torch.dtype

    @staticmethod
    def of(value: Tensor, slabs: Slabs | None = None) -> Held:
        """Keep a tensor.

        Args:
            value: The tensor.
            slabs: Where; wherever memory is allocated by default.
        """
        if value.dtype != torch.float32 or value.numel() == 0:
            return Held(value if slabs is None else slabs.copy(value), 1.0, value.dtype)
        largest = max(abs(float(value.amin())), abs(float(value.amax())))
        exponent = math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0
        scale = math.ldexp(1.0, max(-100, min(100, exponent - 14)))
        scaled = value * (1 / scale)
        kept = scaled.to(torch.float16) if slabs is None else slabs.place(value.shape, torch.float16).copy_(scaled)
        return Held(kept, scale, value.dtype)

    def restore(self, rows: Tensor | None = None) -> Tensor:
        """The tensor again, or some of its rows, in its own data type."""
        value = self.value if rows is None else self.value[rows]
        if value.dtype == self.dtype:
            return value
        return value.to(self.dtype).mul_(self.scale)
