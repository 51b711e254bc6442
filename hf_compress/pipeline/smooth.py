"""`hf_compress.smooth`: SmoothQuant as a step of its own, before any method."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..apply.planning import plan_model
from ..calibration.data import prepare
from ..calibration.modes import evaluating
from ..core.config import Calibration
from ..core.errors import ConfigError, UnsupportedModelError
from ..core.plan import PlanRow
from ..core.weights import list_weights
from ..methods.int8_dynamic import Int8DynamicQuantConfig
from ..methods.smoothquant import smooth_model


def smooth(model: nn.Module, calibration: Any = None, strength: float = 0.5) -> nn.Module:
    """Move the range of activations into the weights, so that 8 bits lose less on both.

    The model stays a float model with the same function, up to rounding of its data type; quantize it with any method
    afterwards. Scales are folded into norms and linear layers (SmoothQuant, arXiv:2211.10438, eq. 4).

    Args:
        model: A live model, changed in place and returned.
        calibration: Calibration data, as for `quantize`.
        strength: α, 0 to 1: how much of the range goes into the weights.

    Raises:
        ConfigError: The strength is not between 0 and 1.
        CalibrationError: The data can't be used.
        UnsupportedModelError: Not a live model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"smooth needs a live model, not {type(model).__name__}.", "load it with from_pretrained first"
        )
    if type(strength) not in (int, float) or not 0 <= strength <= 1:
        raise ConfigError(f"strength={strength!r} is not between 0 and 1.", "strength=0.5")
    rows = _rows(model)
    request = calibration if isinstance(calibration, Calibration) or calibration is None else Calibration(calibration)
    where = model.config.name_or_path if isinstance(model, PreTrainedModel) else None
    with evaluating(model):
        smooth_model(model, rows, prepare(request, model, where or None).batches, float(strength))
    return model


def _rows(model: nn.Module) -> list[PlanRow]:
    """Weights whose inputs 8 bits would quantize. Tied ones are left out: whoever else owns them would change too."""
    weights = list_weights(model)
    tied = {name for weight in weights if weight.tied_to for name in (weight.name, weight.tied_to)}
    skip = tuple(rf"re:{re.escape(name)}\Z" for name in sorted(tied))
    # Nothing is saved here, so no stock format has to hold the plan.
    plan = plan_model(model, Int8DynamicQuantConfig(min_coverage=0.0, skip=skip, format="guarded"))
    return [row for row in plan.quantized if row.quantization is not None and row.quantization.input_activations]
