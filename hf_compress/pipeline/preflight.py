"""Preflight: what a request would cost, from the meta device, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..apply.planning import refuse_trained
from ..calibration.data import check_data
from ..checkpoint.proof import HEADROOM
from ..core.config import QuantConfig
from ..core.plan import Plan
from .footprint import WORKING_COPIES, footprint
from .planning import Request, meta_model, plan_request


class Preflight(BaseModel):
    """What a request would cost.

    Attributes:
        plan: The resolved plan.
        bytes_before: Bytes of all parameters now.
        bytes_after: Bytes of all parameters once the plan is carried out; about the size of the weights on disk.
        peak_bytes: Memory that quantizing needs beyond the checkpoint's mapped files, the packed model included; of a
            live model, beyond the model.
        streamed_bytes: The same from disk to disk, where results are mapped files too.
        proof_bytes: Memory that a full proof needs; with less, `hf_compress.save` proves the truncated level.
        free_bytes: Memory that the system has free.
        notes: Remarks that a user should read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    streamed_bytes: int
    proof_bytes: int
    free_bytes: int
    notes: tuple[str, ...]


def preflight(model_or_id: nn.Module | str | Path, config: Request, min_coverage: float | None = None) -> Preflight:
    """Plan a request and say what it would cost; reads no weights for an id or directory.

    Args:
        model_or_id: A live model, a Hub id or a directory.
        config: The request; one of another library needs an id or directory.
        min_coverage: Only with another library's configuration, see `hf_compress.plan`.

    Raises:
        HFCompressError: The plan is refused; the code says why.
    """
    live = isinstance(model_or_id, nn.Module)
    if isinstance(config, QuantConfig):
        refuse_trained(config)
    plan, model = plan_request(model_or_id, config, min_coverage)
    changed = [row for row in plan.rows if row.quantization is not None or row.backend is not None]
    rest = sum(value.numel() * value.element_size() for value in model.parameters()) - sum(
        row.dense_bytes for row in plan.rows
    )
    before = sum(row.dense_bytes for row in plan.rows) + rest
    after = sum(row.planned_bytes for row in plan.rows) + (rest if changed else _cast_rest(plan, rest))
    peak, streamed = _peaks(model, plan, config) if changed else (after, after)
    return Preflight(
        plan=plan,
        bytes_before=before,
        bytes_after=after,
        peak_bytes=peak,
        streamed_bytes=streamed,
        proof_bytes=int((after if plan.backend else before) * HEADROOM),
        free_bytes=psutil.virtual_memory().available,
        notes=(*plan.notes, *_notes(plan, peak, before, live)),
    )


def check_calibration(model_id: str | Path, config: QuantConfig) -> None:
    """Refuse a request that is complete but for the data that its method needs; reads no weights.

    Args:
        model_id: A Hub id or a directory.
        config: The request, with all the data that it will get.

    Raises:
        CalibrationError: See `hf_compress.calibration.data.check_data`.
    """
    if config.spec.needs_data:
        check_data(config.calibration, meta_model(model_id))


def _peaks(model: nn.Module, plan: Plan, config: Request) -> tuple[int, int]:
    """Memory of its own that quantizing takes: of a model that stays in memory, and from disk to disk."""
    if isinstance(config, QuantConfig):
        found = footprint(model, plan, config)
        return found.loaded, found.streamed
    largest = max(row.dense_bytes for row in plan.rows)
    peak = sum(row.planned_bytes for row in plan.rows if row.backend is not None) + WORKING_COPIES * largest
    return peak, peak


def _cast_rest(plan: Plan, rest: int) -> int:
    """Bytes of one-dimensional parameters after a cast."""
    dense = sum(row.dense_bytes for row in plan.rows)
    return rest * sum(row.planned_bytes for row in plan.rows) // dense if dense else rest


def _notes(plan: Plan, peak: int, before: int, live: bool) -> list[str]:
    """What a user should know before starting."""
    free = psutil.virtual_memory().available
    notes = (
        ["a live model holds the dense weights; from an id or directory they are never all in memory"] if live else []
    )
    if peak > free:
        notes.append(f"needs about {peak / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")
    if before * HEADROOM > free and not plan.backend:
        notes.append("the dense model does not fit into memory: the proof will be truncated")
    if plan.format == "guarded":
        notes.append("no stock format holds this plan: only hf_compress.load will read the checkpoint")
    return notes
