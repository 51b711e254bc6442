"""W8A8 dynamic, per token, for `nn.LSTM` and `nn.GRU`: every product through `int_mm.int8_linear`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .. import recurrent
from ..packed import Layout
from ..swap import PackedModule, packed_tensor, recurrent_product
from .int_mm import IntMatmul, int8_linear


class RecurrentIntMatmul(IntMatmul):
    """Symmetric int8 weights per channel, symmetric int8 inputs and hidden states per token.

    Rounding a hidden state can turn on the last bit of a sum, so over many steps outputs may differ by more than
    one product's tolerance.
    """

    name = "int8-matmul-recurrent"

    def refusal(self, module: nn.Module, layout: Layout) -> str | None:
        """Why it can't run a module, or None."""
        if not isinstance(module, nn.LSTM | nn.GRU):
            return "neither nn.LSTM nor nn.GRU"
        reasons = (self._reason(module, name, one) for name, one in vars(module)["hfc_layouts"].items())
        return next((reason for reason in reasons if reason is not None), None)

    def _reason(self, module: nn.Module, name: str, layout: Layout) -> str | None:
        """Why it can't run one of the weights, or None."""
        return self.weight_refusal(layout, module.get_buffer(f"{name}_packed"), module.get_buffer(f"{name}_scale"))

    def run(self, module: nn.Module, value: Any, hx: Any = None) -> Any:
        """The layer's output and states.

        Args:
            module: A packed layer.
            value: Its input, float32.
            hx: Its initial states as the layer takes them, float32, or None for zeros.
        """
        return recurrent.run(module, value, hx, partial(_product, module))  # type: ignore[arg-type]


def _product(module: PackedModule, name: str, bias: str | None) -> recurrent.Product:
    """The product with one weight, in integers where it is packed."""
    if name not in module.hfc_layouts:
        return recurrent_product(module, name, bias)
    packed = packed_tensor(module, name)
    scale, offset = packed.scale.view(-1), None if bias is None else module.get_parameter(bias)
    return lambda tokens: int8_linear(tokens, packed.codes, scale, offset)
