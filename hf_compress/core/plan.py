"""The plan: for every weight, what will happen to it or why not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator

from . import scheme as schemes
from .registry import FORMATS
from .weights import Weight, WeightKind


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
        quantization: The scheme, or None when kept or cast.
        cast: Data type that the weight is cast to, or None.
        reason: Why, in words.
        in_scope: Whether it counts in the denominator of coverage.
        tied_to: Name of the weight it shares its values with.
        parts: Checkpoint names of fused experts' weights, `{}` for the expert.
        kernel: Of a convolution, the parameter's dimensions after the first.
        stays_float32: Whether stock quantizers leave its module alone, as one that this architecture wants in float32.
        backend: What another library did to this weight, such as `bitsandbytes nf4`; None where we did it.
        stored_bytes: Bytes that the other library's form of it takes.
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
    quantization: schemes.Scheme | None
    cast: str | None = None
    reason: str
    in_scope: bool
    tied_to: str | None = None
    parts: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()
    stays_float32: bool = False
    backend: str | None = None
    stored_bytes: NonNegativeInt | None = None
    sqnr_db: float | None = None

    @field_validator("dtype", "cast")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in DTYPES:
            raise ValueError(f"{value!r} is no data type")
        return value

    @field_validator("quantization")
    @classmethod
    def _has_grid(cls, value: schemes.Scheme | None) -> schemes.Scheme | None:
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
        return self.quantization is not None or self.cast is not None or self.backend is not None

    @property
    def dense_bytes(self) -> int:
        """Bytes of this weight before."""
        return self.parameters * _itemsize(self.dtype)

    @property
    def planned_bytes(self) -> int:
        """Bytes of this weight once the plan is carried out; a tied one after the first takes none."""
        if self.tied_to is not None:
            return 0
        if self.stored_bytes is not None:
            return self.stored_bytes
        if self.quantization is None:
            return self.parameters * _itemsize(self.cast or self.dtype)
        return schemes.packed_bytes(self.shape, self.quantization, _itemsize(self.dtype))


class CalibrationRecord(BaseModel):
    """What a result says of its calibration data; never the data itself.

    Attributes:
        source: Where it came from: `texts`, `conversations`, `token ids`, `dataset`, `file`, `batches`, `images`,
            `sound`, `default` (text that comes with Python), `self-generated` or `distilled`.
        sha256: Of the names, types, shapes and bytes of the tensors that the model got.
        rows: Rows used.
        tokens: Tokens used, padding left out; None where there is no text.
        sequence_length: Most tokens in a row; None where there is no text.
        seed: Seed of the draw.
        packed: Whether texts were joined and cut into rows of equal length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rows: NonNegativeInt
    tokens: NonNegativeInt | None = None
    sequence_length: NonNegativeInt | None = None
    seed: NonNegativeInt
    packed: bool = False


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
        calibration: What is known of the calibration data; None where the method used none.
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
    calibration: CalibrationRecord | None = None

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
    def backend(self) -> str | None:
        """The library that quantized the model, such as `bitsandbytes`; None where this package did."""
        return next((row.backend.partition(" ")[0] for row in self.rows if row.backend), None)

    @property
    def followers(self) -> dict[str, tuple[PlanRow, ...]]:
        """Quantized rows that share the packed weight of an earlier row, by that row's name."""
        tied = [row for row in self.quantized if row.tied_to is not None]
        return {name: tuple(row for row in tied if row.tied_to == name) for name in {str(row.tied_to) for row in tied}}

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


def row_of(weight: Weight, made: schemes.Scheme | torch.dtype | str, reason: str, in_scope: bool) -> PlanRow:
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
        dtype=dtype_name(weight.dtype),
        parameters=0 if weight.tied_to else weight.count,
        quantization=made if isinstance(made, schemes.Scheme) else None,
        cast=dtype_name(made) if isinstance(made, torch.dtype) else None,
        scheme=_label(made),
        reason=made if isinstance(made, str) else reason,
        in_scope=in_scope,
        tied_to=weight.tied_to,
        parts=weight.parts,
        kernel=weight.kernel,
        stays_float32=weight.stays_float32,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _label(made: schemes.Scheme | torch.dtype | str) -> str:
    """The row's label."""
    if isinstance(made, str):
        return "kept"
    return dtype_name(made) if isinstance(made, torch.dtype) else schemes.label(made)
