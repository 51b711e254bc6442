"""What happens inside `from_pretrained`: plan before the weights, pack while they come, hand over at the end.

Methods that train pack nothing: the model stays dense, is prepared once the weights are there, and forgets the
request, so that a Trainer takes it and every checkpoint is a plain one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..apply.packing import pack_weight, with_results
from ..apply.planning import plan_model
from ..apply.swapping import announce, complete, swap_all
from ..checkpoint.handover import forget_quantization
from ..checkpoint.load import ReadRequest
from ..checkpoint.record import open_weights
from ..checkpoint.session import LoadSession, release_ties
from ..checkpoint.shards import safetensors_files
from ..core.config import QuantConfig
from ..core.plan import Plan, PlanRow
from ..modules.packed import PackedTensor
from .calibrate import ResultRequest, calibrate_live

logger = logging.getLogger(__name__)


class DeferredSession(LoadSession):
    """A load that packs nothing: calibration, or training, needs the dense model first.

    Args:
        plan: The plan to carry out once the weights are there.
        request: The request, with the data where there is any.
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
    if request.spec.needs_data or request.spec.prepare is not None:
        return DeferredSession(plan, request)
    release_ties(model, plan)

    def quantize(row: PlanRow, value: Tensor) -> tuple[PackedTensor, float | None]:
        return pack_weight(row, value, plan.method)

    return LoadSession(plan, quantize, request.progress)


def finish(model: PreTrainedModel, session: LoadSession) -> None:
    """Check that everything planned was done, choose kernels, hand over.

    Raises:
        HFCompressError: A weight could not be quantized or was missing.
    """
    if isinstance(session, DeferredSession):
        if session.request.spec.prepare is not None:
            session.request.spec.prepare(model, session.plan, session.request.fields)
            forget_quantization(model)
            _warn_of_state(model)
            return
        plan, finished = calibrate_live(model, session.plan, session.request, session.progress)
        swap_all(model, plan, finished)
        return
    session.finish()
    complete(model, with_results(session.plan, session.sqnr))


def _warn_of_state(model: PreTrainedModel) -> None:
    """Say what a checkpoint of an earlier training has beside its weights, and that a new one starts without it."""
    folder = Path(model.name_or_path)
    found: list[str] = []
    for file in safetensors_files(folder) if folder.is_dir() else ():
        with open_weights(file) as opened:
            names: list[str] = opened.keys()
            found += [name for name in names if name.rpartition(".")[2].startswith("hfc_")]
    if found:
        logger.warning(
            "%s has %d tensors of an earlier training beside its weights, such as %s: they are left out, and scales "
            "and ranges start anew from the weights. trainer.train(resume_from_checkpoint=...) goes on with them.",
            folder,
            len(found),
            found[0],
        )
