"""`hf_compress.quantize`: a live model in place, or an id loaded weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..checkpoint.stock import LOADER_ERRORS, load_complete
from ..core.config import Calibration, QuantConfig
from ..core.errors import (
    CalibrationError,
    ConfigError,
    CorruptCheckpointError,
    HFCompressError,
    ModelNotFoundError,
    UnsupportedModelError,
    first_line,
)
from ..core.plan import Plan
from ..core.weights import kept_in_float32
from ..modules.swap import pack_module
from .apply import pack_weight, with_results
from .loading import announce, check_range, complete
from .planning import check_config, model_class, model_config, plan_model

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
    check_config(config)
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is a {type(progress).__name__}.", "pass a function of done and total")
    _check_calibration(config, calibration)
    if isinstance(model_or_id, nn.Module):
        return _quantize_live(model_or_id, config, progress)
    architecture = model_class(model_config(model_or_id), model_or_id)
    request = copy(config)
    request.progress = progress
    try:
        return load_complete(architecture, model_or_id, quantization_config=request)
    except HFCompressError:
        raise
    except SafetensorError as error:
        raise CorruptCheckpointError(
            f"The weights of {str(model_or_id)!r} are damaged: {first_line(error)}.", "download or save them again"
        ) from error
    except OSError as error:
        raise ModelNotFoundError(
            f"No weights at {str(model_or_id)!r}: {first_line(error)}", "check that the model is complete"
        ) from error
    except LOADER_ERRORS as error:
        raise UnsupportedModelError(
            f"transformers can't load {str(model_or_id)!r} as {architecture.__name__}: {first_line(error)}",
            "check that the config belongs to the weights",
        ) from error


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
    on_meta = [name for name, value in model.named_parameters() if value.is_meta]
    if on_meta:
        raise UnsupportedModelError(
            f"{type(model).__name__} has weights on the meta device ({on_meta[0]}, ...): they have no values.",
            "load the weights, or pass the model's id or directory",
        )
    made = plan_model(model, config)
    announce(made)
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
    """Cast a live model as transformers would load it, unless it would overflow.

    Buffers that are not saved, such as rotary frequencies, stay as they are.
    """
    check_range(model, dtype)
    kept = kept_in_float32(model, dtype)
    saved = set(model.state_dict())
    for name, value in [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in saved)]:
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept(name) else dtype)
    complete(model, plan)
    return model
