"""`hf_compress.quantize`: a live model in place, or an id loaded weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from ..apply.packing import pack_weight
from ..apply.planning import check_config, plan_model, refuse_trained
from ..apply.swapping import announce, check_range, complete, swap_all
from ..calibration.block import Finished
from ..calibration.results import Results
from ..checkpoint.results_store import passing_store
from ..checkpoint.stock import load_source
from ..core.config import Calibration, QuantConfig
from ..core.errors import CalibrationError, ConfigError, UnsupportedModelError
from ..core.plan import Plan
from ..core.weights import kept_in_float32
from .backends import backend_of, quantize_stock
from .calibrate import calibrate_live, calibrate_source
from .planning import Request, meta_model, model_class, model_config, plan_request

Progress = Callable[[int, int], None]


def quantize(
    model_or_id: nn.Module | str | Path,
    config: Request,
    calibration: Any = None,
    progress: Progress | None = None,
    min_coverage: float | None = None,
) -> Any:
    """Quantize a model.

    Args:
        model_or_id: A live model, changed in place and returned; or a Hub id or directory, which is loaded
            weight by weight so that the dense model is never in memory.
        config: The request, such as `RTNQuantConfig(bits=4)`; or transformers' `BitsAndBytesConfig` or
            `TorchAoConfig`, carried out by these libraries, for an id or directory.
        calibration: Calibration data for methods that need it; not together with `config.calibration`.
        progress: Called with the number of weights done and the number planned; another library only says when all
            are done.
        min_coverage: Only with another library's configuration, which has no such field: smallest fraction of the
            values in scope that must be quantized, 0 to 1; 0.9 by default.

    Returns:
        The model, with packed weights and transformers' native quantizer.

    Raises:
        HFCompressError: Nothing was changed; the code says why.
    """
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is a {type(progress).__name__}.", "pass a function of done and total")
    if not isinstance(config, QuantConfig) and backend_of(config) is not None:
        return _quantize_by_library(model_or_id, config, calibration, progress, min_coverage)
    check_config(config, min_coverage)
    refuse_trained(config)
    config = with_calibration(config, calibration)
    if isinstance(model_or_id, nn.Module):
        return _quantize_live(model_or_id, config, progress)
    architecture = model_class(model_config(model_or_id), model_or_id)
    if config.spec.needs_data:
        made = plan_model(meta_model(model_or_id), config)
        announce(made)
        with ExitStack() as places:

            def results(plan: Plan) -> Results:
                return places.enter_context(passing_store(plan))

            return calibrate_source(model_or_id, made, config, architecture, results, progress, owned=True)
    request = copy(config)
    request.progress = progress
    return load_source(architecture, model_or_id, quantization_config=request)


def _quantize_by_library(
    model_or_id: nn.Module | str | Path,
    config: BitsAndBytesConfig | TorchAoConfig,
    calibration: object,
    progress: Progress | None,
    min_coverage: float | None,
) -> Any:
    """Quantize with another library, under the same contract: planned first, measured afterwards."""
    if calibration is not None:
        raise CalibrationError(f"A {type(config).__name__} needs no calibration data.", "leave `calibration` out")
    made, _ = plan_request(model_or_id, config, min_coverage)
    announce(made)
    source = str(model_or_id)
    model = quantize_stock(source, made, config, model_class(model_config(source), source))
    if progress is not None:
        covered = sum(row.covered for row in made.rows)
        progress(covered, covered)
    return model


def with_calibration(config: QuantConfig, calibration: Any) -> QuantConfig:
    """A request with data, which is given once, and only where it is used; the user's own request stays as it is."""
    if calibration is None:
        return config
    if config.calibration is not None:
        raise CalibrationError(
            "Calibration data was given twice: in the configuration and as an argument.", "give it once"
        )
    if not config.spec.needs_data:
        raise CalibrationError(f"The method {config.method!r} needs no calibration data.", "leave `calibration` out")
    request = copy(config)
    request.calibration = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    return request


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
    if config.spec.needs_data:
        made, finished = calibrate_live(model, made, config, progress)
    else:
        finished = _pack_all(model, made, progress)
    swap_all(model, made, finished)
    return model


def _pack_all(model: nn.Module, plan: Plan, progress: Progress | None) -> Finished:
    """Pack all weights, one after the other; ties once."""
    finished = Finished()
    own = [row for row in plan.quantized if row.tied_to is None]
    for row in own:
        parameter = model.get_submodule(row.module).get_parameter(row.parameter)
        finished.packed[row.name], finished.sqnr[row.name] = pack_weight(row, parameter, plan.method)
        if progress is not None:
            progress(len(finished.packed), len(own))
    return finished


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
