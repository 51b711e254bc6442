"""Tables that do not depend on the weight: NF4, FP4 and powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Codebook

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution with an exact zero (QLoRA, Dettmers et al. 2023, appendix E)."""

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""One bit of sign, two of exponent, one of mantissa, in the order of bitsandbytes' codes; negative values follow."""


def fixed_table(codebook: Codebook, bits: int) -> Tensor:
    """The table of a codebook that is the same for all weights.

    Args:
        codebook: `"nf4"` or `"fp4"` (16 values, a position is bitsandbytes' code), or `"log"`.
        bits: Bits per code, 2 to 8; the first two have 4.

    Returns:
        float32, 2^bits values in -1 … 1.
    """
    if codebook == "log":
        return powers_of_two(bits)
    if codebook == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    positive = torch.tensor(_FP4, dtype=torch.float32)
    return torch.cat([positive, 0.0 - positive]).div_(positive.max())


def powers_of_two(bits: int) -> Tensor:
    """Zero and signed powers of two, ascending; there is one more of the positive ones.

    -2^0, -2^-1, … -2^-(n - 2), 0, 2^-(n - 1), … 2^-1, 2^0 with n = 2^(bits - 1); at 4 bits from -1 … -1/64 to
    1/128 … 1 (LogNet, Lee et al. 2017, with a signed code).

    Args:
        bits: Bits per code, 2 to 8.

    Returns:
        float32, 2^bits values.
    """
    positive = [2.0**-exponent for exponent in range(2 ** (bits - 1))]
    negative = [-value for value in positive[:-1]]
    return torch.tensor([*negative, 0.0, *reversed(positive)], dtype=torch.float32)
