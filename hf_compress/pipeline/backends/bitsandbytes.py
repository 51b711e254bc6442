"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv:2305.14314), LLM.int8() (arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ...checkpoint.foreign import Foreign
from ...core.errors import BackendError, ConfigError, listed
from ...core.plan import PlanRow
from ...core.weights import Weight, WeightKind
from .skipping import Skips

BLOCK = 64
"""Values per scale that transformers asks for."""

NESTED_BLOCK = 256
"""Scales per scale of scales with double quantization."""

CPU_ROWS = 32
"""Rows must be a multiple of this for the 4-bit kernel of processors with AVX512-BF16."""


class BitsAndBytes:
    """The `Backend` of `BitsAndBytesConfig`."""

    library = "bitsandbytes"
    skip_field = "llm_int8_skip_modules"
    matched_name_is_module = True

    def check(self, config: BitsAndBytesConfig) -> None:
        """4 or 8 bits must be asked for, in a known type, and not for nothing.

        Raises:
            ConfigError: They are not, or what lies on the CPU shall stay, where there is nothing else.
        """
        if config.llm_int8_enable_fp32_cpu_offload and not torch.accelerator.is_available():
            raise ConfigError(
                "llm_int8_enable_fp32_cpu_offload=True keeps what lies on the CPU, and this machine has nothing else: "
                "no weight would be quantized.",
                "llm_int8_enable_fp32_cpu_offload=False",
            )
        if config.quantization_method() is None:
            asked = f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}" if config.load_in_4bit else "no bits"
            raise ConfigError(
                f"This BitsAndBytesConfig asks for {asked}; bitsandbytes knows nf4, fp4 and int8.",
                'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
            )

    def matched_name(self, weight: Weight) -> str:
        """Module names are compared."""
        return weight.module

    def unhandled(self, weight: Weight) -> str | None:
        """It replaces `nn.Linear` itself and transformers' `Conv1D`."""
        if weight.kind is WeightKind.EXPERTS:
            return "bitsandbytes skips fused experts"
        known = weight.kind is WeightKind.CONV1D or weight.owner == nn.Linear.__name__
        return None if known else f"bitsandbytes does not handle {weight.owner}"

    def made(self, weight: Weight, model: PreTrainedModel, quantizer: Any) -> Foreign | str:
        """The scheme asked for; bytes as its functions allocate them."""
        config = quantizer.quantization_config
        scheme = {"llm_int8": "int8"}.get(config.quantization_method(), config.quantization_method())
        if scheme != "int8":
            return Foreign(self.library, scheme, _four_bit_bytes(weight.count, config))
        if config.llm_int8_has_fp16_weight:
            return "llm_int8_has_fp16_weight keeps float16 weights"
        return Foreign(self.library, scheme, weight.count + 4 * weight.shape[-2])

    def check_machine(self, rows: Sequence[PlanRow], model: PreTrainedModel, skips: Skips) -> None:
        """The 4-bit kernel of some processors fails on odd shapes, and only in the first forward.

        Raises:
            BackendError: Names the weights.
        """
        from bitsandbytes.functional import has_avx512bf16

        four = [row for row in rows if row.backend and row.scheme in ("nf4", "fp4")]
        odd = [row for row in four if row.shape[-2] % CPU_ROWS or row.shape[-1] % BLOCK]
        if odd and not torch.accelerator.is_available() and has_avx512bf16():
            raise BackendError(
                f"bitsandbytes' 4-bit kernel for this processor (AVX512-BF16) needs multiples of {CPU_ROWS} rows and "
                f"{BLOCK} columns: {odd[0].name} has {odd[0].shape[-2]}×{odd[0].shape[-1]} ({len(odd)} weights: "
                f"{listed(row.name for row in odd)}). The model would fail in its first forward. No data was read.",
                skips.keeping([row.module for row in odd]),
            )

    def instead(self, rows: Sequence[PlanRow]) -> str:
        """Ours handles fused experts and what an architecture wants in float32."""
        return "hf_compress.RTNQuantConfig(bits=4), which handles them"

    def notes(self, rows: Sequence[PlanRow]) -> tuple[str, ...]:
        """Nothing."""
        return ()


def _four_bit_bytes(count: int, config: BitsAndBytesConfig) -> int:
    """Bytes of `quantize_4bit`'s result: packed values, absolute maxima, the table of 16 values.

    Double quantization stores the maxima in 8 bits, with scales of their own, an offset and a table of 256 values.
    """
    values = ceil(count / (2 * config.bnb_4bit_quant_storage.itemsize)) * config.bnb_4bit_quant_storage.itemsize
    blocks = ceil(count / BLOCK)
    nested = blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4 + 4 * 256
    return values + (nested if config.bnb_4bit_use_double_quant else 4 * blocks) + 4 * 16


BACKEND = BitsAndBytes()
