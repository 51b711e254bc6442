"""Masks out of checkpoints: pruned weights are zeros, so zeros are pruned weights, as far as their number agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core.errors import ResumeError

_MASK = "mask"


def ambiguous(parameters: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of weights that have zeros which are not pruned: from the zeros alone they could not be told.

    Args:
        parameters: Weights by name.
        keep: Masks by name, 0 where a weight is pruned.

    Returns:
        Boolean masks, as `NAME.mask`.
    """
    return {
        f"{name}.{_MASK}": mask.bool()
        for name, mask in keep.items()
        if int(mask.count_nonzero()) != int(parameters[name].count_nonzero())
    }


def masks_of(
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    counts: Sequence[int],
    step: int,
    total: bool,
) -> dict[str, Tensor]:
    """The masks of a checkpoint.

    Args:
        parameters: Weights by name, with the checkpoint's values.
        kept: What the checkpoint's state file holds of pruning.
        counts: How many values of each weight the schedule demands to be pruned.
        step: The checkpoint's step, for messages.
        total: Whether only the sum of the counts is demanded.

    Returns:
        Boolean masks by name, False where a weight is pruned.

    Raises:
        ResumeError: The checkpoint has not exactly these zeros.
    """
    made = {}
    for name, parameter in parameters.items():
        zeros = parameter.detach() == 0
        stored = kept.get(f"{name}.{_MASK}")
        keep = ~zeros if stored is None else stored.to(parameter.device)
        if (keep.shape, keep.dtype) != (zeros.shape, zeros.dtype) or not bool((zeros | keep).all()):
            raise _changed(name, step, "its mask in the state file is not that of its values")
        made[name] = keep
    seen = [mask.numel() - int(mask.count_nonzero()) for mask in made.values()]
    if total and sum(seen) != sum(counts):
        raise _changed("The model", step, f"{sum(seen)} weights in scope are pruned, {sum(counts)} should be")
    for name, found, count in zip(made, seen, counts, strict=True):
        if not total and found != count:
            raise _changed(name, step, f"{found} of its values are zero, {count} should be")
    return made


def check_held(held: Mapping[str, Tensor], keep: Mapping[str, Tensor], step: int) -> None:
    """Refuse values that are held aside for weights which are not pruned.

    Args:
        held: Values by name, 0 where a weight is not pruned.
        keep: Masks by name, 0 where a weight is pruned; none before the first pruning.
        step: The checkpoint's step, for messages.

    Raises:
        ResumeError: A weight that is kept has such a value.
    """
    for name, value in held.items():
        kept = keep.get(name)
        if bool((value if kept is None else torch.where(kept != 0, value, 0)).any()):
            raise _changed(name, step, "the state file holds values aside for weights that are not pruned")


def _changed(name: str, step: int, what: str) -> ResumeError:
    """The error for weights that are not those that were saved."""
    return ResumeError(
        f"{name} in the checkpoint of step {step} is not as the pruning schedule has left it: {what}. It was "
        "changed since.",
        "resume from an unchanged checkpoint of the same run",
    )
