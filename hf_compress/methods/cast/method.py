"""Casting needs no scheme: the whole model changes its data type and stays a stock model."""

from __future__ import annotations

import torch

from ...core.config import QuantFields
from ...core.errors import ConfigError
from ...core.weights import Weight
from .config import DTYPES, CastFields
from .speed import note, slowdown


def scheme(fields: QuantFields, weight: Weight) -> torch.dtype | str:
    """The data type to cast to."""
    if not isinstance(fields, CastFields):
        raise ConfigError(f"{type(fields).__name__} has no dtype to cast to.")
    return DTYPES[fields.dtype]


def notes(fields: QuantFields) -> tuple[str, ...]:
    """An honest remark where this processor is slower in the type."""
    if not isinstance(fields, CastFields):
        return ()
    return note(fields.dtype, slowdown(DTYPES[fields.dtype]))
