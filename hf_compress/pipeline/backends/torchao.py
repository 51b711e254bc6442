"""torchao: integer and float8 weights as tensor subclasses (https://github.com/pytorch/ao)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, TorchAoConfig

from ...checkpoint.foreign import Foreign, foreign_of
from ...core.plan import PlanRow
from ...core.weights import Weight, WeightKind
from .skipping import Skips


class TorchAo:
    """The `Backend` of `TorchAoConfig`."""

    library = "torchao"
    skip_field = "modules_to_not_convert"
    matched_name_is_module = False

    def check(self, config: TorchAoConfig) -> None:
        """transformers has checked it."""

    def matched_name(self, weight: Weight) -> str:
        """Parameter names are compared."""
        return weight.key

    def unhandled(self, weight: Weight) -> str | None:
        """transformers hands it linears, and embeddings on request."""
        if weight.kind is WeightKind.EXPERTS:
            return "torchao skips fused experts"
        return None if weight.kind is WeightKind.LINEAR else f"torchao does not handle {weight.owner}"

    def made(self, weight: Weight, model: PreTrainedModel, quantizer: Any) -> Foreign | str:
        """What transformers' own operation makes of the weight on meta."""
        try:
            model.get_input_embeddings()
        except NotImplementedError:
            return f"transformers' torchao handles no model without input embeddings, such as {type(model).__name__}"
        module = model.get_submodule(weight.module)
        value = torch.empty_like(module.get_parameter(weight.parameter), device="meta")
        operation = quantizer.get_quantize_ops()
        operation.convert({weight.key: value}, model=model, full_layer_name=weight.key, missing_keys=set())
        return foreign_of(module, weight.parameter) or f"torchao leaves this {weight.owner} as it is"

    def check_machine(self, rows: Sequence[PlanRow], model: PreTrainedModel, skips: Skips) -> None:
        """Quantizing on meta has shown what it can't do."""

    def instead(self, rows: Sequence[PlanRow]) -> str:
        """Ours handles `Conv1D` and fused experts."""
        return "hf_compress.RTNQuantConfig(bits=8), which handles them"

    def notes(self, rows: Sequence[PlanRow]) -> tuple[str, ...]:
        """Where a narrow type takes a byte per value all the same."""
        narrow = [row for row in rows if row.scheme.startswith("int") and not row.scheme.startswith("int8")]
        wide = [row for row in narrow if row.planned_bytes >= row.parameters > 0]
        if not wide:
            return ()
        bits = 8 * sum(row.planned_bytes for row in wide) / sum(row.parameters for row in wide)
        kind = wide[0].scheme.partition("-")[0]
        return (f"torchao stores these {kind} weights unpacked: {bits:.1f} bits each in memory and on disk",)


BACKEND = TorchAo()
