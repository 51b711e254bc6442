"""W8A8, dynamic per token or static, through `torch._int_mm` (int8 × int8 → int32) on the plain codes.

One copy of the weight, no packing. PyTorch runs it with oneDNN's integer instructions on x86. On processors
without VNNI its 16-bit sums saturate silently, so the probe compares extreme codes with exact integers first.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..packed import Layout

_MOST_ROUNDS = 50
_ROWS, _COLUMNS = 128, 512


class IntMatmul:
    """Symmetric int8 weights per channel, symmetric int8 inputs per token."""

    name = "int8-matmul"
    tolerance = 1e-4

    def refusal(self, module: nn.Module, layout: Layout) -> str | None:
        """Why it can't run a module, or None."""
        if "weight_packed" not in module._buffers:
            return "not a linear layer"
        if vars(type(module)).get("hfc_base", type(module)).forward not in (nn.Linear.forward, Conv1D.forward):
            return "its forward is not that of nn.Linear"
        return self.weight_refusal(layout, module.get_buffer("weight_packed"), module.get_buffer("weight_scale"))

    def weight_refusal(self, layout: Layout, codes: Tensor, scale: Tensor) -> str | None:
        """Why it can't multiply with a weight, or None."""
        if reason := self.inputs_refusal(layout.scheme.input_activations):
            return reason
        weights = layout.weights
        if (weights.num_bits, weights.strategy, weights.symmetric) != (8, "channel", True):
            return "weights are not symmetric int8 per channel"
        if codes.device.type != "cpu" or scale.dtype != torch.float32:
            return "only float32 on the CPU"
        return None if min(layout.shape) >= 8 and layout.shape[1] % 8 == 0 else "too small or not a multiple of 8"

    def inputs_refusal(self, inputs: QuantizationArgs | None) -> str | None:
        """Why it can't quantize such inputs, or None."""
        if inputs is None or (inputs.num_bits, inputs.strategy, inputs.dynamic) != (8, "token", True):
            return "inputs are not quantized dynamically per token"
        return None

    def probe(self) -> str | None:
        """Why it must not be used here, or None; measured once per process."""
        return _probe()

    def run(self, module: nn.Module, value: Tensor) -> Tensor:
        """Quantize each token, multiply integers, scale back.

        Args:
            module: A packed linear module.
            value: … × columns, float32.
        """
        codes, scale = module.get_buffer("weight_packed"), module.get_buffer("weight_scale")
        output = int8_linear(value.reshape(-1, value.shape[-1]), codes, scale.view(-1), module._parameters.get("bias"))
        return output.view(*value.shape[:-1], codes.shape[0])


class StaticIntMatmul(IntMatmul):
    """Symmetric int8 weights per channel, int8 inputs on one fixed grid, with or without zero point."""

    name = "int8-matmul-static"

    def inputs_refusal(self, inputs: QuantizationArgs | None) -> str | None:
        """Why it can't quantize such inputs, or None."""
        if inputs is None or (inputs.num_bits, inputs.strategy, inputs.dynamic) != (8, "tensor", False):
            return "inputs are not quantized statically"
        return None

    def run(self, module: nn.Module, value: Tensor) -> Tensor:
        """Quantize on the fixed grid, multiply integers, scale back.

        Args:
            module: A packed linear module.
            value: … × columns, float32.
        """
        packed = packed_parts(module)
        output = static_linear(value.reshape(-1, value.shape[-1]), *packed, module._parameters.get("bias"))
        return output.view(*value.shape[:-1], len(packed[0]))


def packed_parts(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Codes (rows × columns), scales (rows), input scale (1) and input zero point (1, or None) of a packed module."""
    codes, scale = module.get_buffer("weight_packed"), module.get_buffer("weight_scale")
    return (
        codes,
        scale.view(-1),
        module.get_buffer("weight_input_scale"),
        module._buffers.get("weight_input_zero_point"),
    )


@torch.no_grad()
def static_linear(
    tokens: Tensor, codes: Tensor, scale: Tensor, step: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """compressed-tensors' static per-tensor arithmetic with one integer product.

    Args:
        tokens: tokens × columns, float32.
        codes: rows × columns, int8.
        scale: rows, float32.
        step: Scale of the input (1), float32.
        zero_point: Zero point of the input (1), int8, or None.
        bias: rows, or None.

    Returns:
        tokens × rows, float32: (round(x / step + zero_point), clamped, - zero_point) · step, times the weight.
        Infinite inputs are the ends of the grid; a token with NaN gives NaN.
    """
    if tokens.numel() == 0:
        return tokens.new_empty(len(tokens), len(codes))
    grid = tokens.contiguous() / step  # torch._int_mm misreads other strides
    if zero_point is not None:
        grid += zero_point
    grid.clamp_(-128, 127).round_()
    unknown = grid.sum(1, keepdim=True).isnan()  # int8 has no NaN; within the limits of the grid no sum makes one
    product = torch._int_mm(grid.to(torch.int8), codes.t())
    if zero_point is not None:
        product -= codes.sum(1, dtype=torch.int32).mul_(zero_point.to(torch.int32))
    output = product.to(torch.float32).masked_fill_(unknown, torch.nan)
    return output.mul_(scale * step) if bias is None else torch.addcmul(bias, output, scale * step, out=output)


@torch.no_grad()
def int8_linear(tokens: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """compressed-tensors' dynamic per-token arithmetic with one integer product.

    Args:
        tokens: tokens × columns, float32.
        codes: rows × columns, int8.
        scale: rows, float32.
        bias: rows, or None.

    Returns:
        tokens × rows, float32. A token's scale is absmax / 127.5, rounding is half to even, clamped at 127. A token
        of zeros gives exactly the bias.
    """
    if tokens.numel() == 0:
        return tokens.new_empty(len(tokens), len(codes))
    tokens = tokens.contiguous()  # torch._int_mm misreads other strides
    grid = tokens.abs()
    step = grid.amax(-1, keepdim=True).div_(127.5)
    step.masked_fill_(step == 0, torch.finfo(torch.float32).eps)
    torch.div(tokens, step, out=grid)
    product = torch._int_mm(grid.round_().clamp_max_(127).to(torch.int8), codes.t())
    output = product.to(torch.float32).mul_(scale)
    return output.mul_(step) if bias is None else torch.addcmul(bias, output, step, out=output)


@functools.cache
def _probe() -> str | None:
    """Exact on extreme codes, then faster than dequantizing and multiplying in float32."""
    if not _exact():
        return "torch._int_mm is not exact on this processor (no VNNI)"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_ROWS, _COLUMNS, generator=generator)
    codes = torch.randint(-128, 128, (_COLUMNS, _COLUMNS), dtype=torch.int8, generator=generator)
    scale = torch.full((_COLUMNS,), 0.01)
    return _slower(
        lambda: int8_linear(tokens, codes, scale, None),
        lambda: functional.linear(tokens, codes.to(torch.float32) * scale.unsqueeze(-1)),
    )


def _slower(kernel: Callable[[], object], reference: Callable[[], object]) -> str | None:
    """Why the kernel is not worth it, or None.

    The fastest of interleaved rounds, as many as a busy machine needs until the kernel is clearly ahead.
    """
    fast = slow = float("inf")
    for _ in range(_MOST_ROUNDS):
        slow, fast = min(slow, _seconds(reference)), min(fast, _seconds(kernel))
        if fast * 1.2 < slow:
            return None
    return f"slower than the reference here ({fast / slow:.1f} times its time)"


def _exact() -> bool:
    """Whether extreme codes give exact integer sums, for one and for many rows."""
    for rows in (1, _ROWS):
        for left, right in ((127, 127), (127, -128), (-128, -128)):
            inputs = torch.full((rows, _COLUMNS), left, dtype=torch.int8)
            weights = torch.full((_COLUMNS, 16), right, dtype=torch.int8).t().contiguous().t()
            if not bool((torch._int_mm(inputs, weights) == left * right * _COLUMNS).all()):
                return False
    return True


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
