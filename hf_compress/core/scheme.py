"""From public fields to compressed-tensors' vocabulary, and readable labels back.

Below the public fields there is no other vocabulary than `QuantizationArgs` and `QuantizationScheme`.
"""

from __future__ import annotations

from math import ceil, prod

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def weight_args(bits: int, group_size: int | str, symmetric: bool) -> QuantizationArgs:
    """Integer weights: the one mapping of `bits`, `group_size` and `symmetric`."""
    if isinstance(group_size, str):
        return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=group_size)
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size)


def token_args() -> QuantizationArgs:
    """Inputs: symmetric INT8, one scale per token, computed at run time."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def scheme(
    weights: QuantizationArgs, inputs: QuantizationArgs | None = None, packed: bool = True
) -> QuantizationScheme:
    """A scheme with its storage format; its targets are filled in by the checkpoint format.

    Args:
        weights: The weight's grid.
        inputs: The input's grid, or None for weight-only.
        packed: False stores weight-only codes as plain int8, as W8A8 always does.
    """
    storage = "pack-quantized" if packed and inputs is None else "int-quantized"
    return QuantizationScheme(targets=[], weights=weights, input_activations=inputs, format=storage)


def label(given: QuantizationScheme) -> str:
    """A short name, such as `int4-g64`, `int4-g64-asym`, `int8-channel` or `w8a8-dynamic-token`."""
    weights = given.weights
    if weights is None:
        return "float"
    inputs = given.input_activations
    if inputs is not None:
        return f"w{weights.num_bits}a{inputs.num_bits}-{'dynamic' if inputs.dynamic else 'static'}-{inputs.strategy}"
    span = f"g{weights.group_size}" if weights.strategy == "group" else str(weights.strategy)
    return f"int{weights.num_bits}-{span}" + ("" if weights.symmetric else "-asym")


def groups(shape: tuple[int, ...], args: QuantizationArgs) -> tuple[int, ...]:
    """The shape of the scale of a canonical weight (… × rows × columns)."""
    if args.strategy == "group" and args.group_size:
        return (*shape[:-1], shape[-1] // args.group_size)
    return (*shape[:-1], 1) if args.strategy == "channel" else (1,)


def packed_bytes(shape: tuple[int, ...], args: QuantizationArgs, scale_bytes: int) -> int:
    """Bytes of codes, scales and zero points of a canonical weight.

    Args:
        shape: … × rows × columns.
        args: The weight's grid.
        scale_bytes: Bytes of one scale, the weight's own element size.
    """
    words = shape[-1] if args.num_bits == 8 else ceil(shape[-1] * args.num_bits / 32) * 4
    count = prod(groups(shape, args))
    return prod(shape[:-1]) * words + count * scale_bytes + (0 if args.symmetric else count)
