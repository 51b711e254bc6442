"""What happens inside `from_pretrained`: plan before the weights, pack while they come, hand over at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.handover import hand_over
from ..checkpoint.load import ReadRequest
from ..checkpoint.session import LoadSession
from ..core.config import QuantConfig
from ..core.errors import WeightValueError
from ..core.plan import Plan, PlanRow
from ..modules.kernels.choose import choose_kernels
from ..modules.packed import PackedTensor
from .apply import pack_weight, with_results
from .planning import plan_model


def start(model: PreTrainedModel, request: QuantConfig | ReadRequest) -> LoadSession:
    """Plan a model on the meta device and prepare to pack its weights.

    Raises:
        HFCompressError: The plan is refused; nothing has been read yet.
    """
    if isinstance(request, ReadRequest):
        return request.session(model)
    plan = plan_model(model, request)

    def quantize(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
        return pack_weight(row, value, plan.method)

    return LoadSession(plan, quantize, request.progress)


def finish(model: PreTrainedModel, session: LoadSession) -> None:
    """Check that everything planned was done, choose kernels, hand over.

    Raises:
        HFCompressError: A weight could not be quantized or was missing.
    """
    session.finish()
    complete(model, with_results(session.plan, session.sqnr))


def complete(model: torch.nn.Module, plan: Plan) -> None:
    """The last steps of every path: check casts, choose kernels, hand over to the native quantizer."""
    if any(row.cast for row in plan.rows):
        check_cast(model)
    choose_kernels(model)
    hand_over(model, plan)


def check_cast(model: torch.nn.Module) -> None:
    """Refuse a cast that overflowed.

    Raises:
        WeightValueError: A parameter has infinite values.
    """
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise WeightValueError(f"{name} is not finite after the cast to {value.dtype}.", 'use dtype="bf16"')
