"""The kernel protocol: what a backend declares.

A kernel replaces the reference forward of a packed module and agrees with it within its tolerance. It differs by
accumulation order only; a kernel with other semantics belongs to another scheme. Kernels are stateless: they read
the module's buffers, so saving, copying and moving a module needs nothing special.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..packed import Layout


class Kernel(Protocol):
    """A backend for packed modules."""

    @property
    def name(self) -> str:
        """Shown in reports."""

    @property
    def tolerance(self) -> float:
        """Largest relative difference to the reference, max|a - b| / max|b|."""

    def refusal(self, module: nn.Module, layout: Layout) -> str | None:
        """Why it can't run a module (scheme, data type, device, shape), or None. Asks nothing of the machine."""

    def probe(self) -> str | None:
        """Why it must not be used on this machine, or None: exact on extreme values, and faster than the reference."""

    def run(self, module: nn.Module, *inputs: Any, **options: Any) -> Any:
        """The module's output for the inputs of its forward: a tensor, for recurrent layers also the states."""
