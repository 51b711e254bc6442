"""What the GPTQ and AWQ layouts share: half-precision scales, names of layers, and what is wrong with a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..core import scheme as schemes
from ..core.errors import CorruptCheckpointError, FormatError
from ..core.plan import DTYPES, PlanRow
from ..modules.packed import PackedTensor, layout_of
from .base import take

ROUNDINGS = 8
"""Limit on outputs of GPTQModel's kernels, in units of the last place of the coarser of float16 and the weights' type:
they multiply codes and scales in float16, and sum in another order."""


class IntegerFormat:
    """What the two layouts have in common.

    Attributes:
        suffixes: Names of the tensors of a layer.
        stock_reader: Package that stock transformers needs to read it.
        weights_file: None: transformers' own.
    """

    suffixes: tuple[str, ...]
    stock_reader: str | None = "gptqmodel"
    weights_file: str | None = None

    def adapted(self, row: PlanRow) -> PlanRow:
        """A row whose scales fit float16, into which stock loading would cast others as well."""
        if row.quantization is None or row.dtype == "float16":
            return row
        return row.model_copy(update={"quantization": schemes.with_half_scales(row.quantization)})

    def keys(self, row: PlanRow) -> list[str]:
        """Names of the tensors that hold one packed weight."""
        return [f"{row.module}.{suffix}" for suffix in self.suffixes]

    def owned(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names on disk that belong to packed weights: integer `qweight`s and what lies beside them."""
        found = (key for key, value in tensors.items() if key.endswith(".qweight") and value.dtype == torch.int32)
        bases = {key.removesuffix("qweight") for key in found}
        return {f"{base}{suffix}" for base in bases for suffix in self.suffixes} & set(tensors)

    def decode(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """One packed weight of a checkpoint of ours, in canonical layout.

        Args:
            row: Its row of the plan.
            tensors: Tensors by name.

        Raises:
            CorruptCheckpointError: A tensor is missing, or is not what the plan implies.
        """
        found = {key: take(tensors, key) for key in self.keys(row)}
        check_half(row, found[f"{row.module}.scales"])
        return self.read(row, found)

    def read(self, row: PlanRow, tensors: Mapping[str, Tensor]) -> PackedTensor:
        """`decode` for tensors of whatever origin."""
        raise NotImplementedError


def rounding(rows: Sequence[PlanRow]) -> float:
    """One unit of the last place of the coarsest of float16 and the weights' data types."""
    return max(torch.finfo(dtype).eps for dtype in (torch.float16, *(DTYPES[row.dtype] for row in rows)))


def half(row: PlanRow, scale: Tensor) -> Tensor:
    """Scales as they are stored, float16.

    Raises:
        FormatError: That would change them.
    """
    if scale.dtype != DTYPES[row.dtype]:
        raise FormatError(
            f"{row.name} was compressed in {row.dtype} and is {scale.dtype} now. Nothing was written.",
            "compress the model in the data type that it will have: from_pretrained(dtype=...)",
        )
    stored = scale.to(torch.float16)
    if not torch.equal(stored.to(scale.dtype), scale):
        raise FormatError(
            f"Scales of {row.name} do not fit float16, which the layout stores. Nothing was written.",
            'use format="guarded", or a method whose scales follow the scheme',
        )
    return stored


def check(row: PlanRow, suffix: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another type or shape.

    Raises:
        CorruptCheckpointError: It is not what the plan implies.
    """
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise corrupt(f"{row.module}.{suffix} is {value.dtype} {tuple(value.shape)}, the plan says {dtype} {shape}")


def check_half(row: PlanRow, scales: Tensor) -> None:
    """Refuse scales of another type than these layouts store.

    Raises:
        CorruptCheckpointError: They are not float16.
    """
    expected = (schemes.groups(row.shape, layout_of(row).weights)[1], row.shape[0])
    check(row, "scales", scales, torch.float16, expected)


def check_finite(row: PlanRow, scales: Tensor) -> None:
    """Refuse scales that are no numbers.

    Raises:
        CorruptCheckpointError: They are no floating-point numbers, or hold NaN or infinite values.
    """
    if not scales.is_floating_point():
        raise corrupt(f"{row.module}.scales is {scales.dtype}, expected floating-point numbers")
    if not bool(torch.isfinite(scales).all()):
        raise corrupt(f"{row.module}.scales holds NaN or infinite values")


def symmetric_or(row: PlanRow, zero_points: Tensor) -> Tensor | None:
    """Zero points as the plan wants them: None where it is symmetric.

    Raises:
        CorruptCheckpointError: The plan is symmetric and they are not the middle of the grid.
    """
    if not layout_of(row).weights.symmetric:
        return zero_points
    if bool(zero_points.any()):
        raise corrupt(f"{row.module}.qzeros is not the middle of the grid, though the plan is symmetric")
    return None


def corrupt(message: str) -> CorruptCheckpointError:
    """The error for tensors that this package would not have written."""
    return CorruptCheckpointError(f"{message}.", "save it again")


def endings(name: str) -> Iterator[str]:
    """Endings of a module's name: within its block, with its block's number, then the whole name."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        yield ".".join(parts[-2:])
    else:
        yield ".".join(parts[number + 1 :])
        yield ".".join(parts[max(number - 1, 0) :])
    yield name
