"""From a request and a model to the plan. The model may be on meta; no values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import nn
from transformers import PreTrainedModel

from . import scheme as schemes
from .config import QuantConfig, QuantFields
from .errors import (
    CoverageError,
    FormatError,
    GroupSizeError,
    NothingToQuantizeError,
    RuleError,
    TiedWeightsError,
    listed,
)
from .fit import fit
from .plan import Plan, PlanRow, dtype_name, row_of
from .rules import Decision, resolve
from .weights import Role, Weight, WeightKind, kept_in_float32, list_weights, small_parameters

_LINEAR = (WeightKind.LINEAR, WeightKind.CONV1D)


def build_plan(
    model: nn.Module, config: QuantConfig, input_ranks: Mapping[str, AbstractSet[int]] | None = None
) -> Plan:
    """Resolve a request against a model.

    Args:
        model: The model; the meta device will do.
        config: The request.
        input_ranks: Dimensions of the inputs of each linear module, by module path; methods that quantize
            activations leave linears with other than 3-D inputs weight-only. None when not known. Not needed for
            plain modules, which no stock reader runs.

    Raises:
        NothingToQuantizeError, CoverageError, GroupSizeError, TiedWeightsError, FormatError, PatternError, RuleError:
            Before anything is read or changed.
    """
    weights = list_weights(model)
    decisions = resolve(config.fields, weights)
    per_token = _per_token(model, input_ranks)
    rows = tuple(_row(weight, decisions[weight.name], config, per_token) for weight in weights)
    if config.load_dtype is not None:
        kept = kept_in_float32(model, config.load_dtype)
        rows = tuple(_left_in_float32(row) if kept(row.key) else row for row in rows)
    rows = _with_ties(rows, decisions)
    _check_groups(rows)
    check_coverage(rows, config.fields.min_coverage, type(model).__name__, config.method)
    plan = Plan(
        method=config.method,
        request=config.fields.model_dump(mode="json"),
        format="guarded",
        rows=rows,
        small_parameters=small_parameters(model),
        notes=_notes(config, rows, unknown=input_ranks is None and isinstance(model, PreTrainedModel)),
    )
    if not isinstance(model, PreTrainedModel):
        return _plain(plan, config.fields.format)
    return fit(plan, config.fields.format, config.fields.min_coverage)


def _plain(plan: Plan, wanted: str) -> Plan:
    """The plan of a plain module, which stock transformers has no class for.

    Raises:
        FormatError: A stock format was asked for.
    """
    if wanted not in ("auto", "guarded"):
        raise FormatError(
            f"The format {wanted!r} is read by transformers, which has no class for a plain module.",
            'leave `format` out, or use format="guarded" and read it with hf_compress.load(path, model=...)',
        )
    return plan


def _notes(config: QuantConfig, rows: Sequence[PlanRow], unknown: bool) -> tuple[str, ...]:
    """The method's remarks, and that input ranks are unknown where the scheme of a row depends on them."""
    notes = config.spec.notes(config.fields) if config.spec.notes is not None else ()
    depends = any(row.kind in _LINEAR and row.quantization is not None for row in rows)
    if unknown and depends and config.spec.quantizes_activations:
        what = "input shapes could not be traced: only linear layers inside a stack of blocks get quantized inputs"
        return (*notes, what)
    return notes


def _row(weight: Weight, decision: Decision, config: QuantConfig, per_token: Callable[[str], bool]) -> PlanRow:
    """The plan's row for one weight."""
    made = decision.reason if decision.keep else _scheme(weight, decision, config, per_token)
    role_out = weight.role in (Role.HEAD, Role.EMBEDDING)
    return row_of(weight, made, decision.reason, in_scope=not (role_out and isinstance(made, str)))


def _left_in_float32(row: PlanRow) -> PlanRow:
    """A row that transformers does not cast."""
    reason = "transformers keeps it in float32 for this architecture"
    changes = {"cast": None, "dtype": "float32", "scheme": "kept", "reason": reason, "in_scope": False}
    return row.model_copy(update=changes)


def _scheme(
    weight: Weight, decision: Decision, config: QuantConfig, per_token: Callable[[str], bool]
) -> schemes.Scheme | torch.dtype | str:
    """The scheme of a weight that rules leave in scope, or why it is kept."""
    if not weight.dtype.is_floating_point:
        return f"not a floating-point weight ({dtype_name(weight.dtype)})"
    if weight.dtype.itemsize < 2:
        return f"8 bits already ({dtype_name(weight.dtype)})"
    fields = _with_settings(config, weight, decision)
    if config.spec.quantize is None and not config.spec.needs_data:
        return config.spec.scheme(fields, weight)
    if weight.unpackable:
        return weight.unpackable
    if weight.kind is WeightKind.EMBEDDING:
        return schemes.scheme(schemes.weight_args(8, "channel", symmetric=True), packed=False)
    made = config.spec.scheme(fields, weight)
    if not isinstance(made, schemes.Scheme) or made.input_activations is None or not made.input_activations.dynamic:
        return made
    if weight.kind not in _LINEAR or per_token(weight.module):
        return made
    return schemes.scheme(schemes.weight_args(8, "channel", symmetric=True))


def _per_token(model: nn.Module, ranks: Mapping[str, AbstractSet[int]] | None) -> Callable[[str], bool]:
    """Whether the inputs of the linear at a path get one scale per token.

    Stock readers do so for (batch, tokens, features) only, which is taken to hold inside a stack of blocks when ranks
    are not known; the proof of a checkpoint finds the exceptions. Plain modules are read by this package alone.
    """
    if not isinstance(model, PreTrainedModel):
        return lambda path: True
    if ranks is None:
        return lambda path: any(part.isdigit() for part in path.split("."))
    return lambda path: ranks.get(path, {3}) == {3}


def _with_settings(config: QuantConfig, weight: Weight, decision: Decision) -> QuantFields:
    """The fields with a rule's settings. Convolutions have one scale per channel unless a rule says otherwise.

    Raises:
        RuleError: The method has no such field.
    """
    known = set(type(config.fields).model_fields)
    unknown = sorted(set(decision.settings) - known)
    if unknown:
        raise RuleError(
            f"A rule sets {', '.join(unknown)}, which the method {config.method!r} does not have.",
            "remove the setting or choose another method",
        )
    by_kind = {"group_size": "channel"} if weight.kind is WeightKind.CONV and "group_size" in known else {}
    return config.fields.model_copy(update={**by_kind, **decision.settings})


def _check_groups(rows: Sequence[PlanRow]) -> None:
    """Every group size must divide the columns it is applied to."""
    bad = [row for row in rows if _indivisible(row)]
    if not bad:
        return
    columns, size = bad[0].shape[-1], _group_size(bad[0])
    widths = {row.shape[-1] for row in rows if row.quantization is not None}
    fitting = [candidate for candidate in (256, 128, 64, 32, 16, 8) if not any(width % candidate for width in widths)]
    options = [f"group_size={fitting[0]}"] if fitting else []
    skip = ", ".join(f'"{row.name}"' for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
    raise GroupSizeError(
        f"group_size={size} does not divide the {columns} inputs of {bad[0].name} "
        f"({len(bad)} weights: {listed(row.name for row in bad)}). Nothing was read.",
        " or ".join([*options, 'group_size="channel"', f"skip=[{skip}]"]),
    )


def _group_size(row: PlanRow) -> int | None:
    """The group size of a row, or None."""
    weights = row.quantization.weights if row.quantization else None
    return weights.group_size if weights is not None and weights.strategy == "group" else None


def _indivisible(row: PlanRow) -> bool:
    """Whether the row's group size does not divide its columns."""
    size = _group_size(row)
    return bool(size) and row.shape[-1] % (size or 1) != 0


def _with_ties(rows: Sequence[PlanRow], decisions: Mapping[str, Decision]) -> tuple[PlanRow, ...]:
    """Rows whose tied weights have one fate: a later one follows the first, unless a rule of the user forbids it."""
    by_name = {row.name: row for row in rows}
    made = []
    for row in rows:
        source = by_name.get(row.tied_to or "")
        tied = source is not None and (row.quantization is not None or source.quantization is not None)
        made.append(_follow(row, source, decisions[row.name]) if tied and source is not None else row)
    return tuple(made)


def _follow(row: PlanRow, source: PlanRow, decision: Decision) -> PlanRow:
    """A row with the scheme of the row that it is tied to.

    Raises:
        TiedWeightsError: One of them is kept, or a rule or quantized inputs want another scheme for it.
    """
    same_form = (row.shape, row.transposed, row.kernel) == (source.shape, source.transposed, source.kernel)
    free = not decision.settings and not decision.reason.startswith("rule ")
    shared = source.quantization
    follows = row.quantization == shared or (free and shared is not None and shared.input_activations is None)
    if same_form and follows and not _static(shared):
        changes = {"quantization": shared, "scheme": source.scheme, "reason": f"tied to {source.name}"}
        return row.model_copy(update={**changes, "in_scope": True})
    table = ', or quantize both with embeddings="int8"' if source.kind is WeightKind.EMBEDDING else ""
    ranges = " and has one range for its inputs" if _static(shared) else ""
    raise TiedWeightsError(
        f"{row.name} shares its values with {source.name}: one is planned as {row.scheme} ({row.reason}), the other "
        f"as {source.scheme} ({source.reason}). A tied weight is stored once{ranges}.",
        f'keep both: skip=["{row.name}", "{source.name}"]{table} and no rule for {row.name}, or untie them with '
        "tie_word_embeddings=False (of a plain module: give each its own parameter)",
    )


def _static(given: schemes.Scheme | None) -> bool:
    """Whether a scheme fixes the range of its input beforehand, which tied layers can't share."""
    inputs = None if given is None else given.input_activations
    return inputs is not None and not inputs.dynamic


def check_coverage(rows: Sequence[PlanRow], minimum: float, model: str, method: str, instead: str = "") -> None:
    """Raise when nothing, or less than `minimum`, would be quantized.

    Args:
        rows: The plan's rows.
        minimum: Smallest fraction of the values in scope, 0 to 1.
        model: The model's class, for the message.
        method: The method or library, for the message.
        instead: What handles such a model, for the fix.

    Raises:
        NothingToQuantizeError, CoverageError: As their names say.
    """
    scope = [row for row in rows if row.in_scope]
    total = sum(row.parameters for row in scope)
    done = sum(row.parameters for row in scope if row.covered)
    left = sorted((row for row in scope or rows if not row.covered), key=lambda row: -row.parameters)
    detail = listed((f"{row.name} ({row.reason}, {row.parameters / max(total, 1):.1%})" for row in left), 3)
    if not any(row.covered for row in rows):
        raise NothingToQuantizeError(
            f"Nothing to quantize: 0 of {len(rows)} weights of {model} are in reach of {method!r}. "
            f"Kept: {detail or 'the model has no weights'}. No data was read.",
            instead or "relax skip and rules, or choose a method that handles these weights",
        )
    if done < minimum * total:
        raise CoverageError(
            f"Only {done / total:.1%} of the weights in scope of {model} would be quantized "
            f"(min_coverage={minimum:.0%}). Not covered: {detail}. No data was read.",
            f"{instead}, or " * bool(instead) + f"min_coverage={int(100 * done / total) / 100:g} accepts this",
        )
