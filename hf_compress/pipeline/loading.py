"""What happens inside `from_pretrained`: plan before the weights, pack while they come, hand over at the end."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.handover import hand_over
from ..checkpoint.load import ReadRequest
from ..checkpoint.session import LoadSession, release_ties
from ..core.config import QuantConfig
from ..core.errors import WeightValueError
from ..core.plan import DTYPES, Plan, PlanRow
from ..modules.kernels.choose import choose_kernels
from ..modules.packed import PackedTensor
from .apply import pack_weight, with_results
from .planning import plan_model

logger = logging.getLogger(__name__)


def start(model: PreTrainedModel, request: QuantConfig | ReadRequest) -> LoadSession:
    """Plan a model on the meta device and prepare to pack its weights.

    Raises:
        HFCompressError: The plan is refused; nothing has been read yet.
    """
    if isinstance(request, ReadRequest):
        return request.session(model)
    plan = plan_model(model, request)
    announce(plan)
    release_ties(model, plan)

    def quantize(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
        return pack_weight(row, value, plan.method)

    return LoadSession(plan, quantize, request.progress)


def announce(plan: Plan) -> None:
    """Log the plan's remarks as warnings."""
    for note in plan.notes:
        logger.warning("%s", note)


def finish(model: PreTrainedModel, session: LoadSession) -> None:
    """Check that everything planned was done, choose kernels, hand over.

    Raises:
        HFCompressError: A weight could not be quantized or was missing.
    """
    session.finish()
    complete(model, with_results(session.plan, session.sqnr))


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
