"""`hf_compress.quantize`: a live model in place, or an id loaded weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.config import Calibration, QuantConfig
from ..core.errors import CalibrationError, ConfigError
from ..core.plan import Plan
from ..modules.swap import pack_module
from .apply import pack_weight, with_results
from .loading import complete
from .planning import model_class, model_config, plan_model

Progress = Callable[[int, int], None]


def quantize(
    model_or_id: nn.Module | str | Path,
    config: QuantConfig,
    calibration: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Quantize a model.

    Args:
        model_or_id: A live model, changed in place and returned; or a Hub id or directory, which is loaded
            weight by weight so that the dense model is never in memory.
        config: The request, such as `RTNQuantConfig(bits=4)`.
        calibration: Calibration data for methods that need it; not together with `config.calibration`.
        progress: Called with the number of weights done and the number planned.

    Returns:
        The model, with packed weights and transformers' native quantizer.

    Raises:
        HFCompressError: Nothing was changed; the code says why.
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config is a {type(config).__name__}.", "pass for example RTNQuantConfig(bits=4)")
    _check_calibration(config, calibration)
    if isinstance(model_or_id, nn.Module):
        return _quantize_live(model_or_id, config, progress)
    architecture = model_class(model_config(model_or_id), model_or_id)
    request = copy(config)
    request.progress = progress
    return architecture.from_pretrained(model_or_id, quantization_config=request)


def _check_calibration(config: QuantConfig, calibration: Any) -> None:
    """Data once, and only where it is used."""
    if calibration is None:
        return
    if config.calibration is not None:
        raise CalibrationError(
            "Calibration data was given twice: in the configuration and as an argument.", "give it once"
        )
    if not config.spec.needs_data:
        raise CalibrationError(f"The method {config.method!r} needs no calibration data.", "leave `calibration` out")
    config.calibration = Calibration(calibration)


@torch.no_grad()
def _quantize_live(model: nn.Module, config: QuantConfig, progress: Progress | None) -> nn.Module:
    """Quantize everything first, then swap, so that a failure leaves the model as it was."""
    made = plan_model(model, config)
    if config.load_dtype is not None:
        return _cast_live(model, made, config.load_dtype)
    packed, noise = {}, {}
    for row in made.quantized:
        parameter = model.get_submodule(row.module).get_parameter(row.parameter)
        packed[row.name], noise[row.name] = pack_weight(row, parameter, made.method)
        if progress is not None:
            progress(len(packed), len(made.quantized))
    for row in made.quantized:
        pack_module(model.get_submodule(row.module), row.parameter, packed[row.name])
    complete(model, with_results(made, noise))
    return model


def _cast_live(model: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """Cast a live model."""
    model.to(dtype)
    complete(model, plan)
    return model
