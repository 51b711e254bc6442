from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize as reference_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.core import scheme as schemes
from hf_compress.modules.packed import (
    dequantize,
    from_words,
    nbytes,
    to_words,
    unpack_codes,
    words_shape,
)
from tests._utils.packing import codes_of, packed_of

WIDTHS = [1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 100]
STRATEGIES = [8, 24, 48, "channel", "tensor"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", WIDTHS)
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = codes_of((5, columns), bits)
    words = to_words(codes, bits)
    expected = pack_to_int32(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == expected.shape == words_shape(codes.shape, bits)
    assert torch.equal(words, expected)
    back = from_words(words, bits, columns)
    assert back.dtype == torch.int8
    assert torch.equal(back, unpack_from_int32(expected, bits, codes.shape))
    assert torch.equal(back, codes)


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    columns=st.integers(1, 80),
    seed=st.integers(0, 999),
)
def test_words_round_trip_in_any_shape(bits: int, shape: list[int], columns: int, seed: int) -> None:
    codes = codes_of((*shape, 2, columns), bits, seed)
    words = to_words(codes, bits)
    assert words.shape == words_shape(tuple(codes.shape), bits)
    assert torch.equal(from_words(words, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_strided_codes(bits: int) -> None:
    codes = codes_of((40, 6), bits).t()
    assert torch.equal(to_words(codes, bits), pack_to_int32(codes.contiguous(), bits))
    assert torch.equal(unpack_codes(to_words(codes, bits), bits, 40), codes)


def test_eight_bits_stay_int8_in_memory() -> None:
    codes = codes_of((4, 33), 8)
    assert unpack_codes(codes, 8, 33) is codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", STRATEGIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_dequantize_is_that_of_compressed_tensors(
    bits: int, group_size: int | str, symmetric: bool, dtype: torch.dtype
) -> None:
    packed = packed_of((6, 48), bits, group_size, symmetric, dtype)
    codes = unpack_codes(packed.codes, bits, 48)
    expected = reference_dequantize(codes, packed.scale, packed.zero_point, packed.layout.weights)
    seen = dequantize(packed)
    assert seen.dtype == expected.dtype == dtype
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, "channel", "tensor"])
def test_dequantize_of_experts_is_that_of_each(group_size: int | str, symmetric: bool) -> None:
    packed = packed_of((3, 6, 16), 4, group_size, symmetric)
    whole = dequantize(packed)
    codes = unpack_codes(packed.codes, 4, 16)
    for expert in range(3):
        if group_size == "tensor":
            scale, zeros = packed.scale, packed.zero_point
        else:
            scale = packed.scale[expert]
            zeros = None if packed.zero_point is None else packed.zero_point[expert]
            assert torch.equal(packed.part(expert).dense(), whole[expert])
        assert torch.equal(whole[expert], reference_dequantize(codes[expert], scale, zeros, packed.layout.weights))


def test_part_by_slice() -> None:
    packed = packed_of((5, 6, 16), 3, 8, symmetric=False)
    assert torch.equal(packed.part(slice(1, 3)).dense(), packed.dense()[1:3])
    assert torch.equal(packed.part(-1).dense(), packed.dense()[-1])


def test_orientation() -> None:
    packed = packed_of((6, 16), transposed=True)
    assert packed.layout.parameter_shape == (16, 6)
    assert torch.equal(packed.dense(), dequantize(packed).t())
    experts = packed_of((3, 6, 16), transposed=True)
    assert experts.layout.parameter_shape == tuple(experts.dense().shape) == (3, 16, 6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, "channel"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_rows(shape: tuple[int, ...], group_size: int | str, symmetric: bool) -> None:
    packed = packed_of((10, 16), 8, group_size, symmetric)
    index = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(packed.rows(index), packed.dense()[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", STRATEGIES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_planned_are_bytes_held(bits: int, group_size: int | str, symmetric: bool, dtype: torch.dtype) -> None:
    packed = packed_of((6, 48), bits, group_size, symmetric, dtype)
    held = sum(
        tensor.untyped_storage().nbytes()
        for tensor in (packed.codes, packed.scale, packed.zero_point)
        if tensor is not None
    )
    assert nbytes(packed) == held
    assert schemes.packed_bytes((6, 48), packed.layout.scheme, dtype.itemsize) == held


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 33, 63])
def test_bytes_of_odd_widths(bits: int, columns: int) -> None:
    packed = packed_of((6, columns), bits, "channel")
    assert schemes.packed_bytes((6, columns), packed.layout.scheme, 4) == nbytes(packed)


def test_layout_copies_by_reference() -> None:
    layout = packed_of((6, 16)).layout
    assert copy.deepcopy(layout) is layout
