"""Where the dense weights of a model come from while it is compressed block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Protocol

from torch import nn

from ..core.errors import UnsupportedModelError, first_line


class WeightSource(Protocol):
    """A model whose blocks can be had one at a time, dense."""

    @property
    def model(self) -> nn.Module:
        """The live model, or its skeleton on the meta device."""

    def block(self, path: str) -> nn.Module:
        """A private dense copy of a submodule, in evaluation mode.

        Args:
            path: The submodule's path; empty for the whole model.
        """

    def outside(self, stacks: Sequence[str], written: bool) -> AbstractContextManager[None]:
        """While entered, everything in `model` outside of some submodules has values.

        Args:
            stacks: Paths of the submodules, such as the list of blocks.
            written: Whether the values may be changed. If not, they may be pages of a file.
        """


class LiveSource:
    """A model that is in memory.

    Args:
        model: The model; it is never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._model

    def block(self, path: str) -> nn.Module:
        """A copy of a submodule in evaluation mode, hooks included; empty path for the whole model.

        Raises:
            UnsupportedModelError: It can't be copied.
        """
        module = self._model.get_submodule(path)
        try:
            copy = deepcopy(module)
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModelError(
                f"{path or type(module).__name__} can't be copied, which calibration needs: {first_line(error)}",
                "remove its hooks and attributes that hold locks, files and the like, and add them again afterwards",
            ) from error
        return copy.eval().requires_grad_(False)

    def outside(self, stacks: Sequence[str], written: bool) -> AbstractContextManager[None]:
        """Nothing to do: everything has values."""
        return nullcontext()
