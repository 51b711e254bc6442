"""From public fields to compressed-tensors' vocabulary, and readable labels back.

Below the public fields there is no other vocabulary than `QuantizationArgs` and `QuantizationScheme`, extended by
two fields for what they can't say: that codes are positions in a codebook, that groups are not consecutive columns.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Codebook = Literal["nf4", "fp4", "log", "kmeans"]


class Scheme(QuantizationScheme):
    """compressed-tensors' scheme, or one whose codes are positions in a table of 2^bits values.

    Attributes:
        codebook: Kind of the table; None for a uniform grid. The table itself is stored with the weight, its values
            lie in -1 … 1 and a group's scale is its absolute maximum.
        reordered: Whether a `g_idx` names the group of each column, as GPTQ with `desc_act` has it.
    """

    codebook: Codebook | None = None
    reordered: bool = False


def weight_args(bits: int, group_size: int | str, symmetric: bool) -> QuantizationArgs:
    """Integer weights: the one mapping of `bits`, `group_size` and `symmetric`."""
    if isinstance(group_size, str):
        return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=group_size)
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size)


def token_args() -> QuantizationArgs:
    """Inputs: symmetric INT8, one scale per token, computed at run time."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def tensor_args() -> QuantizationArgs:
    """Inputs: symmetric INT8, one scale for the whole tensor, computed at run time."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=True)


def static_args(symmetric: bool) -> QuantizationArgs:
    """Inputs: INT8, one scale for the whole tensor, fixed beforehand."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="tensor", dynamic=False)


def scheme(
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None = None,
    packed: bool = True,
    codebook: Codebook | None = None,
) -> Scheme:
    """A scheme with its storage format; its targets are filled in by the checkpoint format.

    Args:
        weights: The weight's grid.
        inputs: The input's grid, or None for weight-only.
        packed: False stores weight-only codes as plain int8, as W8A8 always does.
        codebook: Kind of the table that codes are positions in; None for a uniform grid.
    """
    storage = "pack-quantized" if packed and inputs is None else "int-quantized"
    return Scheme(targets=[], weights=weights, input_activations=inputs, format=storage, codebook=codebook)


def with_half_scales(given: Scheme) -> Scheme:
    """The scheme with scales that fit into float16, for formats that store them so."""
    if given.weights is None:
        return given
    return given.model_copy(update={"weights": given.weights.model_copy(update={"scale_dtype": torch.float16})})


def label(given: Scheme) -> str:
    """A short name, such as `int4-g64`, `int4-g64-asym`, `nf4-g64`, `kmeans3-channel`, `w8a8-static-tensor`."""
    weights = given.weights
    if weights is None:
        return "float"
    inputs = given.input_activations
    if inputs is not None:
        when, end = "dynamic" if inputs.dynamic else "static", "" if inputs.symmetric else "-asym"
        return f"w{weights.num_bits}a{inputs.num_bits}-{when}-{inputs.strategy}{end}"
    span = f"g{weights.group_size}" if weights.strategy == "group" else str(weights.strategy)
    if given.codebook is not None:
        return f"{given.codebook.removesuffix('4')}{weights.num_bits}-{span}"
    return f"int{weights.num_bits}-{span}{'' if weights.symmetric else '-asym'}{'-act' if given.reordered else ''}"


def groups(shape: tuple[int, ...], args: QuantizationArgs) -> tuple[int, ...]:
    """The shape of the scale of a canonical weight (… × rows × columns)."""
    if args.strategy == "group" and args.group_size:
        return (*shape[:-1], shape[-1] // args.group_size)
    return (*shape[:-1], 1) if args.strategy == "channel" else (1,)


def packed_bytes(shape: tuple[int, ...], given: Scheme, scale_bytes: int) -> int:
    """Bytes of codes, scales, zero points and codebook of a canonical weight, and of its input's static grid.

    Args:
        shape: … × rows × columns.
        given: The weight's scheme.
        scale_bytes: Bytes of one scale, the weight's own element size.
    """
    args = given.weights
    if args is None:
        return prod(shape) * scale_bytes
    words = shape[-1] if args.num_bits == 8 else ceil(shape[-1] * args.num_bits / 32) * 4
    count = prod(groups(shape, args))
    table = 0 if given.codebook is None else 4 * 2**args.num_bits
    table += 4 * shape[-1] if given.reordered else 0
    inputs = given.input_activations
    static = 0 if inputs is None or inputs.dynamic else scale_bytes + (0 if inputs.symmetric else 1)
    return prod(shape[:-1]) * words + count * scale_bytes + (0 if args.symmetric else count) + table + static
