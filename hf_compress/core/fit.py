"""Which checkpoint format holds a plan, and what has to be left out for it."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import FormatError
from .plan import Plan, PlanRow
from .registry import FORMATS
from .weights import WeightKind

STOCK = ("compressed-tensors", "bitsandbytes")
"""Formats that `auto` tries, in this order; all of them are read by stock transformers on any machine."""

_NEVER_STOCK = (WeightKind.CONV1D, WeightKind.CONV, WeightKind.RECURRENT)
_LEFT_OUT = (WeightKind.CONV, WeightKind.RECURRENT)


def fit(plan: Plan, wanted: str, min_coverage: float) -> Plan:
    """The plan in the format asked for; with `auto`, in the first stock format that holds it.

    Convolutions, recurrent layers and what stock leaves in float32 (T5's `wo`), unless a rule asks for them, are left
    out where the format can't hold them and enough of the model is covered without them: a vision transformer's patch
    embedding does not cost it its stock checkpoint. The guarded form is chosen only for what no stock format knows.

    Args:
        plan: The plan, its format not yet chosen.
        wanted: The format in the request.
        min_coverage: Smallest fraction of the weights in scope that must stay quantized.

    Raises:
        FormatError: The format asked for, or any stock format, can't hold the plan.
    """
    if not plan.quantized:
        return plan.model_copy(update={"format": "dense"})
    candidates = STOCK if wanted == "auto" else (wanted,)
    refusals = {name: _refusals(plan, name) for name in candidates}
    for name in candidates:
        if not refusals[name]:
            return _adapted(plan, name)
    for name in candidates:
        trimmed = _without(plan, refusals[name], name, min_coverage)
        if trimmed is not None and not _refusals(trimmed, name):
            return _adapted(trimmed, name)
    if wanted == "auto":
        known = _known_to_stock(plan)
        refusals = {name: _refusals(known, name) for name in candidates}
        if not all(refusals.values()):
            return _adapted(plan, "guarded")
    closest = min(candidates, key=lambda name: len(refusals[name]))
    raise _refusal(plan, closest, refusals[closest])


def holds(plan: Plan, name: str) -> bool:
    """Whether a format holds every quantized row of a plan."""
    return not _refusals(plan, name)


def in_format(plan: Plan, name: str) -> Plan:
    """A plan that was carried out, for a save in another format; its rows stay as they are.

    Raises:
        FormatError: The format can't hold it.
    """
    refused = _refusals(plan, name)
    if refused:
        raise _refusal(plan, name, refused)
    return plan.model_copy(update={"format": name})


def _refusals(plan: Plan, name: str) -> dict[str, str]:
    """Why a format can't hold some rows, by the rows' names."""
    layout = FORMATS.get(name)
    reasons = ((row.name, layout.refusal(row, plan)) for row in plan.quantized)
    return {row: reason for row, reason in reasons if reason}


def _without(plan: Plan, refused: Mapping[str, str], name: str, min_coverage: float) -> Plan | None:
    """The plan with those refused rows kept that may be left out, if that leaves enough; else None.

    Others may have been refused because of these, by a format that has one scheme for all layers.
    """
    left = {row.name for row in plan.rows if row.name in refused and _may_be_left_out(row)}
    if not left:
        return None
    rows = tuple(_kept(row, f"{name}: {refused[row.name]}") if row.name in left else row for row in plan.rows)
    trimmed = plan.model_copy(update={"rows": rows})
    return trimmed if trimmed.quantized and trimmed.coverage >= min_coverage else None


def _may_be_left_out(row: PlanRow) -> bool:
    """Convolutions, recurrent layers, and what stock leaves in float32, unless a rule asks for them."""
    return (row.kind in _LEFT_OUT or row.stays_float32) and not row.reason.startswith("rule ")


def _kept(row: PlanRow, reason: str) -> PlanRow:
    """A row that stays as it is; out of scope where stock leaves it in float32, as for casts."""
    changes = {"quantization": None, "scheme": "kept", "reason": reason}
    return row.model_copy(update={**changes, "in_scope": row.in_scope and not row.stays_float32})


def _adapted(plan: Plan, name: str) -> Plan:
    """The plan in a format, its rows as that format stores them."""
    layout = FORMATS.get(name)
    rows = tuple(row if row.quantization is None else layout.adapted(row) for row in plan.rows)
    return plan.model_copy(update={"format": name, "rows": rows})


def _known_to_stock(plan: Plan) -> Plan:
    """The plan without what no stock format has a place for."""
    rows = (_kept(row, "no stock format") if _unknown_to_stock(row) else row for row in plan.rows)
    return plan.model_copy(update={"rows": tuple(rows)})


def _unknown_to_stock(row: PlanRow) -> bool:
    """Whether no stock format has a place for such a weight."""
    codebook = None if row.quantization is None else row.quantization.codebook
    return row.kind in _NEVER_STOCK or codebook in ("log", "kmeans")


def _refusal(plan: Plan, name: str, refused: Mapping[str, str]) -> FormatError:
    """The error that names the first weight and the ways out."""
    row = next(row for row in plan.quantized if row.name in refused)
    return FormatError(
        f"The format {name!r} can't hold {row.name} ({row.scheme}): {refused[row.name]}. "
        f"{len(refused)} weights are concerned.",
        f'change their scheme, keep them with skip=["{row.name}", ...], or accept a checkpoint that only '
        'hf_compress.load reads with format="guarded"',
    )
