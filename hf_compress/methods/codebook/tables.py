"""Tables that do not depend on the weight: NF4, FP4 and powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Codebook
from ...formats.bitsandbytes import TABLES


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
    return torch.tensor(TABLES[codebook], dtype=torch.float32)


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
