"""Nearest value of a table times the group's absolute maximum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ...core import scheme as schemes
from ...core.config import QuantFields
from ...core.errors import ConfigError, WeightValueError
from ...core.registry import Quantized
from ...core.weights import Weight
from ..rtn.method import CHUNK
from ..rtn.method import quantize_scheme as quantize_uniform
from .config import CodebookFields, check_bits
from .kmeans import BINS, Histogram, histogram, learn
from .tables import fixed_table


def scheme(fields: QuantFields, weight: Weight) -> schemes.Scheme:
    """Weight-only, with the codebook that the fields ask for.

    Raises:
        ConfigError: A rule sets other than 4 bits for NF4 or FP4.
    """
    if not isinstance(fields, CodebookFields):
        raise ConfigError(f"{type(fields).__name__} has no codebook.")
    check_bits(fields.codebook, fields.bits)
    return schemes.scheme(schemes.weight_args(fields.bits, fields.group_size, True), codebook=fields.codebook)


def quantize_scheme(weight: Tensor, given: schemes.Scheme) -> Quantized:
    """Quantize a weight to its scheme's codebook; to the uniform grid of a scheme without one, such as embeddings'.

    Args:
        weight: … × rows × columns, floating point, finite.
        given: The scheme.

    Raises:
        WeightValueError: K-means, and the weight has fewer distinct values than there are codes.
    """
    if given.codebook is None or given.weights is None:
        return quantize_uniform(weight, given)
    return quantize(weight, given.weights, given.codebook)


@torch.no_grad()
def quantize(weight: Tensor, args: QuantizationArgs, codebook: schemes.Codebook) -> Quantized:
    """Quantize a weight to the nearest values of a table.

    Args:
        weight: … × rows × columns, floating point, finite.
        args: Bits, strategy and group size.
        codebook: Kind of the table.

    Returns:
        Codes (int8, positions minus 2^(bits - 1)), absolute maxima of the groups as scales in the weight's data
        type, and the table. Values are divided in float32 by the scale as it will be stored. The scale of a group of
        zeros is 0 with k-means, else the smallest normal number.

    Raises:
        WeightValueError: K-means, and the weight has fewer distinct values than there are codes.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    largest = _largest(rows, args)
    divisor = torch.where(largest == 0, torch.finfo(args.scale_dtype or rows.dtype).tiny, largest)
    learned = codebook == "kmeans"
    table = _learned(rows, divisor, args.num_bits) if learned else fixed_table(codebook, args.num_bits)
    table = table.to(weight.device)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    for part, values, _ in _normalised(rows, divisor):
        codes[part] = nearest(values, table).flatten(-2)
    scale = largest if learned else divisor  # a learned table may have no zero: 0 times any value is one
    return Quantized(codes.view(weight.shape), scale.view(schemes.groups(tuple(weight.shape), args)), None, table)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest values of a table; between two as near, the smaller value, of equal ones the first.

    Args:
        values: float32, any shape.
        table: float32, 2^bits values in any order.

    Returns:
        int8 of the values' shape, positions in the table minus 2^(bits - 1).
    """
    ordered, order = table.sort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    ordered, codes = ordered[first], (order[first] - len(table) // 2).to(torch.int8)
    return codes[torch.bucketize(values.contiguous(), (ordered[1:] + ordered[:-1]) / 2, out_int32=True)]


def _largest(rows: Tensor, args: QuantizationArgs) -> Tensor:
    """Absolute maximum of each group, rounded as it will be stored."""
    groups = 1 if args.strategy == "tensor" else schemes.groups(tuple(rows.shape), args)[-1]
    grouped = (block.unflatten(-1, (groups, -1)) for block in rows.split(_rows_at_a_time(rows)))
    largest = torch.cat([torch.maximum(block.amax(-1), -block.amin(-1)) for block in grouped])
    if args.strategy == "tensor":
        largest = largest.amax().view(1, 1)
    return largest.to(args.scale_dtype or rows.dtype).to(rows.dtype)


def _normalised(rows: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows over their scales in float32, block by block: which rows, rows × groups × columns, and the scales."""
    step = _rows_at_a_time(rows)
    each = scale.expand(len(rows), -1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        divisor = each[part].float().unsqueeze(-1)
        yield part, rows[part].float().unflatten(-1, (scale.shape[-1], -1)) / divisor, divisor


def _learned(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The k-means table of a weight, float32."""
    blocks = ((values, divisor.double().square()) for _, values, divisor in _normalised(rows, scale))
    found = histogram((values.flatten().cpu(), mass.expand_as(values).flatten().cpu()) for values, mass in blocks)
    _check_distinct(found, rows.numel(), bits)
    return learn(found, 2**bits).float()


def _check_distinct(found: Histogram, count: int, bits: int) -> None:
    """K-means needs at least one value per code.

    Raises:
        WeightValueError: There are fewer.
    """
    distinct = len(found.means)
    if distinct >= 2**bits:
        return
    fewer = [f"bits={smaller}" for smaller in range(bits - 1, 1, -1) if 2**smaller <= distinct]
    raise WeightValueError(
        f"K-means with {bits} bits learns {2**bits} values, but only {distinct} of the {count} values of this weight "
        f"are distinct (further apart than 1/{BINS // 2} of their group's largest).",
        " or ".join([*fewer[:1], 'codebook="nf4", bits=4']),
    )


def _rows_at_a_time(rows: Tensor) -> int:
    """Rows in a block of about `CHUNK` values."""
    return max(1, CHUNK // max(1, rows.shape[1]))
