"""One canonical layout for packed weights, and the arithmetic that turns it back.

Codes of 8 bits are int8; fewer bits are packed densely into int32 words along the inputs, as compressed-tensors
does (element i at bit position i × bits, little endian, offset binary). Dequantizing is compressed-tensors'
arithmetic, `(codes - zero_point) * scale` in the scale's data type, so both give the same bytes. With a codebook it
is bitsandbytes' arithmetic, `codebook[code] * scale` in float32, then cast to the scale's data type.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from ..core import scheme as schemes
from ..core.errors import RowError
from ..core.plan import PlanRow
from ..core.registry import Quantized
from ..core.weights import PACKED_SUFFIXES

CHUNK = 1 << 15
"""Codes packed at a time, so that temporary memory does not grow with the weight."""


@dataclass(frozen=True)
class Layout:
    """The static part of a packed weight.

    Attributes:
        shape: Canonical shape, … × rows × columns.
        scheme: The scheme.
        transposed: Whether the module's own parameter has rows and columns swapped.
        kernel: For convolutions, the parameter's dimensions after the first; columns are their product.
    """

    shape: tuple[int, ...]
    scheme: schemes.Scheme
    transposed: bool
    kernel: tuple[int, ...] = ()

    @property
    def weights(self) -> QuantizationArgs:
        """The weight's grid."""
        if self.scheme.weights is None:
            raise ValueError("a packed weight always has weight arguments")
        return self.scheme.weights

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the dense parameter."""
        if self.kernel:
            return (self.shape[0], *self.kernel)
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def oriented(self, weight: Tensor) -> Tensor:
        """A canonical weight in the module's own orientation: a view, the inverse of `results.canonical`."""
        if self.kernel:
            return weight.view(self.parameter_shape)
        return weight.transpose(-1, -2) if self.transposed else weight

    def __deepcopy__(self, memo: dict[int, object]) -> Layout:
        return self


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight.

    Attributes:
        layout: Shape, scheme, orientation.
        codes: int8 (… × rows × columns) for 8 bits, else int32 words (… × rows × ceil(columns · bits / 32)).
        scale: Floating, per group, per row or for the tensor.
        zero_point: int8 of the scale's shape, or None.
        codebook: Floating, 2^bits values, or None for a uniform grid.
        g_idx: int32 group of each column, or None where groups are consecutive columns.
        input_scale: Floating scale of the module's input (1), where it is quantized statically; else None.
        input_zero_point: int8 zero point of the input (1), or None when symmetric.
    """

    layout: Layout
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by `PACKED_SUFFIXES`."""
        values = (
            self.codes,
            self.scale,
            self.zero_point,
            self.codebook,
            self.g_idx,
            self.input_scale,
            self.input_zero_point,
        )
        named = zip(PACKED_SUFFIXES, values, strict=True)
        return {suffix: value for suffix, value in named if value is not None}

    def clone(self) -> PackedTensor:
        """The same in memory of its own."""
        own: dict[str, Any] = {name: one.clone() for name, one in vars(self).items() if isinstance(one, Tensor)}
        return replace(self, **own)

    def dense(self) -> Tensor:
        """The dense parameter, in the scale's data type and the module's own orientation."""
        return self.layout.oriented(dequantize(self))

    def part(self, index: int | slice) -> PackedTensor:
        """One expert of fused experts or some of them, or some rows."""
        shape = self.layout.shape[1:] if isinstance(index, int) else (len(self.codes[index]), *self.layout.shape[1:])
        zero_point = None if self.zero_point is None else self.zero_point[index]
        layout = replace(self.layout, shape=shape, kernel=())
        return PackedTensor(layout, self.codes[index], self.scale[index], zero_point, self.codebook, self.g_idx)

    def rows(self, index: Tensor) -> Tensor:
        """Dequantized rows of a weight with scales per row or group, as an embedding looks them up.

        Args:
            index: Row numbers, of any shape.

        Raises:
            RowError: A row does not exist.
        """
        count, columns = self.layout.shape
        flat = index.reshape(-1)
        low, high = (int(flat.min()), int(flat.max())) if flat.numel() else (0, 0)
        if low < 0 or high >= count:
            raise RowError(
                f"Row {low if low < 0 else high} was looked up in a packed embedding table of {count} rows.",
                f"look up rows 0 to {count - 1}; check that the tokenizer belongs to the model",
            )
        picked = replace(self.layout, shape=(flat.numel(), columns))
        zero_point = None if self.zero_point is None else self.zero_point[flat]
        found = PackedTensor(picked, self.codes[flat], self.scale[flat], zero_point, self.codebook, self.g_idx)
        return dequantize(found).view(*index.shape, columns)


def layout_of(row: PlanRow) -> Layout:
    """The packed layout that a row plans."""
    if row.quantization is None:
        raise ValueError(f"{row.name} is not quantized")
    return Layout(row.shape, row.quantization, row.transposed, row.kernel)


def pack(quantized: Quantized, layout: Layout, into: PackedTensor | None = None) -> PackedTensor:
    """Put a method's result into the canonical layout.

    Args:
        quantized: Codes, scale, zero point and codebook.
        layout: Shape, scheme, orientation.
        into: Where to write; allocated by default.
    """
    packed = allocate(layout, quantized.scale.dtype, quantized.codes.device) if into is None else into
    if packed.codes.dtype == torch.int8:
        packed.codes.copy_(quantized.codes)
    else:
        write_words(quantized.codes, layout.weights.num_bits, packed.codes)
    packed.scale.copy_(quantized.scale)
    if packed.zero_point is not None and quantized.zero_point is not None:
        packed.zero_point.copy_(quantized.zero_point)
    if packed.codebook is not None and quantized.codebook is not None:
        packed.codebook.copy_(quantized.codebook)
    return replace(
        packed,
        g_idx=quantized.g_idx,
        input_scale=quantized.input_scale,
        input_zero_point=quantized.input_zero_point,
    )


def allocate(layout: Layout, dtype: torch.dtype, device: torch.device) -> PackedTensor:
    """A packed tensor without values yet.

    Allocated before a weight is quantized, packed tensors lie side by side and the memory of temporaries can be used
    again; allocated afterwards, they would leave gaps that grow with the model.
    """
    bits, grid = layout.weights.num_bits, schemes.groups(layout.shape, layout.weights)
    shape, kind = (layout.shape, torch.int8) if bits == 8 else (words_shape(layout.shape, bits), torch.int32)
    table = layout.scheme.codebook is not None
    return PackedTensor(
        layout,
        torch.empty(shape, dtype=kind, device=device),
        torch.empty(grid, dtype=dtype, device=device),
        None if layout.weights.symmetric else torch.empty(grid, dtype=torch.int8, device=device),
        torch.empty(2**bits, dtype=torch.float32, device=device) if table else None,
    )


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int8 codes (… × columns) from packed ones."""
    return packed if packed.dtype == torch.int8 else from_words(packed, bits, columns)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """compressed-tensors' int32 words of int8 codes: … × columns → … × ceil(columns · bits / 32)."""
    words = torch.empty(words_shape(tuple(codes.shape), bits), dtype=torch.int32, device=codes.device)
    write_words(codes, bits, words)
    return words


def write_words(codes: Tensor, bits: int, words: Tensor) -> None:
    """Write the words of int8 codes into `words`, some rows at a time."""
    flat, target = codes.reshape(-1, codes.shape[-1]), words.view(-1, words.shape[-1])
    step = max(1, CHUNK // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        target[start : start + step] = _words(flat[start : start + step], bits)


def _words(rows: Tensor, bits: int) -> Tensor:
    """The words of a block of rows; bit widths that divide a byte take a path of byte operations."""
    if 8 % bits or sys.byteorder != "little":
        return pack_to_int32(rows, bits)
    per_byte = 8 // bits
    padding = -rows.shape[-1] % (32 // bits)
    unsigned = (rows + (1 << (bits - 1)) if bits < 8 else rows ^ -128).view(torch.uint8)
    if padding:
        unsigned = torch.nn.functional.pad(unsigned, (0, padding))
    lanes = unsigned.view(len(rows), -1, per_byte)
    merged = lanes[..., 0].contiguous()
    for lane in range(1, per_byte):
        merged |= lanes[..., lane] << (lane * bits)
    return merged.view(torch.int32)


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """int8 codes from compressed-tensors' int32 words; the inverse of `to_words`."""
    flat = words.reshape(-1, words.shape[-1])
    if 8 % bits or sys.byteorder != "little":
        codes = unpack_from_int32(flat, bits, torch.Size((flat.shape[0], columns)))
    else:
        lanes = flat.contiguous().view(torch.uint8)
        mask = (1 << bits) - 1
        parts = [(lanes >> (lane * bits)) & mask for lane in range(8 // bits)]
        joined = torch.stack(parts, dim=-1).flatten(-2)[:, :columns]
        codes = joined.view(torch.int8) - (1 << (bits - 1)) if bits < 8 else (joined ^ 128).view(torch.int8)
    return codes.view(*words.shape[:-1], columns)


def dequantize(packed: PackedTensor) -> Tensor:
    """Floating values in canonical orientation, in the scale's data type."""
    if packed.codebook is not None:
        return _looked_up(packed, packed.codebook)
    columns = packed.layout.shape[-1]
    values = unpack_codes(packed.codes, packed.layout.weights.num_bits, columns).to(packed.scale.dtype)
    if packed.layout.weights.strategy != "group":
        if packed.zero_point is not None:
            values = values - packed.zero_point.to(values.dtype)
        return values * packed.scale
    if packed.g_idx is not None:
        return _reordered(packed, values, packed.g_idx)
    grouped = values.unflatten(-1, (packed.scale.shape[-1], -1))
    if packed.zero_point is not None:
        grouped = grouped - packed.zero_point.to(values.dtype).unsqueeze(-1)
    return (grouped * packed.scale.unsqueeze(-1)).flatten(-2)


def _reordered(packed: PackedTensor, values: Tensor, g_idx: Tensor) -> Tensor:
    """Values of codes whose columns belong to groups in any order."""
    groups = g_idx.long()
    if packed.zero_point is not None:
        values = values - packed.zero_point.to(values.dtype)[..., groups]
    return values * packed.scale[..., groups]


def _looked_up(packed: PackedTensor, codebook: Tensor) -> Tensor:
    """Values of codes that are positions in a codebook."""
    bits, columns = packed.layout.weights.num_bits, packed.layout.shape[-1]
    positions = unpack_codes(packed.codes, bits, columns).to(torch.int32) + (1 << (bits - 1))
    values = codebook.to(torch.float32)[positions]
    scale = packed.scale.to(torch.float32)
    if packed.layout.weights.strategy == "group":
        grouped = values.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
        return grouped.flatten(-2).to(packed.scale.dtype)
    return (values * scale).to(packed.scale.dtype)


def words_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """The shape of packed words."""
    return (*shape[:-1], ceil(shape[-1] * bits / 32))


def nbytes(packed: PackedTensor) -> int:
    """Bytes of all its tensors."""
    return sum(prod(tensor.shape) * tensor.element_size() for tensor in packed.parts().values())
