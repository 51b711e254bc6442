from __future__ import annotations

import pytest

from hf_compress.core.scheme import groups, label, packed_bytes, scheme, token_args, weight_args


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "name"),
    [
        (4, 64, True, "int4-g64"),
        (4, 64, False, "int4-g64-asym"),
        (8, "channel", True, "int8-channel"),
        (3, "tensor", False, "int3-tensor-asym"),
    ],
)
def test_labels(bits: int, group_size: int | str, symmetric: bool, name: str) -> None:
    args = weight_args(bits, group_size, symmetric)
    assert (args.num_bits, args.symmetric, args.type) == (bits, symmetric, "int")
    assert (args.strategy, args.group_size) == (
        (group_size, None) if isinstance(group_size, str) else ("group", group_size)
    )
    assert label(scheme(args)) == name
    assert scheme(args).format == "pack-quantized"
    assert scheme(args, packed=False).format == "int-quantized"


def test_w8a8() -> None:
    made = scheme(weight_args(8, "channel", True), token_args())
    assert label(made) == "w8a8-dynamic-token"
    assert made.format == "int-quantized"
    assert made.input_activations is not None
    assert (made.input_activations.dynamic, made.input_activations.symmetric) == (True, True)


@pytest.mark.parametrize(
    ("shape", "group_size", "expected"),
    [
        ((6, 32), 8, (6, 4)),
        ((6, 32), "channel", (6, 1)),
        ((6, 32), "tensor", (1,)),
        ((3, 6, 32), 16, (3, 6, 2)),
        ((3, 6, 32), "channel", (3, 6, 1)),
    ],
)
def test_groups(shape: tuple[int, ...], group_size: int | str, expected: tuple[int, ...]) -> None:
    assert groups(shape, weight_args(4, group_size, True)) == expected


def test_packed_bytes_by_hand() -> None:
    # 6 rows of 32 columns at 4 bits are 4 words; 4 groups a row with float16 scales.
    assert packed_bytes((6, 32), scheme(weight_args(4, 8, True)), 2) == 6 * 4 * 4 + 6 * 4 * 2
    assert packed_bytes((6, 32), scheme(weight_args(4, 8, False)), 2) == 6 * 4 * 4 + 6 * 4 * 2 + 6 * 4
    assert packed_bytes((6, 33), scheme(weight_args(3, "channel", True)), 4) == 6 * 4 * 4 + 6 * 4
    # 8 bits stay int8, one byte a value: 33 columns are not rounded up to words.
    assert packed_bytes((6, 33), scheme(weight_args(8, "tensor", False)), 4) == 6 * 33 + 4 + 1
