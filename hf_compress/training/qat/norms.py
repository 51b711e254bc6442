"""Batch normalisation that stays in evaluation mode while the rest of a model is trained.

`Trainer.training_step` puts the whole model into training mode before every forward pass, so a mode that is set once
would not last. The layers' class is swapped for a subclass that keeps it.
"""

from __future__ import annotations

import functools
from typing import Self

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenNorm(nn.Module):
    """Mixed into a layer's class: it normalises with its running statistics and leaves them as they are."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        super().train(False)
        return self


def freeze_norms(model: nn.Module) -> None:
    """Keep a model's batch normalisations in evaluation mode until `release_norms`.

    Args:
        model: The model; weights and biases of the layers go on being trained, names of tensors stay.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not isinstance(module, FrozenNorm):
            module.__class__ = _frozen_class(type(module))  # type: ignore[assignment, arg-type]
            module.eval()


def release_norms(model: nn.Module) -> None:
    """Give frozen batch normalisations their own class back, and the mode of the model."""
    for module in model.modules():
        if isinstance(module, FrozenNorm):
            object.__setattr__(module, "__class__", vars(type(module))["hfc_base"])
            module.train(model.training)


@functools.cache
def _frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    """The layer's class with `FrozenNorm`, under the same name."""
    return type(base.__name__, (FrozenNorm, base), {"__module__": base.__module__, "hfc_base": base})
