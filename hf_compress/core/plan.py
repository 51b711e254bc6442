"""The plan: for every weight, what will happen to it or why not. Built from a model on meta; reads no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal

import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator
from torch import nn

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
from .registry import FORMATS
from .rules import Decision, resolve
from .weights import Role, Weight, WeightKind, kept_in_float32, list_weights, small_parameters


def _itemsize(dtype: str) -> int:
    """Bytes per value."""
    return DTYPES[dtype].itemsize


DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""Data types by name."""


class PlanRow(BaseModel):
    """One weight of the plan.

    Attributes:
        name: Weight name without `.weight`.
        module: Path of the owning module.
        parameter: Attribute name on that module.
        kind: How the weight is used.
        owner: Class name of the owning module.
        shape: Canonical shape, … × rows × columns.
        transposed: Whether the stored parameter has rows and columns swapped.
        dtype: Data type of the parameter, such as `float32`.
        parameters: Number of values; 0 for a tied weight after the first.
        scheme: Label such as `int4-g64`, or `kept`.
        quantization: The compressed-tensors scheme, or None when kept or cast.
        cast: Data type that the weight is cast to, or None.
        reason: Why, in words.
        in_scope: Whether it counts in the denominator of coverage.
        tied_to: Name of the weight it shares its values with.
        parts: Checkpoint names of fused experts' weights, `{}` for the expert.
        sqnr_db: Signal-to-quantization-noise ratio in dB once quantized; None where it is exact or not quantized.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    module: str
    parameter: str
    kind: WeightKind
    owner: str
    shape: Annotated[tuple[NonNegativeInt, ...], Field(min_length=2, max_length=4)]
    transposed: bool
    dtype: str
    parameters: NonNegativeInt
    scheme: str
    quantization: QuantizationScheme | None
    cast: str | None = None
    reason: str
    in_scope: bool
    tied_to: str | None = None
    parts: tuple[str, ...] = ()
    sqnr_db: float | None = None

    @field_validator("dtype", "cast")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in DTYPES:
            raise ValueError(f"{value!r} is no data type")
        return value

    @field_validator("quantization")
    @classmethod
    def _has_grid(cls, value: QuantizationScheme | None) -> QuantizationScheme | None:
        if value is not None and value.weights is None:
            raise ValueError("a quantized weight needs weight arguments")
        return value

    @property
    def key(self) -> str:
        """Full parameter name in a dense state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def covered(self) -> bool:
        """Whether the plan compresses this weight."""
        return self.quantization is not None or self.cast is not None

    @property
    def dense_bytes(self) -> int:
        """Bytes of this weight before."""
        return self.parameters * _itemsize(self.dtype)

    @property
    def planned_bytes(self) -> int:
        """Bytes of this weight once the plan is carried out."""
        if self.quantization is None or self.quantization.weights is None:
            return self.parameters * _itemsize(self.cast or self.dtype)
        return schemes.packed_bytes(self.shape, self.quantization.weights, _itemsize(self.dtype))


class Plan(BaseModel):
    """The resolved plan of a whole model; serialisable, saved with the model.

    Attributes:
        schema_version: Version of this layout.
        method: Name of the method.
        request: The configuration's fields, without data.
        format: Checkpoint format that will hold the result.
        rows: One row per weight with two or more dimensions.
        small_parameters: Values in biases, norms and other one-dimensional parameters, always kept.
        stock_dequantize: Whether stock transformers must dequantize while loading, because this architecture's
            initialisation can't handle packed layers.
        notes: Remarks that a user should read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str
    request: dict[str, Any]
    format: str
    rows: tuple[PlanRow, ...]
    small_parameters: int
    stock_dequantize: bool = False
    notes: tuple[str, ...] = ()

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in FORMATS.names():
            raise ValueError(f"{value!r} is no format of this version; known: {', '.join(FORMATS.names())}")
        return value

    @property
    def quantized(self) -> tuple[PlanRow, ...]:
        """Rows that will be quantized."""
        return tuple(row for row in self.rows if row.quantization is not None)

    @property
    def coverage(self) -> float:
        """Fraction of the values in scope that are quantized, 0 to 1."""
        scope = sum(row.parameters for row in self.rows if row.in_scope)
        done = sum(row.parameters for row in self.rows if row.in_scope and row.covered)
        return done / scope if scope else 0.0

    def by_scheme(self) -> dict[str, dict[str, int]]:
        """Number of weights and values per scheme label, `kept` included."""
        table: dict[str, dict[str, int]] = {}
        for row in self.rows:
            entry = table.setdefault(row.scheme, {"weights": 0, "parameters": 0})
            entry["weights"] += 1
            entry["parameters"] += row.parameters
        return dict(sorted(table.items()))

    def __str__(self) -> str:
        covered = sum(row.covered for row in self.rows)
        lines = [f"{self.method}: {covered} of {len(self.rows)} weights, coverage {self.coverage:.1%}"]
        lines += [f"  {row.name}  {'×'.join(map(str, row.shape))}  {row.scheme}  ({row.reason})" for row in self.rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def build_plan(
    model: nn.Module, config: QuantConfig, input_ranks: Mapping[str, AbstractSet[int]] | None = None
) -> Plan:
    """Resolve a request against a model.

    Args:
        model: The model; the meta device will do.
        config: The request.
        input_ranks: Dimensions of the inputs of each linear module, by module path; methods that quantize
            activations leave linears with other than 3-D inputs weight-only. None when not known.

    Raises:
        NothingToQuantizeError, CoverageError, GroupSizeError, TiedWeightsError, FormatError, PatternError, RuleError:
            Before anything is read or changed.
    """
    weights = list_weights(model)
    decisions = resolve(config.fields, weights)
    rows = tuple(_row(weight, decisions[weight.name], config, input_ranks) for weight in weights)
    if config.load_dtype is not None:
        kept = kept_in_float32(model, config.load_dtype)
        rows = tuple(_left_in_float32(row) if kept(row.key) else row for row in rows)
    _check_groups(rows)
    _check_ties(rows)
    _check_coverage(rows, config, type(model).__name__)
    plan = Plan(
        method=config.method,
        request=config.fields.model_dump(mode="json"),
        format="guarded",
        rows=rows,
        small_parameters=small_parameters(model),
        notes=_notes(config, input_ranks),
    )
    return plan.model_copy(update={"format": choose_format(plan, config.fields.format)})


def _notes(config: QuantConfig, ranks: Mapping[str, AbstractSet[int]] | None) -> tuple[str, ...]:
    """The method's remarks, and what could not be found out."""
    notes = config.spec.notes(config.fields) if config.spec.notes is not None else ()
    if config.spec.quantizes_activations and ranks is None:
        return (*notes, "input shapes could not be traced: only layers inside a stack of blocks get quantized inputs")
    return notes


def choose_format(plan: Plan, wanted: str) -> str:
    """The format asked for, or the stock format; the guarded one only for weights that no stock format knows.

    Raises:
        FormatError: The format asked for, or any stock format, can't hold the plan.
    """
    if not plan.quantized:
        return "dense"
    name = "compressed-tensors" if wanted == "auto" else wanted
    refusals = [(row, FORMATS.get(name).refusal(row, plan)) for row in plan.quantized]
    refused = [(row, reason) for row, reason in refusals if reason]
    if not refused:
        return name
    if wanted == "auto" and all(row.kind is WeightKind.CONV1D for row, _ in refused):
        return "guarded"
    row, reason = refused[0]
    raise FormatError(
        f"The format {name!r} can't hold {row.name} ({row.scheme}): {reason}. {len(refused)} weights are concerned.",
        f'change their scheme, keep them with skip=["{row.name}", ...], or accept a checkpoint that only '
        'hf_compress.load reads with format="guarded"',
    )


def _row(
    weight: Weight, decision: Decision, config: QuantConfig, ranks: Mapping[str, AbstractSet[int]] | None
) -> PlanRow:
    """The plan's row for one weight."""
    made = decision.reason if decision.keep else _scheme(weight, decision, config, ranks)
    role_out = weight.role in (Role.HEAD, Role.EMBEDDING)
    return row_of(weight, made, decision.reason, in_scope=not (role_out and isinstance(made, str)))


def row_of(weight: Weight, made: QuantizationScheme | torch.dtype | str, reason: str, in_scope: bool) -> PlanRow:
    """A row of a plan.

    Args:
        weight: The weight.
        made: Its scheme, the data type it is cast to, or why it is kept.
        reason: Why, where it is not kept.
        in_scope: Whether it counts in the denominator of coverage.
    """
    return PlanRow(
        name=weight.name,
        module=weight.module,
        parameter=weight.parameter,
        kind=weight.kind,
        owner=weight.owner,
        shape=weight.shape,
        transposed=weight.transposed,
        dtype=_name(weight.dtype),
        parameters=0 if weight.tied_to else weight.count,
        quantization=made if isinstance(made, QuantizationScheme) else None,
        cast=_name(made) if isinstance(made, torch.dtype) else None,
        scheme=_label(made),
        reason=made if isinstance(made, str) else reason,
        in_scope=in_scope,
        tied_to=weight.tied_to,
        parts=weight.parts,
    )


def _left_in_float32(row: PlanRow) -> PlanRow:
    """A row that transformers does not cast."""
    reason = "transformers keeps it in float32 for this architecture"
    changes = {"cast": None, "dtype": "float32", "scheme": "kept", "reason": reason, "in_scope": False}
    return row.model_copy(update=changes)


def _name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _label(made: QuantizationScheme | torch.dtype | str) -> str:
    """The row's label."""
    if isinstance(made, str):
        return "kept"
    return _name(made) if isinstance(made, torch.dtype) else schemes.label(made)


def _scheme(
    weight: Weight, decision: Decision, config: QuantConfig, ranks: Mapping[str, AbstractSet[int]] | None
) -> QuantizationScheme | torch.dtype | str:
    """The scheme of a weight that rules leave in scope, or why it is kept."""
    if not weight.dtype.is_floating_point:
        return f"not a floating-point weight ({_name(weight.dtype)})"
    if weight.dtype.itemsize < 2:
        return f"8 bits already ({_name(weight.dtype)})"
    fields = _with_settings(config, decision)
    if config.spec.quantize is None:
        return config.spec.scheme(fields, weight)
    if weight.kind is WeightKind.OTHER:
        return f"{weight.owner} weights are not supported"
    if weight.kind is WeightKind.EMBEDDING:
        return schemes.scheme(schemes.weight_args(8, "channel", symmetric=True), packed=False)
    made = config.spec.scheme(fields, weight)
    if not isinstance(made, QuantizationScheme) or made.input_activations is None or _per_token(weight.module, ranks):
        return made
    return schemes.scheme(schemes.weight_args(8, "channel", symmetric=True))


def _per_token(module: str, ranks: Mapping[str, AbstractSet[int]] | None) -> bool:
    """Whether a linear's inputs are (batch, tokens, features); when not known, only inside a stack of blocks."""
    if ranks is None:
        return any(part.isdigit() for part in module.split("."))
    return ranks.get(module, {3}) == {3}


def _with_settings(config: QuantConfig, decision: Decision) -> QuantFields:
    """The fields with a rule's settings.

    Raises:
        RuleError: The method has no such field.
    """
    unknown = sorted(set(decision.settings) - set(type(config.fields).model_fields))
    if unknown:
        raise RuleError(
            f"A rule sets {', '.join(unknown)}, which the method {config.method!r} does not have.",
            "remove the setting or choose another method",
        )
    return config.fields.model_copy(update=decision.settings)


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


def _check_ties(rows: Sequence[PlanRow]) -> None:
    """A tied weight is stored once: it can't be quantized through one name and kept through another."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        source = by_name.get(row.tied_to or "")
        if source is None or (row.quantization is None and source.quantization is None):
            continue
        raise TiedWeightsError(
            f"{row.name} shares its values with {source.name}: one is planned as {row.scheme}, the other as "
            f"{source.scheme}. Quantizing tied weights is not supported.",
            f'keep both: skip=["{row.name}", "{source.name}"], or untie them with tie_word_embeddings=False',
        )


def _check_coverage(rows: Sequence[PlanRow], config: QuantConfig, model: str) -> None:
    """Raise when nothing, or less than `min_coverage`, would be quantized."""
    scope = [row for row in rows if row.in_scope]
    total = sum(row.parameters for row in scope)
    done = sum(row.parameters for row in scope if row.covered)
    left = sorted((row for row in scope if not row.covered), key=lambda row: -row.parameters)
    detail = listed((f"{row.name} ({row.reason}, {row.parameters / max(total, 1):.1%})" for row in left), 3)
    if not any(row.covered for row in rows):
        raise NothingToQuantizeError(
            f"Nothing to quantize: 0 of {len(rows)} weights of {model} are in reach of {config.method!r}. "
            f"Kept: {detail or 'the model has no weights'}. No data was read.",
            "relax skip and rules, or choose a method that handles these weights",
        )
    if done < config.fields.min_coverage * total:
        raise CoverageError(
            f"Only {done / total:.1%} of the weights in scope of {model} would be quantized "
            f"(min_coverage={config.fields.min_coverage:.0%}). Not covered: {detail}. No data was read.",
            f"min_coverage={int(100 * done / total) / 100:g} accepts this",
        )
