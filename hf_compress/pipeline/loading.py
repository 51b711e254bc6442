"""What happens inside `from_pretrained`: plan before the weights, pack while they come, hand over at the end."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.block import Finished
from ..checkpoint.handover import hand_over
from ..checkpoint.load import ReadRequest
from ..checkpoint.session import LoadSession, place, release_ties
from ..core.config import QuantConfig
from ..core.errors import WeightValueError
from ..core.plan import DTYPES, Plan, PlanRow
from ..modules.kernels.choose import choose_kernels
from ..modules.packed import PackedTensor
from .apply import pack_weight, with_results
from .calibrate import ResultRequest, calibrate_live, set_changed
from .planning import plan_model

logger = logging.getLogger(__name__)


class DeferredSession(LoadSession):
    """A load that packs nothing: calibration needs the dense model first.

    Args:
        plan: The plan to carry out once the weights are there.
        request: The request, with the data.
    """

    def __init__(self, plan: Plan, request: QuantConfig) -> None:
        super().__init__(plan, _pack_nothing, request.progress)
        self.request = request
        self.rows = {}


def _pack_nothing(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
    """What is never called."""
    raise ValueError(f"{row.name} is packed after the load")


def start(model: PreTrainedModel, request: QuantConfig | ReadRequest | ResultRequest) -> LoadSession:
    """Plan a model on the meta device and prepare to pack its weights.

    Raises:
        HFCompressError: The plan is refused; nothing has been read yet.
    """
    if not isinstance(request, QuantConfig):
        return request.session(model)
    plan = plan_model(model, request)
    announce(plan)
    if request.spec.needs_data:
        return DeferredSession(plan, request)
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
    if isinstance(session, DeferredSession):
        plan, finished = calibrate_live(model, session.plan, session.request, session.progress)
        swap_all(model, plan, finished)
        return
    session.finish()
    complete(model, with_results(session.plan, session.sqnr))


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
