"""Configuration of casting."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ...core.config import QuantConfig, QuantFields

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CastFields(QuantFields):
    """Fields of `CastConfig`.

    A stock checkpoint has one data type, so nothing can be left out: `skip` and `rules` are not accepted. Formats hold
    quantized weights; a cast model is a plain checkpoint.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"
    default_rules: Literal[False] = False
    skip: Annotated[tuple[str, ...], Field(max_length=0)] = ()
    rules: Annotated[tuple[str, ...], Field(max_length=0)] = ()  # type: ignore[assignment]
    embeddings: Literal["keep"] = "keep"
    format: Literal["auto"] = "auto"


class CastConfig(QuantConfig):
    """Cast all floating-point values to 16 bits.

    Args:
        dtype: `"bf16"` (range of float32, 8 bits of precision) or `"fp16"` (11 bits of precision, up to 65504).

    Raises:
        ConfigError: A key is unknown or a value is impossible.
    """

    method = "cast"
    fields_type = CastFields

    @property
    def load_dtype(self) -> torch.dtype | None:
        """The data type to cast to."""
        return DTYPES[str(self.fields.model_dump()["dtype"])]
