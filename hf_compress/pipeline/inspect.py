"""`hf_compress.inspect`: what a model or checkpoint really is."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..checkpoint.foreign import measured_plan, running_kernels
from ..checkpoint.foreign_int import foreign_plan, open_foreign
from ..checkpoint.foreign_settings import Settings, foreign_settings
from ..checkpoint.handover import current_plan
from ..checkpoint.proof import current_record
from ..checkpoint.record import Proof
from ..core.errors import UnsupportedModelError
from ..core.plan import Plan
from ..evaluation.size import disk_bytes, resident_bytes


class Inspection(BaseModel):
    """What a model or checkpoint is.

    Attributes:
        source: Where it came from.
        plan: The plan that was carried out; of a model that this package did not compress, what its weights are.
        coverage: Fraction of the weights in scope that are compressed; None without a plan.
        by_scheme: Weights and values per scheme label.
        disk_bytes: Bytes of all files of a checkpoint.
        resident_bytes: Bytes of a model in memory, each storage once.
        kernels: Packed modules per kernel, for a model in memory.
        proof: How the checkpoint was proven.
        notes: Remarks that a user should read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    plan: Plan | None = None
    coverage: float | None = None
    by_scheme: dict[str, dict[str, int]] = {}
    disk_bytes: int | None = None
    resident_bytes: int | None = None
    kernels: dict[str, int] | None = None
    proof: Proof | None = None
    notes: tuple[str, ...] = ()


def inspect(model_or_path: nn.Module | str | Path) -> Inspection:
    """Inspect a model in memory or a checkpoint directory.

    Args:
        model_or_path: A model, or the directory of a checkpoint that this package wrote, or of another tool's GPTQ
            or AWQ checkpoint.

    Raises:
        CheckpointNotFoundError: There is no checkpoint of ours at the path.
        CorruptCheckpointError: It is damaged.
        UnsupportedModelError: The argument is neither.
    """
    if isinstance(model_or_path, nn.Module):
        return _inspect_model(model_or_path)
    if not isinstance(model_or_path, str | Path):
        raise UnsupportedModelError(
            f"Expected a model or a directory, got {type(model_or_path).__name__}.",
            "pass a model or its checkpoint",
        )
    path = Path(model_or_path)
    settings = foreign_settings(path)
    if settings is not None:
        return _inspect_foreign(path, settings)
    record = current_record(path)
    return Inspection(
        source=record.source or str(path),
        plan=record.plan,
        coverage=record.plan.coverage,
        by_scheme=record.plan.by_scheme(),
        disk_bytes=disk_bytes(path).total,
        proof=record.proof,
        notes=(
            *record.plan.notes,
            *([record.proof.reason] if record.proof.level == "none" and record.proof.reason else []),
        ),
    )


def _inspect_foreign(path: Path, settings: Settings) -> Inspection:
    """What a GPTQ or AWQ checkpoint is that another tool wrote; no codes are read."""
    source = open_foreign(path, settings)
    plan = foreign_plan(source, source.skeleton())
    return Inspection(
        source=str(path),
        plan=plan,
        coverage=plan.coverage,
        by_scheme=plan.by_scheme(),
        disk_bytes=disk_bytes(path).total,
        notes=("not written by hf_compress, and not proven", *plan.notes),
    )


def _inspect_model(model: nn.Module) -> Inspection:
    """What a model in memory is."""
    plan = current_plan(model) or measured_plan(model)
    return Inspection(
        source=type(model).__name__,
        plan=plan,
        coverage=None if plan is None else plan.coverage,
        by_scheme={} if plan is None else plan.by_scheme(),
        resident_bytes=resident_bytes(model),
        kernels=running_kernels(model, plan),
        notes=("packed by hf_compress, without its plan",) if plan is None else plan.notes,
    )
