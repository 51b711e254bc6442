"""Putting results into a model: packed weights in place of dense ones, then the hand-over to transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..calibration.block import Finished
from ..checkpoint.handover import hand_over
from ..checkpoint.session import place, release_ties
from ..core.errors import WeightValueError
from ..core.plan import DTYPES, Plan
from ..modules.kernels.choose import choose_kernels
from .packing import with_results

logger = logging.getLogger(__name__)


def announce(plan: Plan) -> None:
    """Log the plan's remarks as warnings."""
    for note in plan.notes:
        logger.warning("%s", note)


def swap_all(model: torch.nn.Module, plan: Plan, finished: Finished) -> None:
    """Put everything that became of a live model into it, and hand it over.

    Args:
        model: The model, dense so far.
        plan: Its plan.
        finished: Packed weights, their noise, and changed values of what stays dense.
    """
    set_changed(model, finished.changed)
    for row in plan.quantized:
        if row.tied_to is None:
            place(model, plan, row, finished.packed[row.name])
    ties = {row.name: finished.sqnr[row.tied_to] for row in plan.quantized if row.tied_to is not None}
    release_ties(model, plan)
    complete(model, with_results(plan, finished.sqnr | ties))


def complete(model: torch.nn.Module, plan: Plan) -> None:
    """The last steps of every path: check casts, choose kernels, hand over to the native quantizer."""
    cast = next((row.cast for row in plan.rows if row.cast), None)
    if cast is not None:
        check_range(model, DTYPES[cast])
    choose_kernels(model)
    hand_over(model, plan)


def check_range(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Refuse a cast that overflows, or has overflowed.

    Raises:
        WeightValueError: A parameter is not finite or beyond the type's range; names it.
    """
    largest = torch.finfo(dtype).max
    for name, value in model.named_parameters():
        seen = float(value.detach().abs().amax()) if value.is_floating_point() and value.numel() else 0.0
        if seen <= largest:
            continue
        fits = dtype == torch.float16 and seen < float("inf")
        raise WeightValueError(
            f"{name} has values up to {seen:.3g}, beyond {largest:.3g} in {str(dtype).removeprefix('torch.')}. "
            "Nothing was changed.",
            'use dtype="bf16", whose range is that of float32' if fits else "repair the weights",
        )


@torch.no_grad()
def set_changed(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers that stay dense their new values.

    Loaded ones may be mapped read-only from their file, so they are replaced and not written to.
    """
    for name, value in changed.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        for values in (module._parameters, module._buffers):
            target = values.get(leaf)
            if target is not None:
                target.data = value.to(target.device, target.dtype, copy=True)
