"""What preflight says of memory follows what it depends on, and nothing else."""

from __future__ import annotations

import pytest
import torch

import hf_compress as hfc
from hf_compress.core.registry import METHODS
from tests._utils.tiny import tiny


def _calibration(rows: int) -> hfc.Calibration:
    ids = torch.zeros(rows, 32, dtype=torch.long)
    return hfc.Calibration([{"input_ids": part} for part in ids.split(8)])


def test_streamed_memory_does_not_grow_with_depth() -> None:
    config = hfc.RTNQuantConfig(bits=4, group_size=32)
    few, many = (hfc.preflight(tiny("llama", num_hidden_layers=layers), config) for layers in (2, 8))
    assert few.streamed_bytes == many.streamed_bytes
    packed = [sum(row.planned_bytes for row in one.plan.quantized) for one in (few, many)]
    assert [one.peak_bytes - one.streamed_bytes for one in (few, many)] == packed


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_count_data_and_second_moments(method: str) -> None:
    spec = METHODS.get(method)

    def said(rows: int, **sizes: int) -> int:
        config = spec.config(bits=4, group_size=32, calibration=_calibration(rows))
        found: int = hfc.preflight(tiny("llama", **sizes), config).streamed_bytes
        return found

    assert said(16) == said(16, num_hidden_layers=8)
    # Activations of 64 features before and after the block in float32, and three values of 2 bytes inside the MLP.
    assert said(48) - said(16) == 32 * 32 * (2 * 64 * 4 + 3 * 128 * 2)
    assert said(16, intermediate_size=512) - said(16) >= 4 * 3 * (512**2 - 128**2)


def test_looking_for_scales_counts_float32_copies_of_the_block() -> None:
    """With little data and a block of many narrow weights, the copies are more than second moments."""

    def said(dtype: torch.dtype, layers: int = 2) -> int:
        sizes = {"num_experts": 64, "num_hidden_layers": layers, "max_position_embeddings": 64}
        model = tiny("qwen3-moe", dtype=dtype, **sizes)
        config = hfc.AWQQuantConfig(bits=4, group_size=16, format="guarded", calibration=_calibration(8))
        found: int = hfc.preflight(model, config).streamed_bytes
        return found

    block = sum(value.numel() for value in tiny("qwen3-moe", num_experts=64).model.layers[0].parameters())
    copies = METHODS.get("awq").float32_copies
    between = 8 * 32 * 64 * 2
    assert said(torch.bfloat16) == said(torch.bfloat16, layers=4) == block * (2 + 4 * copies) + between
    assert said(torch.float32) == block * 4 * copies + 2 * between  # one copy is the block itself
